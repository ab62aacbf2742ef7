"""What a comparison of tokenizers found: metric rows of every run, the papers' tables, pictures side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from flows.report_data import Picture, picture
from flows.text import text_table
from stages.execution import require_artifact
from stages.recipe import load_recipe
from storage.manifest import Manifest
from storage.store import Store
from storage.tables import read_table, write_table

BASELINE = "vqgan"
"""The kind that gaps are counted from."""
MAX_PICTURES = 16

COLUMNS: tuple[tuple[str, str, str, float, str], ...] = (
    ("understanding", "accuracy_same_category", "same category %", 100, ".1f"),
    ("understanding", "accuracy_random", "random %", 100, ".1f"),
    ("generation", "recognition", "drawing %", 100, ".1f"),
    ("reconstruction", "psnr", "PSNR dB", 1, ".2f"),
    ("reconstruction", "ssim", "SSIM", 1, ".3f"),
    ("reconstruction", "semantic_cosine", "cosine", 1, ".3f"),
    ("reconstruction", "codebook_usage", "codebook %", 100, ".0f"),
)
"""Benchmark, metric, heading, factor and format of each column."""

ABLATION = (("vqgan", "image only"), ("semantic", "semantic only"), ("sde", "both (SDE)"))
"""MUSE-VL's ablation table: kind and name of each row."""

PUBLISHED = {
    "same LLM and data": {"vqgan": "34.6", "sde": "60.8"},
    "ablation": {"vqgan": "43.1", "semantic": "62.7", "sde": "63.6"},
}
"""Mean of MMBench, SEED and MMStar in MUSE-VL's two tables (arXiv 2411.17762), printed beside ours: the order of kinds
compares, the numbers do not."""


def overrides_of(kind: str, seed: int, overrides: list[str]) -> list[str]:
    """The overrides of one run of a comparison."""
    return [*overrides, f"tokenizer.kind={kind}", f"seed={seed}"]


@dataclass(frozen=True)
class Run:
    """One trained and evaluated tokenizer."""

    kind: str
    seed: int
    evaluation: Manifest
    rows: list[dict[str, Any]]
    """Its metric rows."""

    def value(self, benchmark: str, metric: str) -> float | None:
        """A metric of this tokenizer itself, not of a baseline."""
        for row in self.rows:
            if (row["model"], row["benchmark"], row["metric"]) == (self.kind, benchmark, metric):
                return float(row["value"])
        return None


@dataclass(frozen=True)
class Comparison:
    """All runs of one recipe."""

    recipe: str
    kinds: list[str]
    seeds: list[int]
    runs: list[Run]

    def values(self, kind: str, benchmark: str, metric: str) -> list[float]:
        """One value a seed, in the order of the seeds; empty where the kind has no such metric."""
        found = [run.value(benchmark, metric) for run in self.runs if run.kind == kind]
        return [value for value in found if value is not None]

    @property
    def header(self) -> list[str]:
        """Headings of both tables."""
        return ["tokenizer", *(column[2] for column in COLUMNS), f"over {BASELINE}", "published: mean of 3 benchmarks"]

    def main_table(self) -> list[list[str]]:
        """Every kind with the same language model, data and steps."""
        return [self._line(kind, kind, "same LLM and data") for kind in self.kinds]

    def ablation_table(self) -> list[list[str]]:
        """Image branch, semantic branch and both; empty unless all three were compared."""
        if not {kind for kind, _ in ABLATION} <= set(self.kinds):
            return []
        return [self._line(kind, name, "ablation") for kind, name in ABLATION]

    def _line(self, kind: str, name: str, table: str) -> list[str]:
        cells = [
            spread([factor * value for value in self.values(kind, benchmark, metric)], form)
            for benchmark, metric, _, factor, form in COLUMNS
        ]
        return [name, *cells, self._gap(kind), PUBLISHED[table].get(kind, "")]

    def _gap(self, kind: str) -> str:
        """Same-category points over the baseline, seed by seed."""
        if kind == BASELINE or BASELINE not in self.kinds:
            return ""
        benchmark, metric = COLUMNS[0][:2]
        pairs = zip(self.values(kind, benchmark, metric), self.values(BASELINE, benchmark, metric), strict=True)
        return spread([100 * (own - other) for own, other in pairs], "+.1f")

    def text(self) -> str:
        """Both tables for a terminal."""
        seeds = ", ".join(map(str, self.seeds))
        about = "mean and standard deviation over the seeds" if len(self.seeds) > 1 else "one seed"
        parts = [
            f"recipe {self.recipe}, seeds {seeds}: {about}; accuracies and pictures are of the held-out pairs",
            "same language model, data and steps\n" + text_table(self.header, self.main_table()),
        ]
        ablation = self.ablation_table()
        if ablation:
            parts.append("image branch, semantic branch\n" + text_table(self.header, ablation))
        return "\n\n".join(parts)

    def save(self, path: Path) -> None:
        """Write every metric row of every run as Parquet, with kind, seed and the evaluation's digest."""
        rows = [
            {"kind": run.kind, "seed": run.seed, "evaluation": run.evaluation.digest, **row}
            for run in self.runs
            for row in run.rows
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(pa.Table.from_pylist(rows), path)


def spread(values: Sequence[float], form: str) -> str:
    """A mean, and with several values their standard deviation; '-' without any."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form.removeprefix('+')}}"


def collect_comparison(
    recipe: str, kinds: list[str], seeds: list[int], overrides: list[str], store: Store
) -> Comparison:
    """Read the runs of a comparison from the store.

    Raises:
        MissingInput: a run is not there.
    """
    runs = []
    for seed in seeds:
        for kind in kinds:
            loaded = load_recipe(recipe, overrides_of(kind, seed, overrides))
            evaluation = require_artifact("evaluate", loaded, store, needed_by="the comparison")
            rows = read_table(store.fetch(evaluation.file("metrics.parquet"))).to_pylist()
            runs.append(Run(kind, seed, evaluation, rows))
    return Comparison(load_recipe(recipe, overrides).name, kinds, seeds, runs)


@dataclass(frozen=True)
class SideBySide:
    """One held-out image and what each kind's codes draw of it."""

    caption: str
    original: Picture
    drawn: list[tuple[str, Picture, float]]
    """Kind, reconstruction and its PSNR in dB."""


def side_by_side(comparison: Comparison, store: Store) -> list[SideBySide]:
    """Evenly spaced held-out images with the reconstructions of the first seed's tokenizers."""
    first = [run for run in comparison.runs if run.seed == comparison.seeds[0]]
    tables = [read_table(store.fetch(run.evaluation.file("reconstructions.parquet"))) for run in first]
    count = len(tables[0])
    chosen = sorted({index * count // MAX_PICTURES for index in range(MAX_PICTURES)})
    found = []
    for index in chosen:
        rows = [table.slice(index, 1).to_pylist()[0] for table in tables]
        drawn = [
            (run.kind, picture(row["reconstruction"]), float(row["psnr"])) for run, row in zip(first, rows, strict=True)
        ]
        found.append(SideBySide(rows[0]["caption"], picture(rows[0]["original"]), drawn))
    return found
