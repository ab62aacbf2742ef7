"""Results of a comparison of tokenizers: metric rows of every run, the papers' tables, pictures side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from flows.report.code_pictures import CodeStrip
from flows.report.data import Picture, picture, strips_of
from flows.report.published import ABLATIONS, ALL_KINDS, PapersTable
from flows.text import text_table
from stages.metrics.catalogue import CATALOGUE, Metric, metric_of
from stages.pipeline.execution import require_artifact
from stages.pipeline.recipe import load_recipe
from storage.manifest import Manifest
from storage.store import Store
from storage.tables import OURS, metrics_table, read_metrics, read_table, write_table

BASELINE = "vqgan"
"""The kind whose values are subtracted in the column of gaps."""
MAX_PICTURES = 16

Column = tuple[str, str, str]
"""Benchmark, metric and qualifier of a column of the tables."""
FIRST: Column = ("understanding", "accuracy", "same_category")
"""The first column, of which the gaps are shown."""

VARIANTS: dict[str, tuple[str, ...]] = {
    "sde-image": ("tokenizer.kind=sde", "tokenizer.semantic_branch=false", "tokenizer.loss.pooled_weight=0"),
    "dualtoken-deep": ("tokenizer.kind=dualtoken", "tokenizer.pixel_layers=[]", "tokenizer.pixel_layer_weights=[]"),
    "dualtoken-reconstruction": (
        "tokenizer.kind=dualtoken",
        "tokenizer.semantic_book=false",
        "tokenizer.loss.pooled_weight=0",
    ),
}
"""What may stand among the kinds beside the values of `tokenizer.kind`, and what it sets: the papers' ablations."""


EXTERNAL = "external="
"""`external=FOLDER` stands for the codes of another project's tokenizer."""


def overrides_of(kind: str, seed: int, overrides: list[str]) -> list[str]:
    """Return the overrides of one run of a comparison."""
    settings = VARIANTS.get(kind, (f"tokenizer.kind={kind}",))
    if kind.startswith(EXTERNAL):
        settings = ("tokenizer.kind=external", f"tokenizer.codes={kind.removeprefix(EXTERNAL)}")
    return [*overrides, *settings, f"seed={seed}"]


def column_of(row: dict[str, Any]) -> Column:
    """Return the column of a metric row."""
    return row["benchmark"], row["metric"], row["qualifier"]


@dataclass(frozen=True)
class Run:
    """One trained and evaluated tokenizer."""

    kind: str
    """Value of `tokenizer.kind`, or a name of `VARIANTS`."""
    seed: int
    evaluation: Manifest
    rows: list[dict[str, Any]]
    """Its metric rows."""

    def value(self, column: Column) -> float | None:
        """Return a metric of this tokenizer itself, not of a baseline; None if it was not measured."""
        for row in self.rows:
            if row["role"] == OURS and column_of(row) == column:
                return float(row["value"])
        return None


