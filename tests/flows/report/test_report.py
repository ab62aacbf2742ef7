"""The report is checked as a reader would: written from artifacts in a real store and opened in a browser."""

from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageFilter

from flows.report.data import MAX_SHOWN, MetricLine, benchmarks_of, collect
from flows.report.page import render_page, write_page
from infra.sample_data import archive_path
from stages.metrics.catalogue import CATALOGUE, Metric
from storage.code_table import CodeTableInfo, write_code_shard
from storage.digests import sha256_bytes
from storage.image_shards import ImageSample, write_image_shard
from storage.manifest import FileEntry, Manifest
from storage.store import Store
from storage.tables import image_metadata_table, metrics_table, write_table

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
INPUTS: dict[str, tuple[str, ...]] = {
    "download": (),
    "prepare_teacher": ("download",),
    "train_tokenizer": ("download", "prepare_teacher"),
    "tokenize": ("download", "train_tokenizer"),
    "pretrain": ("tokenize", "train_tokenizer"),
    "sft": ("pretrain", "tokenize"),
    "evaluate": ("download", "prepare_teacher", "train_tokenizer", "sft"),
}
TABLES = {
    "answers.parquet": pa.schema(
        [
            ("key", pa.string()),
            ("image", pa.binary()),
            ("question", pa.string()),
            ("choices", pa.list_(pa.string())),
            ("answer", pa.int32()),
            ("picked", pa.int32()),
            ("correct", pa.bool_()),
            ("distractors", pa.string()),
            ("log_likelihoods", pa.list_(pa.float64())),
        ]
    ),
    "drawings.parquet": pa.schema(
        [
            ("prompt", pa.string()),
            ("image", pa.binary()),
            ("concept", pa.string()),
            ("choices", pa.list_(pa.string())),
            ("picked", pa.int32()),
            ("correct", pa.bool_()),
            ("reference", pa.binary()),
        ]
    ),
    "reconstructions.parquet": pa.schema(
        [
            ("key", pa.string()),
            ("original", pa.binary()),
            ("reconstruction", pa.binary()),
            ("psnr", pa.float64()),
            ("caption", pa.string()),
        ]
    ),
    "history.parquet": pa.schema([("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())]),
}


@dataclass
class Bench:
    """A store with synthetic artifacts."""

    store: Store
    folder: Path
    artifacts: dict[str, Manifest | None] = field(default_factory=lambda: dict.fromkeys(INPUTS))

    def put(self, path: str, table: pa.Table) -> FileEntry:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_table(table, self.folder / path)
        return self.store.put_file(self.folder / path, path)

    def put_rows(self, path: str, rows: list[dict[str, Any]]) -> FileEntry:
        return self.put(path, pa.Table.from_pylist(rows, TABLES[path]))

    def sample_urls(self) -> FileEntry:
        row = {"key": "000000000", "url": "sample://noto/1f600", "status": "ok"}
        return self.put("metadata/00000.parquet", image_metadata_table([row]))

    def images(self, emoji: list[tuple[str, bytes]]) -> FileEntry:
        samples = [
            ImageSample(f"{row:05d}", data, "png", f"emoji {row % 4} of many", {})
            for row, (_, data) in enumerate(emoji)
        ]
        write_image_shard(self.folder / "00000.tar", samples)
        return self.store.put_file(self.folder / "00000.tar", "images/00000.tar")

    def codes(self, count: int) -> FileEntry:
        """Two books; in the first, code k stands in the images whose number ends in k, modulo 4."""
        info = CodeTableInfo((2, 1, 4, 4), ("semantic", "pixel"), (8, 8), "0" * 64, {"image_size": 64})
        table = np.zeros((count, 2, 1, 4, 4), np.int64)
        table[:, 0] = (np.arange(count) % 4)[:, None, None, None]
        columns: dict[str, list[str | None]] = {
            "text": [f"emoji {row % 4} of many" for row in range(count)],
            "view": ["original"] * count,
        }
        path = self.folder / "codes.parquet"
        write_code_shard(path, info, [f"{row:05d}" for row in range(count)], columns, table)
        return self.store.put_file(path, "codes/00000.parquet")

    def commit(
        self, stage: str, kind: str, files: list[FileEntry], metrics: dict[str, Any], *, key: str | None = None
    ) -> None:
        feeders = {name: made.digest for name in INPUTS[stage] if (made := self.artifacts[name]) is not None}
        manifest = Manifest(kind, 1, stage, {}, feeders, tuple(files), metrics, {})
        action_key = key or sha256_bytes(stage.encode())
        self.store.commit(action_key, manifest)
        self.artifacts[stage] = manifest
        for hit, seconds in ((False, 12.5 * (len(stage) - 2)), (True, 0.02)):
            self.store.record_run(
                {
                    "stage": stage,
                    "artifact": manifest.digest,
                    "hit": hit,
                    "seconds": seconds,
                    "finished": "2026-03-01T10:00:00+00:00",
                    "machine": {"cores": 2, "python": "3.11.7", "system": "Linux"},
                }
            )

    def page(self) -> str:
        return render_page(self.data())

    def data(self, description: str = "A small run.") -> Any:
        return collect(
            recipe="mini",
            description=description,
            seed=7,
            written="2026-03-01 10:00 UTC",
            artifacts=self.artifacts,
            inputs=INPUTS,
            store=self.store,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """An empty store."""
    (tmp_path / "work").mkdir()
    return Bench(Store(str(tmp_path / "store")), tmp_path / "work")


def _download_metrics(status: dict[str, int], errors: dict[str, int]) -> dict[str, Any]:
    counts = {"num_rows": sum(status.values()), "num_ok": status.get("ok", 0)}
    return counts | {"status": status, "errors": errors, "filters": {}, "hosts": {}}


@pytest.fixture
def full_bench(bench: Bench) -> Bench:
    """A store with an artifact of every stage."""
    emoji = _emoji(40)
    errors = {"http_error: HTTP 404": 21, "timeout: connection timed out": 9, "undecodable: cannot decode image": 4}
    status = {"ok": 960, "http_error": 21, "timeout": 9, "undecodable": 4, "filtered": 6}
    metadata = {"num_rows": 1000, "num_ok": 960, "status": status, "errors": errors}
    metadata |= {"filters": {"shorter side below 64 px": 6}, "hosts": {"rotten.example": {"rows": 40, "failed": 34}}}
    files = [bench.images(emoji), bench.sample_urls()]
    bench.commit("download", "image_shards", files, metadata)
    bench.commit("prepare_teacher", "teacher", [bench.store.put_bytes(b"w", "teacher.safetensors")], {"accuracy": 0.71})
    for stage, names in {
        "train_tokenizer": ["loss", "l2", "perceptual", "semantic_cosine", "held_out_psnr"],
        "tokenize": [],
        "pretrain": ["loss", "image_loss", "text_loss", "learning_rate"],
        "sft": ["loss", "image_loss", "text_loss", "held_out_accuracy"],
    }.items():
        rows = [row for name in names for row in _history(name)]
        files = [bench.put_rows("history.parquet", rows)] if rows else [bench.codes(len(emoji))]
        bench.commit(stage, {"train_tokenizer": "tokenizer", "tokenize": "code_table"}.get(stage, "vlm"), files, {})
    metrics = metrics_table(_metric_rows())
    files = [
        bench.put("metrics.parquet", metrics),
        bench.store.put_bytes(json.dumps(metrics.to_pylist()).encode(), "metrics.json"),
        bench.put_rows("reconstructions.parquet", _reconstruction_rows(emoji)),
        bench.put_rows("answers.parquet", _answer_rows(emoji)),
        bench.put_rows("drawings.parquet", _drawing_rows(emoji)),
    ]
    bench.commit("evaluate", "evaluation", files, {})
    return bench


def test_page_of_an_empty_store_names_the_command_that_makes_each_missing_artifact(bench: Bench) -> None:
    page = bench.page()
    for stage in ("download", "train_tokenizer", "pretrain", "sft", "evaluate"):
        assert f"musevl stage {stage} --recipe mini" in page


def test_page_shows_every_metric_with_its_baselines_beside_it(full_bench: Bench) -> None:
    benchmarks = {benchmark.name: benchmark.lines for benchmark in full_bench.data().benchmarks}
    (line,) = [line for line in benchmarks["multiple_choice"] if line.metric == "accuracy.same_category"]
    assert line.value.text == "64.5\u00a0%"
    assert line.value.interval == "58.0\u00a0% – 71.0\u00a0%"
    assert [(value.model, value.text) for value in line.beside] == [
        ("chance", "25.0\u00a0%"),
        ("text only", "31.2\u00a0%"),
    ]
    shown = sum(1 + len(line.beside) for lines in benchmarks.values() for line in lines)
    assert shown == len(_metric_rows())


def test_codes_are_shown_with_the_word_that_they_say_most_about(full_bench: Bench) -> None:
    strips = [strip for strip, _ in full_bench.data().codes if strip.book == "semantic"]
    assert sorted((strip.code, strip.word, strip.share, strip.base) for strip in strips) == [
        (code, str(code), 1.0, 0.25) for code in range(4)
    ]
    (pixel,) = [strip for strip, _ in full_bench.data().codes if strip.book == "pixel"]
    assert (pixel.num_images, pixel.word) == (40, ""), "a code that is everywhere says nothing"
    assert "What a code stands for" in full_bench.page()


def test_counts_cover_all_rows_and_pictures_only_some(full_bench: Bench) -> None:
    answers = full_bench.data().answers
    rows = _answer_rows(_emoji(40))
    assert answers.total == len(rows) > MAX_SHOWN == len(answers.rows)
    assert answers.num_right == sum(row["correct"] for row in rows)


def test_shares_of_choices_are_the_softmax_of_their_likelihoods(full_bench: Bench) -> None:
    row = full_bench.data().answers.rows[0]
    expected = [math.exp(score) for score in row["log_likelihoods"]]
    for choice, weight in zip(row["choices"], expected, strict=True):
        assert choice.share == pytest.approx(100 * weight / sum(expected))


def test_text_from_data_is_escaped(bench: Bench) -> None:
    bench.commit("download", "image_shards", [], _download_metrics({"<b>": 1}, {"<i>x": 1}))
    page = render_page(bench.data(description="<script>alert(1)</script>"))
    assert "<script" not in page
    assert "&lt;i&gt;x" in page


def test_filters_and_hosts_of_the_download_are_shown(full_bench: Bench) -> None:
    page = full_bench.page()
    assert "shorter side below 64 px" in page
    assert "rotten.example" in page


def test_rows_that_no_stage_uses_and_texts_that_were_too_long_are_shown(bench: Bench) -> None:
    splits = {"splits": {"train": 4, "<val>": 3}, "num_in_unused_splits": 3}
    bench.commit("download", "image_shards", [], _download_metrics({"ok": 7}, {}) | splits)
    bench.commit("pretrain", "vlm", [], {"loss": 1.0, "num_rows": 7, "num_cut": 2, "num_left_out": 0})
    bench.commit("sft", "vlm", [], {"loss": 1.0, "num_rows": 7, "num_cut": 0, "num_left_out": 5})
    page = bench.page()
    assert "3 images are in splits other than" in page and "&lt;val&gt;" in page
    assert "2 rows with too long text cut" in page and "5 rows with too long text left out" in page


def test_a_caption_of_a_whole_page_is_shown_by_its_beginning(bench: Bench) -> None:
    emoji, long = _emoji(2), "words without end " * 5000
    drawn = [
        row | {"prompt": long, "concept": long, "choices": [long] * 2, "picked": 0} for row in _drawing_rows(emoji)
    ]
    asked = [row | {"question": long, "choices": [long] * 4} for row in _answer_rows(emoji)]
    files = [
        bench.put("metrics.parquet", metrics_table(_metric_rows()[:1])),
        bench.put_rows("reconstructions.parquet", [row | {"caption": long} for row in _reconstruction_rows(emoji)]),
        bench.put_rows("drawings.parquet", drawn),
        bench.put_rows("answers.parquet", asked),
    ]
    bench.commit("evaluate", "evaluation", files, {})
    page = bench.page()
    assert "words without end words" in page and "words without end " * 20 not in page


def test_same_artifacts_give_the_same_page(full_bench: Bench) -> None:
    assert full_bench.page() == full_bench.page()


def test_evaluation_of_one_part_only_says_what_it_lacks(bench: Bench) -> None:
    files = [bench.put("metrics.parquet", metrics_table(_metric_rows()[:1]))]
    bench.commit("evaluate", "evaluation", files, {})
    page = bench.page()
    assert "The evaluation drew nothing." in page
    assert "The evaluation asked nothing." in page


def test_others_are_shown_beside_ours_whatever_their_names(bench: Bench) -> None:
    rows = [
        _metric("vqgan", "reconstruction", "psnr", 22.0, role="published") | {"num_samples": None},
        _metric("chance teacher", "reconstruction", "psnr", 21.0),
    ]
    (line,) = _lines(rows)
    assert (line.value.model, [(value.role, value.model) for value in line.beside]) == (
        "chance teacher",
        [("published", "vqgan")],
    )
    assert len(_lines(rows[:1])) == 1, "without a row of ours the other has a line"


def test_a_metric_is_shown_as_its_catalogue_entry_says(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    new = Metric("mae", "Mean absolute error of <pixels>.", unit="levels", direction="lower", form=".1f")
    monkeypatch.setitem(CATALOGUE, "mae", new)  # type: ignore[arg-type]
    files = [bench.put("metrics.parquet", metrics_table([_metric("sde", "reconstruction", "mae", 3.25)]))]
    bench.commit("evaluate", "evaluation", files, {})
    page = bench.page()
    assert "3.2\u00a0levels" in page and "↓ lower is better" in page
    assert 'title="Mean absolute error of &lt;pixels&gt;."' in page


def test_chance_in_the_settings_is_a_baseline() -> None:
    row = _metric("sde", "understanding", "accuracy", 0.5, qualifier="random")
    (line,) = _lines([row | {"settings": {"chance": 0.25}}])
    assert line.metric == "accuracy.random"
    assert [(value.model, value.text, value.position) for value in line.beside] == [("chance", "25.0\u00a0%", 25.0)]


def test_page_opens_in_a_browser_without_errors_requests_or_sideways_scrolling(
    full_bench: Bench, tmp_path: Path, browser: Any
) -> None:
    path = write_page(render_page(full_bench.data()), tmp_path / "report")
    problems: list[str] = []
    requests: list[str] = []
    for width, scheme in ((1280, "light"), (400, "dark")):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        broken = "images => images.filter(i => !i.complete || i.naturalWidth === 0).length"
        assert page.locator("img").count() > 80
        assert page.locator("img").evaluate_all(broken) == 0
        assert page.locator("figure.curve svg").count() == 13
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=tmp_path / f"report-{width}.png", full_page=True)
        page.close()
    assert problems == []
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}
    assert [url for url in requests if url.startswith("file:")] == [path.as_uri()] * 2


def test_report_of_a_recipe_finds_its_artifacts_in_the_store(bench: Bench, tmp_path: Path) -> None:
    from flows.report.report import write_report
    from stages.pipeline.recipe import STAGES, load_recipe

    recipe = load_recipe("mini")
    stage = STAGES["download"]
    key = stage.action_key(recipe.section(stage), recipe.seed, {})
    metrics = _download_metrics({"ok": 4, "failed": 1}, {"HTTP 418": 1})
    bench.commit("download", "image_shards", [bench.sample_urls()], metrics, key=key)
    page = write_report(recipe, bench.store, tmp_path / "report").read_text(encoding="utf-8")
    assert "HTTP 418" in page
    assert "musevl stage evaluate --recipe mini" in page
    assert "OpenMoji" in page


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium of the machine."""
    executable = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if executable is None:
        pytest.skip("no Chromium; run infra/install-browser.sh")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # it has its own allocator
        chromium = playwright.chromium.launch(executable_path=executable, args=BROWSER_ARGUMENTS, env=plain)
        yield chromium
        chromium.close()


def _emoji(count: int) -> list[tuple[str, bytes]]:
    """Some sample images as PNG, with names."""
    with zipfile.ZipFile(archive_path("noto")) as archive:
        names = sorted(archive.namelist())
        chosen = names[:: len(names) // count][:count]
        return [(f"thing {index}", _png(Image.open(archive.open(name)))) for index, name in enumerate(chosen)]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _blurred(data: bytes, radius: float) -> bytes:
    return _png(Image.open(io.BytesIO(data)).filter(ImageFilter.GaussianBlur(radius)))


def _history(name: str) -> list[dict[str, Any]]:
    source = random.Random(name)
    rising = name.startswith(("held_out", "semantic"))
    steps = range(0, 1000, 100) if name.startswith("held_out") else range(1000)
    scale = 20.0 if "psnr" in name else 1.0
    values = [1 - math.exp(-step / 300) if rising else 5 * math.exp(-step / 200) + 0.4 for step in steps]
    return [
        {"step": step, "name": name, "value": scale * value * (1 + source.gauss(0, 0.05))}
        for step, value in zip(steps, values, strict=True)
    ]


def _lines(rows: list[dict[str, Any]]) -> list[MetricLine]:
    spelled = [row | {"settings": dict(row["settings"])} for row in rows]
    return [line for benchmark in benchmarks_of(spelled) for line in benchmark.lines]


def _metric(
    model: str,
    benchmark: str,
    metric: str,
    value: float,
    *,
    role: str = "ours",
    qualifier: str = "",
    split: str = "test",
    half: float | None = None,
) -> dict[str, Any]:
    low, high = (None, None) if half is None else (value - half, value + half)
    settings = {"image_size": 64, "interpolation": "bicubic", "reference_set": "held-out images"}
    row = {"model": model, "role": role, "benchmark": benchmark, "split": split, "metric": metric}
    row |= {"qualifier": qualifier, "value": value, "ci_low": low, "ci_high": high}
    return row | {"num_samples": 400, "settings": settings}


def _metric_rows() -> list[dict[str, Any]]:
    choice, drawing = "multiple_choice", "generation"
    return [
        _metric("mini", choice, "accuracy", 0.875, qualifier="random", half=0.04),
        _metric("chance", choice, "accuracy", 0.25, role="baseline", qualifier="random"),
        _metric("mini", choice, "accuracy", 0.645, qualifier="same_category", half=0.065),
        _metric("chance", choice, "accuracy", 0.25, role="baseline", qualifier="same_category"),
        _metric("text only", choice, "accuracy", 0.312, role="baseline", qualifier="same_category", half=0.05),
        _metric("mini", drawing, "recognition", 0.61, half=0.06),
        _metric("chance", drawing, "recognition", 0.125, role="baseline"),
        _metric("real images", drawing, "recognition", 0.93, role="ceiling", half=0.03),
        _metric("mini", drawing, "frechet_teacher", 38.2),
        _metric("real images", drawing, "frechet_teacher", 9.7, role="ceiling"),
        _metric("mini", "reconstruction", "psnr", 20.71, half=0.4),
        _metric("mean_image", "reconstruction", "psnr", 9.12, role="baseline"),
        _metric("mini", "reconstruction", "ssim", 0.712, half=0.01),
        _metric("mini", "reconstruction", "codebook_usage", 0.99),
    ]


def _reconstruction_rows(emoji: list[tuple[str, bytes]]) -> list[dict[str, Any]]:
    return [
        {
            "key": f"{index:05d}",
            "original": data,
            "reconstruction": _blurred(data, 1.2),
            "psnr": 18.0 + index / 7,
            "caption": f"a {name} in noto style",
        }
        for index, (name, data) in enumerate(emoji)
    ]


def _answer_rows(emoji: list[tuple[str, bytes]]) -> list[dict[str, Any]]:
    source = random.Random(3)
    rows = []
    for index, (name, data) in enumerate(emoji):
        choices = [name, *(f"other thing {index + offset}" for offset in (1, 2, 3))]
        source.shuffle(choices)
        scores = [-source.uniform(1, 4) - (0 if choice == name else 1) for choice in choices]
        picked, answer = scores.index(max(scores)), choices.index(name)
        rows.append(
            {
                "key": f"{index:05d}",
                "image": data,
                "question": "What is in this picture?",
                "choices": choices,
                "answer": answer,
                "picked": picked,
                "correct": picked == answer,
                "distractors": "random" if index % 2 else "same_category",
                "log_likelihoods": scores,
            }
        )
    return rows


def _drawing_rows(emoji: list[tuple[str, bytes]]) -> list[dict[str, Any]]:
    rows = []
    for index, (name, data) in enumerate(emoji[:18]):
        picked = int(index % 4 == 3)
        rows.append(
            {
                "prompt": f"a {name} in noto style",
                "image": _blurred(data, 1.6),
                "concept": name,
                "choices": [name, "a quite different thing"],
                "picked": picked,
                "correct": picked == 0,
                "reference": data,
            }
        )
    return rows
