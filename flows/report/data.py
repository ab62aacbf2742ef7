"""What the report shows, read from artifacts and run records into plain values."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from flows.report.code_pictures import CodeStrip, code_strips
from models.images import decode_image
from stages.artifacts.shards import METADATA
from stages.metrics.catalogue import HELD_OUT_CURVE, direction_of, find_metric, full_name, text_of
from storage.manifest import Manifest
from storage.store import Store
from storage.tables import BASELINE, OURS, read_metrics, read_table

MAX_SHOWN = 24
"""Most reconstructions, prompts and questions on the page; evenly spaced ones where there are more."""

TRAINED_STAGES = ("prepare_teacher", "train_tokenizer", "pretrain", "sft")
SHORT_DIGEST = 12
CHANCE = "chance"
"""The setting of a metric row that says what guessing would score; shown as a baseline."""


@dataclass(frozen=True)
class Picture:
    """An image embedded in the page."""

    uri: str
    """A `data:` URI."""
    width: int
    """Width in pixels."""
    height: int
    """Height in pixels."""

    @property
    def small(self) -> bool:
        """Whether the page enlarges the image, so that its pixels should stay sharp."""
        return max(self.width, self.height) < 128


@dataclass(frozen=True)
class Value:
    """One measured number."""

    model: str
    role: str
    text: str
    """The number as shown."""
    interval: str
    """Its confidence interval as shown, or ''."""
    position: float
    """Position on the row's scale in percent, as `low` and `high` are for the interval's ends."""
    low: float | None
    high: float | None


@dataclass(frozen=True)
class MetricLine:
    """One metric of one benchmark: our value and those of baselines, ceilings and papers."""

    metric: str
    """Name with qualifier, from `full_name`."""
    split: str
    value: Value
    beside: list[Value]
    num_samples: int | None
    settings: dict[str, Any]

    @property
    def direction(self) -> str:
        """Which values are better, or ''."""
        return direction_of(self.metric)

    @property
    def meaning(self) -> str:
        """The catalogue's description of the metric."""
        metric = find_metric(self.metric)
        return "" if metric is None else metric.meaning


@dataclass(frozen=True)
class Benchmark:
    """The metrics of one benchmark."""

    name: str
    lines: list[MetricLine]


@dataclass(frozen=True)
class Choice:
    """One possible answer."""

    text: str
    picked: bool
    right: bool
    share: float | None
    """Its softmax over the log-likelihoods, percent."""


@dataclass(frozen=True)
class Samples:
    """Some rows of a table with pictures."""

    rows: list[dict[str, Any]]
    total: int
    num_right: int | None = None
    """Number of correct ones among all `total` rows, not only among those shown."""


@dataclass(frozen=True)
class Curve:
    """One logged value over the steps of a training."""

    name: str
    steps: list[int]
    values: list[float]

    @property
    def last(self) -> str:
        """The last value with its unit."""
        return text_of(self.name.removeprefix(HELD_OUT_CURVE), self.values[-1])


