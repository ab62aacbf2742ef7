"""One catalogue of metrics: what is recorded is in it, and tables and documents are written from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stages.metrics.catalogue import CATALOGUE, find_metric, markdown_table, metric_of, text_of
from stages.metrics.rows import RowMaker, artifact_metrics
from storage.tables import metrics_table, read_metrics, read_table, write_table
from tests.helpers.tiny import ROOT, TinyRun


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("accuracy", 0.5, "50.0\u00a0%"),
        ("accuracy.same_category", 0.123, "12.3\u00a0%"),
        ("psnr", 21.234, "21.23\u00a0dB"),
        ("rfid", 1234.5, "1,234.50"),
        ("lpips", 0.12345, "0.1235"),
        ("loss", 1.5e-5, "1.5e-05"),
        ("codebook_perplexity.pixel.depth2", float("nan"), "nan"),
        ("codebook_usage.semantic", 0.987, "98.7\u00a0%"),
        ("someones_own_loss", 0.0003, "0.0003"),
    ],
)
def test_numbers_are_shown_with_their_unit(name: str, value: float, text: str) -> None:
    assert text_of(name, value) == text


def test_a_row_of_an_unknown_metric_is_refused() -> None:
    make = RowMaker("sde", "reconstruction", "test", {})
    with pytest.raises(ValueError, match=r"no metric 'psrn' in stages/metrics/catalogue\.py; add it there"):
        make.number("psrn", 1.0, 1)
    with pytest.raises(ValueError, match="'psnr' has no qualifier"):
        make.number("psnr", 1.0, 1, "semantic")


def test_all_that_the_stages_record_is_in_the_catalogue(tiny_run: TinyRun) -> None:
    for result in tiny_run.results.values():
        for name in _recorded(result.manifest.metrics):
            assert find_metric(name) is not None, f"{result.stage}: metric {name}"
        for entry in result.manifest.files_under("history.parquet"):
            for name in set(read_table(tiny_run.store.fetch(entry))["name"].to_pylist()):
                assert find_metric(name.removeprefix("held_out_")) is not None, f"{result.stage}: curve {name}"
    entry = tiny_run.results["evaluate"].manifest.file("metrics.parquet")
    assert {row["metric"] for row in read_metrics(tiny_run.store.fetch(entry))} <= set(CATALOGUE)


def _recorded(metrics: dict[str, Any]) -> list[str]:
    """Names of metrics: what is no metric groups them, as a benchmark or a model does."""
    names: list[str] = []
    for name, value in metrics.items():
        if isinstance(value, dict) and name not in CATALOGUE:
            names += _recorded(value)
        else:
            names.append(name)
    return names


def test_a_name_has_no_room_for_a_qualifier() -> None:
    assert not [name for name in CATALOGUE if "." in name or name != CATALOGUE[name].name]
    assert all(metric.qualifier or set(metric.columns) <= {""} for metric in CATALOGUE.values())
    assert metric_of("codebook_usage") is find_metric("codebook_usage.pixel.depth1")


def test_the_others_stand_below_their_model_among_an_artifacts_metrics() -> None:
    make = RowMaker("sde", "zero_shot", "test", {})
    rows = [
        maker.share("zero_shot_accuracy", correct, "top1")
        for maker, correct in ((make, [True, False]), (make.of("teacher", "ceiling"), [True]))
    ]
    assert artifact_metrics(rows) == {
        "zero_shot": {"zero_shot_accuracy.top1": 0.5},
        "teacher": {"zero_shot": {"zero_shot_accuracy.top1": 1.0}},
    }


def test_the_table_of_metrics_in_the_documents_is_the_catalogue() -> None:
    shown = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert markdown_table() in shown, "replace the table in docs/metrics.md by what markdown_table() returns"


def test_the_query_in_the_documents_finds_our_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import duckdb

    make = RowMaker("sde", "reconstruction", "test", {"format": "PNG"})
    rows = [maker.mean("psnr", [20.0, 22.0]) for maker in (make, make.of("another", "published"))]
    write_table(metrics_table(rows), tmp_path / "evaluation/metrics.parquet")
    monkeypatch.chdir(tmp_path)
    _, query, *_ = re.split(r"```(?:sql)?\n", (ROOT / "docs/metrics.md").read_text(encoding="utf-8"))
    ((metric, qualifier, value, *_),) = duckdb.sql(query).fetchall()
    assert (metric, qualifier, value) == ("psnr", "", 21.0)
