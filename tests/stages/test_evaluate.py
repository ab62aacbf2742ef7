"""How drawings become a metric row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from stages.evaluate import EvaluateConfig, _generation_rows


def rows_of(images_per_prompt: int, correct: list[bool]) -> list[dict[str, Any]]:
    keys = [f"{index // images_per_prompt}" for index in range(len(correct))]
    table = pa.table({"key": keys, "correct": correct, "real_correct": [key != "0" for key in keys]})
    config = EvaluateConfig(images_per_prompt=images_per_prompt)
    inputs = {"prepare_teacher": SimpleNamespace(digest="0" * 64)}
    context: Any = SimpleNamespace(config=config, inputs=inputs)
    return _generation_rows("sde", table, context)


def test_one_drawing_a_prompt_is_a_proportion() -> None:
    own, ceiling = rows_of(1, [True, False, False, False])
    assert (own["value"], own["num_samples"], ceiling["value"]) == (0.25, 4, 0.75)
    assert 0 < own["ci_low"] < 0.25 < own["ci_high"] < 1


def test_several_drawings_of_a_prompt_are_one_sample() -> None:
    own, ceiling = rows_of(2, [True, True, True, False, False, False, False, False])
    assert own["value"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert (own["num_samples"], ceiling["num_samples"], ceiling["value"]) == (4, 4, 0.75)
    assert own["settings"]["interval"] == "over prompts" and own["settings"]["images_per_prompt"] == 2