@dataclass(frozen=True)
class StageLine:
    """One stage: its artifact and the run that made it."""

    name: str
    digest: str
    """Digest of the artifact; empty if there is none."""
    kind: str
    size: int
    """Size of the artifact in bytes."""
    num_files: int
    inputs: dict[str, str]
    made: dict[str, Any] | None
    """The record of the run that made the artifact; None if the store has none."""
    num_hits: int
    """Number of runs that found the artifact in the store."""
    numbers: dict[str, str]
    """The artifact's own metrics, flattened."""

    @property
    def short(self) -> str:
        """The first digits of the digest."""
        return self.digest[:SHORT_DIGEST]

    @property
    def how(self) -> str:
        """Short text: in which time the artifact was made, and how often it was found."""
        if not self.digest:
            return ""
        if self.made is None:
            return "found in the store"
        again = f", found {self.num_hits}×" if self.num_hits else ""
        return f"made in {duration(float(self.made.get('seconds', 0)))}{again}"

    @property
    def long_texts(self) -> str:
        """Numbers of rows whose text was too long for the language model; empty if there are none."""
        counts = {"cut": self.numbers.get("num_cut", "0"), "left out": self.numbers.get("num_left_out", "0")}
        return ", ".join(f"{count} rows with too long text {how}" for how, count in counts.items() if count != "0")

    @property
    def machine(self) -> str:
        """Description of the machine that made the artifact."""
        machine = (self.made or {}).get("machine", {})
        parts = [f"{machine['cores']} cores"] if machine.get("cores") else []
        parts += [str(machine[key]) for key in ("accelerator", "system") if machine.get(key)]
        parts += [f"Python {machine['python']}"] if machine.get("python") else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything on the page."""

    recipe: str
    description: str
    seed: int
    written: str
    stages: list[StageLine]
    benchmarks: list[Benchmark] | None
    """None here and in the fields below means that the artifact is missing."""
    reconstructions: Samples | None
    drawings: Samples | None
    answers: Samples | None
    codes: list[tuple[CodeStrip, Picture]] | None
    """Some codes and the patches that carry them."""
    curves: dict[str, list[Curve] | None]
    """Curves by stage; an empty list if nothing was trained, for example with a published teacher."""
    download: dict[str, Any] | None
    """Metrics of the download artifact."""
    uses_sample_data: bool
    """Whether the images are the sample data; the page then names their authors."""

    @property
    def made_seconds(self) -> float:
        """Total time of the runs that made the artifacts, in seconds, as far as the store has their records."""
        return sum(float(stage.made.get("seconds", 0)) for stage in self.stages if stage.made)


def collect(
    *,
    recipe: str,
    description: str,
    seed: int,
    written: str,
    artifacts: Mapping[str, Manifest | None],
    inputs: Mapping[str, Sequence[str]],
    store: Store,
) -> ReportData:
    """Read everything that the page shows.

    Args:
        recipe: name of the recipe.
        description: of the recipe, one line.
        seed: of the recipe.
        written: when the page is written, as shown.
        artifacts: of every stage in pipeline order; None where there is none.
        inputs: names of the stages that feed each stage.
        store: that holds the artifacts.

    Raises:
        StoreError: a file of an artifact is missing or damaged.
    """
    runs = store.runs()
    evaluation = artifacts.get("evaluate")
    download, table = artifacts.get("download"), artifacts.get("tokenize")
    return ReportData(
        recipe=recipe,
        description=description,
        seed=seed,
        written=written,
        stages=[_stage_line(name, artifact, inputs.get(name, ()), runs) for name, artifact in artifacts.items()],
        benchmarks=None
        if evaluation is None
        else benchmarks_of(read_metrics(store.fetch(evaluation.file("metrics.parquet")))),
        reconstructions=None if evaluation is None else _reconstructions(store, evaluation),
        drawings=None if evaluation is None else _drawings(store, evaluation),
        answers=None if evaluation is None else _answers(store, evaluation),
        codes=None if table is None or download is None else strips_of(store, table, download),
        curves={
            name: None if artifact is None else _curves(store, artifact)
            for name in TRAINED_STAGES
            if name in artifacts
            for artifact in [artifacts[name]]
        },
        download=None if download is None else download.metrics,
        uses_sample_data=download is not None and _uses_sample_data(store, download),
    )


def benchmarks_of(rows: Sequence[dict[str, Any]]) -> list[Benchmark]:
    """Group the rows of a metrics table by benchmark, in its order, with baselines and ceilings beside ours.

    Rows with different settings have lines of their own. The accuracy of guessing (`chance` in the settings) is shown
    as a baseline. If a metric has no row of ours, each of its rows has a line.
    """
    by_benchmark: dict[str, dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for row in rows:
        groups = by_benchmark.setdefault(row["benchmark"], {})
        groups.setdefault((full_name(row["metric"], row["qualifier"]), row["split"]), []).append(row)
    return [
        Benchmark(name, [line for (metric, _), group in groups.items() for line in _metric_lines(metric, group)])
        for name, groups in by_benchmark.items()
    ]


def _metric_lines(metric: str, group: list[dict[str, Any]]) -> list[MetricLine]:
    low, high = _scale(metric, group)

    def percent(value: float | None) -> float | None:
        if value is None or not math.isfinite(value):
            return None
        return round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 2)

    def shown(row: dict[str, Any]) -> Value:
        ends = [row["ci_low"], row["ci_high"]]
        has_interval = all(end is not None for end in ends)
        interval = " – ".join(text_of(metric, end) for end in ends) if has_interval else ""
        text, position = text_of(metric, row["value"]), percent(row["value"]) or 0.0
        return Value(row["model"], row["role"], text, interval, position, percent(ends[0]), percent(ends[1]))

    ours = [row for row in group if row["role"] == OURS]
    others = [shown(row) for row in group if row["role"] != OURS] if ours else []
    lines = []
    for row in ours or group:
        chance = row["settings"].get(CHANCE)
        beside = others
        if isinstance(chance, (int, float)) and all(value.model != CHANCE for value in others):
            guess = {"model": CHANCE, "role": BASELINE, "value": chance, "ci_low": None, "ci_high": None}
            beside = [shown(guess), *others]
        lines.append(MetricLine(metric, row["split"], shown(row), beside, row["num_samples"], row["settings"]))
    return lines


def _scale(metric: str, group: list[dict[str, Any]]) -> tuple[float, float]:
    numbers = [row[key] for row in group for key in ("value", "ci_low", "ci_high") if row[key] is not None]
    numbers = [number for number in numbers if math.isfinite(number)] or [0.0]
    found = find_metric(metric)
    if found is not None and found.unit == "%" and min(numbers) >= 0 and max(numbers) <= 1:
        return 0.0, 1.0
    low, high = min(0.0, *numbers), max(0.0, *numbers)
    return low, low + ((high - low) * 1.1 or 1.0)


def duration(seconds: float) -> str:
    """Format seconds with a suitable unit."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def picture(data: bytes) -> Picture:
    """Embed an encoded image."""
    image = decode_image(data)
    kind = {"jpg": "jpeg"}.get(image.extension, image.extension)
    return Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", image.width, image.height)


