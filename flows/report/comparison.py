"""What a comparison of tokenizers found: metric rows of every run, the papers' tables, pictures side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from flows.report.code_pictures import CodeStrip
from flows.report.data import Picture, picture, strips_of
from flows.text import text_table
from stages.metrics.measuring import FRECHET_TEACHER, RFID
from stages.pipeline.execution import require_artifact
from stages.pipeline.recipe import load_recipe
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
    ("zero_shot", "accuracy_top1", "zero-shot %", 100, ".1f"),
    ("reconstruction", "psnr", "PSNR dB", 1, ".2f"),
    ("reconstruction", "ssim", "SSIM", 1, ".3f"),
    ("reconstruction", RFID, "rFID", 1, ".2f"),
    ("reconstruction", FRECHET_TEACHER, "Fréchet, teacher", 1, ".3f"),
    ("reconstruction", "semantic_cosine", "cosine", 1, ".3f"),
    ("reconstruction", "codebook_usage", "codebook %", 100, ".0f"),
    ("reconstruction", "bits_per_image", "bits an image", 1, ",.0f"),
)
"""Benchmark, metric, heading, factor and format of each column."""
_ONE_OF_TWO = {RFID, FRECHET_TEACHER}
"""Shown where they were measured: which of them depends on whether Inception's weights were given."""

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


@dataclass(frozen=True)
class Ablation:
    """A paper's table that is printed where all its rows were compared."""

    title: str
    rows: tuple[tuple[str, str, str], ...]
    """Kind, name of the row, published value."""


ABLATIONS = (
    Ablation(
        "image branch, semantic branch (MUSE-VL; published: mean of MMBench, SEED and MMStar)",
        (("sde-image", "image only", "43.1"), ("semantic", "semantic only", "62.7"), ("sde", "both (SDE)", "63.6")),
    ),
    Ablation(
        "where the two losses stand (DualToken; published: zero-shot accuracy, rFID)",
        (
            ("dualtoken-deep", "both deep", "72.3, 3.86"),
            ("dualtoken-reconstruction", "reconstruction only", "-, 0.29"),
            ("dualtoken", "split layers", "82.0, 0.25"),
        ),
    ),
)
"""Sources: arXiv 2411.17762 and arXiv 2503.14324. The order of the rows compares with ours, the numbers do not."""

PUBLISHED = {"vqgan": "34.6", "sde": "60.8"}
"""Mean of MMBench, SEED and MMStar with one language model and data (arXiv 2411.17762), beside our main table."""


def overrides_of(kind: str, seed: int, overrides: list[str]) -> list[str]:
    """The overrides of one run of a comparison."""
    settings = VARIANTS.get(kind, (f"tokenizer.kind={kind}",))
    if kind.startswith(EXTERNAL):
        settings = ("tokenizer.kind=external", f"tokenizer.codes={kind.removeprefix(EXTERNAL)}")
    return [*overrides, *settings, f"seed={seed}"]


def model_of(kind: str) -> str:
    """What the metric rows of a kind call it: the value of `tokenizer.kind`."""
    return "external" if kind.startswith(EXTERNAL) else kind.split("-")[0]


@dataclass(frozen=True)
class Run:
    """One trained and evaluated tokenizer."""

    kind: str
    """Value of `tokenizer.kind`, or a name of `VARIANTS`."""
    seed: int
    evaluation: Manifest
    rows: list[dict[str, Any]]
    """Its metric rows."""

    def value(self, benchmark: str, metric: str) -> float | None:
        """A metric of this tokenizer itself, not of a baseline."""
        for row in self.rows:
            if (row["model"], row["benchmark"], row["metric"]) == (model_of(self.kind), benchmark, metric):
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
    def first_runs(self) -> list[Run]:
        """The runs of the first seed, from which pictures are taken."""
        return [run for run in self.runs if run.seed == self.seeds[0]]

    @property
    def columns(self) -> list[tuple[str, str, str, float, str]]:
        """Those of `COLUMNS` that this comparison shows."""
        return [
            column
            for column in COLUMNS
            if column[1] not in _ONE_OF_TWO or any(run.value(*column[:2]) is not None for run in self.runs)
        ]

    @property
    def header(self) -> list[str]:
        """Headings of all tables."""
        first, *others = (column[2] for column in self.columns)
        return ["tokenizer", first, f"over {BASELINE}", "published", *others]

    def tables(self) -> list[tuple[str, list[list[str]]]]:
        """Title and lines of each table: all kinds, then each ablation whose rows were all compared."""
        main = [self._line(kind, kind, PUBLISHED.get(kind, "")) for kind in self.kinds]
        title = "same language model, data and steps (published: MUSE-VL's mean of MMBench, SEED and MMStar)"
        found = [(title, main)]
        for ablation in ABLATIONS:
            if {kind for kind, _, _ in ablation.rows} <= set(self.kinds):
                found.append((ablation.title, [self._line(*row) for row in ablation.rows]))
        return found

    def _line(self, kind: str, name: str, published: str) -> list[str]:
        first, *others = [
            spread([factor * value for value in self.values(kind, benchmark, metric)], form)
            for benchmark, metric, _, factor, form in self.columns
        ]
        return [name, first, self._gap(kind), published, *others]

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
        parts = [f"recipe {self.recipe}, seeds {seeds}: {about}; accuracies and pictures are of the held-out pairs"]
        parts += [f"{title}\n{text_table(self.header, lines)}" for title, lines in self.tables()]
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


def code_pages(comparison: Comparison, store: Store) -> list[tuple[str, list[tuple[CodeStrip, Picture]]]]:
    """For each kind, the first seed's codes and the patches that carry them."""
    return [
        (run.kind, strips_of(store, *(store.load(run.evaluation.inputs[name]) for name in ("tokenize", "download"))))
        for run in comparison.first_runs
    ]


def side_by_side(comparison: Comparison, store: Store) -> list[SideBySide]:
    """Evenly spaced held-out images with the reconstructions of the first seed's tokenizers."""
    first = [run for run in comparison.first_runs if model_of(run.kind) != "external"]  # nothing decodes given codes
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
