"""How rows become metrics, and which rows are asked about."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from infra.executors import LocalExecutor
from stages.artifacts.codes import CodedRows
from stages.evaluate.metric_rows import _generation_rows, _understanding_rows
from stages.evaluate.stage import EvaluateConfig
from stages.evaluate.tasks import RANDOM, SAME_CATEGORY, EvaluationTasks, TaskFactory
from stages.evaluate.worker import CRASHED
from stages.metrics.reconstructions import reconstruction_rows
from stages.metrics.rows import RowMaker
from stages.pipeline.execution import run_stage
from storage.tables import read_table
from tests.helpers.poison_evaluate import PoisonableTaskFactory
from tests.helpers.tiny import TinyRun


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


def test_both_ssim_rows_name_window_border_and_range() -> None:
    columns = {"ssim": torch.tensor([0.5, 0.7]), "ssim_llamagen": torch.tensor([0.8, 0.9])}
    make = RowMaker("sde", "reconstruction", "test", {"format": "PNG"})
    own, llamagen = (row["settings"] for row in reconstruction_rows(make, columns, None, None))
    assert (own["window"], own["data_range"]) == ("11x11 Gaussian, sigma 1.5", 1.0)
    assert (llamagen["window"], llamagen["data_range"]) == ("7x7 uniform", 2.0)
    assert "5 pixels from its edge" in own["border"] and "3 pixels from its edge" in llamagen["border"]


def _worker(run: TinyRun, **changes: Any) -> EvaluationTasks:
    inputs = {name: result.manifest for name, result in run.results.items()}
    config = run.recipe.evaluate.model_copy(update={"precision": "fp32"} | changes)
    return EvaluationTasks(TaskFactory(run.store, config, 0, inputs))


def test_captions_may_stand_for_concepts_and_categories_may_lack(tiny_run: TinyRun) -> None:
    rows = _worker(tiny_run, concept="{caption}", category_column="nosuch").understand([0, 1, 2])
    assert [row["distractors"] for row in rows] == [RANDOM] * 3
    assert {row["pixel_baseline_correct"] for row in rows} == {None}, "no training image has such a caption"
    table = pa.table({name: [row[name] for row in rows] for name in rows[0]})
    found = _understanding_rows("sde", table, EvaluateConfig())
    assert {(row["model"], row["role"], row["metric"], row["qualifier"]) for row in found} == {
        ("sde", "ours", "accuracy", "random"),
        ("teacher", "ceiling", "accuracy", "random"),
    }


def test_texts_that_the_model_cannot_read_whole_are_cut_and_told_apart(tiny_run: TinyRun) -> None:
    long = "a page of words <|soi|> " * 400
    assert [row["text_cut"] for row in _worker(tiny_run).understand([0, 1])] == [False] * 4
    assert [row["text_cut"] for row in _worker(tiny_run, question=long).understand([0])] == [True] * 2
    assert [row["text_cut"] for row in _worker(tiny_run, prompt=long + "{caption}").generate([0])] == [True]
    assert tiny_run.results["evaluate"].manifest.metrics["num_cut"] == 0
    assert tiny_run.results["sft"].manifest.metadata["max_tokens"] == tiny_run.recipe.pretrain.llm.max_positions


def test_rows_without_a_category_get_no_questions_within_it(tiny_run: TinyRun) -> None:
    worker = _worker(tiny_run)
    worker.concepts.categories[1] = ""
    asked = [(row["key"], row["distractors"]) for row in worker.understand([0, 1])]
    keys = worker.rows.keys
    assert asked == [(keys[0], RANDOM), (keys[1], RANDOM), (keys[0], SAME_CATEGORY)]


def test_a_held_out_image_without_codes_is_left_out_of_the_evaluation(tiny_run: TinyRun) -> None:
    whole, partly = _worker(tiny_run), _worker(tiny_run)
    keys = whole.rows.keys
    kept = [*range(3), *range(4, len(keys))]
    without = CodedRows(
        whole.rows.info,
        [keys[at] for at in kept],
        {name: [values[at] for at in kept] for name, values in whole.rows.columns.items()},
        whole.rows.codes[kept],
    )
    partly.__dict__["rows"] = without
    assert partly.images.keys == without.keys
    assert torch.equal(partly.images.pixels([2, 3]), whole.images.pixels([2, 4]))
    (row,), (same,) = partly.reconstruct([3]), whole.reconstruct([4])
    assert all(row[name] == same[name] for name in ("key", "caption", "original", "reconstruction", "psnr"))
    partly.__dict__.pop("images")
    partly.rows.keys[0] = "of another download"
    with pytest.raises(ValueError, match="lacks 1 held-out images of the code table"):
        _ = partly.images


def test_a_row_that_kills_its_worker_is_found_and_left_out(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_run.results["evaluate"]
    store = tiny_run.store_before("evaluate", tmp_path / "store")
    shard = "understanding-0000000"
    answers = read_table(tiny_run.store.fetch(plain.manifest.file("answers.parquet"))).to_pylist()
    poison = answers[1]["key"]
    for number in range(2):  # as if two workers had died of it already
        store.objects.put(f"marks/{plain.action_key}/{shard}/dead{number}.json", b"{}")
    monkeypatch.setenv("TEST_POISON", f"understanding:{poison}")
    monkeypatch.setattr("stages.evaluate.stage.TaskFactory", PoisonableTaskFactory)
    recipe = tiny_run.recipe.model_copy(
        update={"evaluate": tiny_run.recipe.evaluate.model_copy(update={"max_failed_fraction": 0.9})}
    )
    found = run_stage("evaluate", recipe, store, LocalExecutor()).manifest
    assert found.metrics["num_failed"] == 1
    (left_out,) = read_table(store.fetch(found.file("left_out.parquet"))).to_pylist()
    assert left_out == {
        "task": "understanding",
        "key": poison,
        "status": CRASHED,
        "error": "InputCrashed: the evaluation worker's process died of this row",
    }
    others = read_table(store.fetch(found.file("answers.parquet"))).to_pylist()
    assert others == [row for row in answers if row["key"] != poison], "no other answer changes, nor their order"