def strips_of(store: Store, table: Manifest, download: Manifest) -> list[tuple[CodeStrip, Picture]]:
    """Return some codes of a table with the patches that carry them."""
    return [(strip, picture(strip.png)) for strip in code_strips(store, table, download)]


def _table(store: Store, manifest: Manifest, path: str) -> pa.Table | None:
    """Read a table of the evaluation; None if its task was not evaluated."""
    entry = next((entry for entry in manifest.files if entry.path == path), None)
    return None if entry is None else read_table(store.fetch(entry))


def _uses_sample_data(store: Store, download: Manifest) -> bool:
    for entry in download.files_under(METADATA)[:1]:
        urls = read_table(store.fetch(entry), ["url"])["url"]
        return any(url.startswith("sample://") for url in urls.to_pylist())
    return False


def _spaced(count: int) -> list[int]:
    shown = min(count, MAX_SHOWN)
    return [index * count // shown for index in range(shown)]


def _reconstructions(store: Store, evaluation: Manifest) -> Samples | None:
    table = _table(store, evaluation, "reconstructions.parquet")
    if table is None:
        return None
    rows = [
        row | {"original": picture(row["original"]), "reconstruction": picture(row["reconstruction"])}
        for row in table.take(_spaced(len(table))).to_pylist()
    ]
    return Samples(rows, len(table))


def _drawings(store: Store, evaluation: Manifest) -> Samples | None:
    """Return one entry per prompt, with its held-out image and all its generated images."""
    table = _table(store, evaluation, "drawings.parquet")
    if table is None:
        return None
    indices: dict[str, list[int]] = {}
    for index, prompt in enumerate(table["prompt"].to_pylist()):
        indices.setdefault(prompt, []).append(index)
    prompts = list(indices)
    entries = []
    for prompt in [prompts[position] for position in _spaced(len(prompts))]:
        rows = table.take(indices[prompt]).to_pylist()
        reference = rows[0]["reference"]
        drawn = [
            {
                "image": picture(row["image"]),
                "correct": row["correct"],
                "recognised": row["choices"][row["picked"]],
            }
            for row in rows
        ]
        entries.append(
            {
                "prompt": prompt,
                "concept": rows[0]["concept"],
                "reference": picture(reference) if reference else None,
                "num_choices": len(rows[0]["choices"]),
                "drawings": drawn,
            }
        )
    return Samples(entries, len(table), _num_right(table))


def _answers(store: Store, evaluation: Manifest) -> Samples | None:
    table = _table(store, evaluation, "answers.parquet")
    if table is None:
        return None
    rows = [
        row | {"image": picture(row["image"]), "choices": _choices(row)}
        for row in table.take(_spaced(len(table))).to_pylist()
    ]
    return Samples(rows, len(table), _num_right(table))


def _choices(row: dict[str, Any]) -> list[Choice]:
    scores = row["log_likelihoods"] or []
    shares: list[float | None] = [None] * len(row["choices"])
    if len(scores) == len(shares) and all(math.isfinite(score) for score in scores):
        weights = [math.exp(score - max(scores)) for score in scores]
        shares = [100 * weight / sum(weights) for weight in weights]
    return [
        Choice(text, index == row["picked"], index == row["answer"], share)
        for index, (text, share) in enumerate(zip(row["choices"], shares, strict=True))
    ]


def _num_right(table: pa.Table) -> int:
    return sum(bool(correct) for correct in table["correct"].to_pylist())


def _curves(store: Store, artifact: Manifest) -> list[Curve]:
    table = _table(store, artifact, "history.parquet")
    if table is None:
        return []
    curves: dict[str, Curve] = {}
    for row in table.sort_by("step").to_pylist():
        curve = curves.setdefault(row["name"], Curve(row["name"], [], []))
        curve.steps.append(row["step"])
        curve.values.append(row["value"])
    return [
        curves[name]
        for name in sorted(curves, key=lambda name: (name != "loss", name.startswith(HELD_OUT_CURVE), name))
    ]


def _stage_line(name: str, artifact: Manifest | None, inputs: Sequence[str], runs: list[dict[str, Any]]) -> StageLine:
    if artifact is None:
        return StageLine(name, "", "", 0, 0, dict.fromkeys(inputs, ""), None, 0, {})
    digest = artifact.digest
    records = [run for run in runs if run.get("stage") == name and run.get("artifact") == digest]
    made = next((run for run in records if run.get("hit") is False), None)
    return StageLine(
        name,
        digest,
        artifact.kind,
        artifact.size,
        len(artifact.files),
        dict(artifact.inputs),
        made,
        sum(run.get("hit") is True for run in records),
        dict(_flat(artifact.metrics)),
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            flat.append((prefix + name, text_of(name, value)))
        elif isinstance(value, (int, str)):
            flat.append((prefix + name, str(value)))
    return flat
