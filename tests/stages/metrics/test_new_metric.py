"""A new metric is a function and an entry in the catalogue; all that shows metrics shows it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flows.cli import _metrics_text
from flows.report.comparison import Comparison, Run
from flows.report.data import benchmarks_of
from models.metrics.measures import IMAGE_PAIR_METRICS, ImagePairMetric
from stages.metrics.catalogue import CATALOGUE, Metric
from stages.metrics.reconstructions import ReconstructionMeasures, reconstruction_rows
from stages.metrics.rows import RowMaker


def mae(pixels: Tensor, references: Tensor) -> Tensor:
    return (pixels.float() - references.float()).abs().mean((1, 2, 3))


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The new metric's row, of a tokenizer that draws each image a little lighter."""
    monkeypatch.setitem(IMAGE_PAIR_METRICS, "mae", ImagePairMetric(mae, {"rule": "mean over images"}))  # type: ignore[arg-type]
    entry = Metric("mae", "Mean absolute error.", unit="levels", direction="lower", form=".1f", columns={"": "MAE"})
    monkeypatch.setitem(CATALOGUE, "mae", entry)  # type: ignore[arg-type]
    pixels = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    tokenizer: Any = SimpleNamespace(decode=lambda _: (pixels + 6) / 127.5 - 1, target_features=lambda _: None)
    measures = ReconstructionMeasures(None, None, None, torch.device("cpu"), "fp32")
    columns = measures.measure(tokenizer, [0, 1], pixels, torch.zeros(2, 1, 1, 4, 4, dtype=torch.long)).columns
    rows = reconstruction_rows(RowMaker("sde", "reconstruction", "test", {}), columns, None, None)
    (found,) = [row for row in rows if row["metric"] == "mae"]
    return found


def test_it_is_measured_of_every_held_out_image(row: dict[str, Any]) -> None:
    assert (row["value"], row["num_samples"], row["settings"]) == (6.0, 2, {"rule": "mean over images"})


def test_report_comparison_and_results_show_it(row: dict[str, Any]) -> None:
    ((line,),) = [benchmark.lines for benchmark in benchmarks_of([row])]
    assert (line.value.text, line.direction, line.meaning) == ("6.0\u00a0levels", "lower", "Mean absolute error.")
    evaluation: Any = SimpleNamespace(digest="0" * 64)
    comparison = Comparison("mini", ["sde"], [0], [Run("sde", 0, evaluation, [row])])
    assert (comparison.header[-1], comparison.tables()[0][1][0][-1]) == ("MAE", "6.0")
    shown = _metrics_text([row])
    assert "mae" in shown and "levels" in shown and "lower" in shown