@dataclass(frozen=True)
class Comparison:
    """All runs of one recipe."""

    recipe: str
    kinds: list[str]
    seeds: list[int]
    runs: list[Run]

    def values(self, kind: str, column: Column) -> list[float]:
        """Return one value per seed, in the order of the seeds; empty if the kind has no such metric."""
        found = [run.value(column) for run in self.runs if run.kind == kind]
        return [value for value in found if value is not None]

    @property
    def first_runs(self) -> list[Run]:
        """The runs of the first seed, from which pictures are taken."""
        return [run for run in self.runs if run.seed == self.seeds[0]]

    @property
    def columns(self) -> list[Column]:
        """The first column, then one for each metric that has a heading in the catalogue and was measured in a run."""
        measured = {column_of(row) for run in self.runs for row in run.rows if row["role"] == OURS}
        return [FIRST] + [
            (benchmark, metric.name, qualifier)
            for metric in CATALOGUE.values()
            for qualifier in metric.columns
            for benchmark in sorted({benchmark for benchmark, *_ in measured})
            if (benchmark, metric.name, qualifier) in measured - {FIRST}
        ]

    @property
    def header(self) -> list[str]:
        """Headings of all tables."""
        first, *others = (metric_of(metric).columns[qualifier] for _, metric, qualifier in self.columns)
        return ["tokenizer", first, f"over {BASELINE}", "published", *others]

    @property
    def papers_tables(self) -> list[PapersTable]:
        """The papers' tables whose rows were all compared; the first is of all kinds."""
        return [ALL_KINDS, *(table for table in ABLATIONS if set(table.names) <= set(self.kinds))]

    def tables(self) -> list[tuple[str, list[list[str]]]]:
        """Return title and lines of each table: all kinds, then each ablation whose rows were all compared."""
        found = []
        for table in self.papers_tables:
            names = {kind: kind for kind in self.kinds} if table is ALL_KINDS else table.names
            lines = [self._line(kind, name, table.published(kind)) for kind, name in names.items()]
            found.append((table.title, lines))
        return found

    def _line(self, kind: str, name: str, published: str) -> list[str]:
        first, *others = [spread(self.values(kind, column), metric_of(column[1])) for column in self.columns]
        return [name, first, self._gap(kind), published, *others]

    def _gap(self, kind: str) -> str:
        """Return the gap to the baseline in the first column, computed for each seed."""
        if kind == BASELINE or BASELINE not in self.kinds:
            return ""
        pairs = zip(self.values(kind, FIRST), self.values(BASELINE, FIRST), strict=True)
        return spread([own - other for own, other in pairs], metric_of(FIRST[1]), "+")

    def text(self) -> str:
        """Return all tables as text for a terminal."""
        seeds = ", ".join(map(str, self.seeds))
        about = "mean and standard deviation over the seeds" if len(self.seeds) > 1 else "one seed"
        parts = [f"recipe {self.recipe}, seeds {seeds}: {about}; accuracies and pictures are of the held-out pairs"]
        parts += [f"{title}\n{text_table(self.header, lines)}" for title, lines in self.tables()]
        return "\n\n".join(parts)

    def save(self, path: Path) -> None:
        """Write every metric row of every run as Parquet, with kind, seed and the evaluation's digest.

        The papers' rows follow, without seed and evaluation.
        """
        parts = [_labelled(run.rows, run.kind, run.seed, run.evaluation.digest) for run in self.runs]
        parts += [_labelled([row], row["model"], None, None) for table in self.papers_tables for row in table.rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(pa.concat_tables(parts), path)


_LABELS = pa.schema([("kind", pa.string()), ("seed", pa.int64()), ("evaluation", pa.string())])


def _labelled(rows: list[dict[str, Any]], *labels: str | int | None) -> pa.Table:
    """Return a table of metric rows with the columns that a comparison adds."""
    table = metrics_table(rows)
    columns = [pa.array([label] * len(rows), field.type) for label, field in zip(labels, _LABELS, strict=True)]
    return pa.table([*columns, *table.columns], pa.schema([*_LABELS, *table.schema]))


def spread(values: Sequence[float], metric: Metric, sign: str = "") -> str:
    """Format the mean of a metric's values, and the standard deviation of several values; '-' for no value.

    Args:
        values: The values of the seeds.
        metric: The metric, for its format.
        sign: `+` if the values are differences.
    """
    if not values:
        return "-"
    mean = metric.number(statistics.fmean(values), sign)
    return mean if len(values) == 1 else f"{mean} ± {metric.number(statistics.stdev(values))}"


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
            rows = read_metrics(store.fetch(evaluation.file("metrics.parquet")))
            runs.append(Run(kind, seed, evaluation, rows))
    return Comparison(load_recipe(recipe, overrides).name, kinds, seeds, runs)


@dataclass(frozen=True)
class SideBySide:
    """One held-out image and its reconstructions by each kind."""

    caption: str
    original: Picture
    drawn: list[tuple[str, Picture, float]]
    """Kind, reconstruction and its PSNR in dB."""


def code_pages(comparison: Comparison, store: Store) -> list[tuple[str, list[tuple[CodeStrip, Picture]]]]:
    """Return for each kind the patches of some codes of the first seed's tokenizer."""
    return [
        (run.kind, strips_of(store, *(store.load(run.evaluation.inputs[name]) for name in ("tokenize", "download"))))
        for run in comparison.first_runs
    ]


def side_by_side(comparison: Comparison, store: Store) -> list[SideBySide]:
    """Return evenly spaced held-out images with the reconstructions of the first seed's tokenizers."""
    first = [run for run in comparison.first_runs if not run.kind.startswith(EXTERNAL)]  # nothing decodes given codes
    if not first:
        return []
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
