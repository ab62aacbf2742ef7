"""Rows that are not wanted stay in the metadata with the reason; duplicates are decided by the list's order alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.executors import Item, WorkerFactory
from models.images import Limits
from stages.download.duplicates import EXACT, NEAR, near_duplicates
from stages.download.filters import FilterConfig, caption_problem, image_problem, script_fraction
from stages.download.image_facts import ImageFacts, Inspector
from stages.download.stage import STAGE, DownloadConfig
from stages.protocol import Outcome, StageContext
from storage.image_shards import read_image_shard
from storage.store import Store
from tests.helpers.misbehaving_server import encoded, png


class AnyOrder:
    """An executor whose workers finish in an order of their own."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def map(
        self, factory: WorkerFactory, items: list[Item], *, num_workers: int, num_gpus: float = 0
    ) -> Iterator[Item]:
        worker = factory()
        for item in self._random.sample(items, len(items)):
            yield worker(item)

    def close(self) -> None:
        pass


def run_download(
    folder: Path, images: list[bytes], captions: list[str] | None = None, seed: int = 0, **changes: Any
) -> tuple[list[dict[str, Any]], list[str], Outcome]:
    """Metadata rows, keys of the images that were kept, and the outcome."""
    folder.mkdir(exist_ok=True)
    table = {"image": pa.array(images, pa.binary()), "caption": captions or ["a picture"] * len(images)}
    pq.write_table(pa.table(table), folder / "given.parquet")
    config = DownloadConfig(
        files={"kind": "parquet", "path": str(folder / "given.parquet")}, **({"rows_per_shard": 2} | changes)
    )
    store, scratch = Store(str(folder / "store")), folder / "scratch"
    scratch.mkdir()
    context = StageContext(config, 0, {}, store, STAGE.action_key(config, 0, {}), AnyOrder(seed), scratch)
    outcome = STAGE.run(context)
    rows, keys = list[dict[str, Any]](), list[str]()
    for entry in outcome.files:
        if entry.path.startswith("metadata/"):
            rows += pq.read_table(store.fetch(entry)).to_pylist()
        else:
            keys += [sample.key for sample in read_image_shard(store.fetch(entry))]
    return rows, keys, outcome


def scene(seed: int, size: int = 160) -> Image.Image:
    """A smooth picture of its own for each seed."""
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("caption", "filters", "reason"),
    [
        ("  ab  ", {"min_caption_characters": 3}, "caption shorter than 3 characters"),
        ("abc", {"min_caption_characters": 3}, ""),
        ("abcd", {"max_caption_characters": 3}, "caption longer than 3 characters"),
        (" abc ", {"max_caption_characters": 3}, ""),
        ("ein Bild", {"caption_scripts": ("LATIN",)}, ""),
        ("картина", {"caption_scripts": ("LATIN",)}, "caption not in LATIN"),
        ("картина", {"caption_scripts": ("LATIN", "CYRILLIC")}, ""),
        ("图片 photo", {"caption_scripts": ("CJK",)}, "caption not in CJK"),
        ("图片 photo", {"caption_scripts": ("CJK",), "min_script_fraction": 0.2}, ""),
        ("ラーメン 々", {"caption_scripts": ("CJK", "KATAKANA"), "min_script_fraction": 1.0}, ""),
        ("ＡＢＣ ｶﾒﾗ", {"caption_scripts": ("LATIN", "KATAKANA"), "min_script_fraction": 1.0}, ""),
        ("2024 !!", {"caption_scripts": ("LATIN",)}, "caption not in LATIN"),
    ],
)
def test_captions_are_wanted_by_length_and_script(caption: str, filters: dict[str, Any], reason: str) -> None:
    assert caption_problem(caption, FilterConfig(**filters)) == reason
    assert caption_problem(caption, FilterConfig()) == ""


def test_script_fraction_counts_letters_only() -> None:
    assert script_fraction("ab, 12 вг!", ("LATIN",)) == 0.5
    assert script_fraction("日本のカメラ", ("CJK", "HIRAGANA", "KATAKANA")) == 1.0
    with pytest.raises(ValueError, match="LATIN"):
        FilterConfig(caption_scripts=("latin",))


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((64, 64), ""),
        ((192, 64), ""),
        ((63, 640), "shortest side below 64 pixels"),
        ((193, 64), "aspect ratio above 3"),
    ],
)
def test_images_are_wanted_by_shape_whichever_side_is_longer(size: tuple[int, int], reason: str) -> None:
    filters = FilterConfig(min_side=64, max_aspect_ratio=3)
    assert image_problem(*size, filters) == image_problem(*size[::-1], filters) == reason


def test_filtered_rows_keep_their_reason_and_are_counted_apart_from_failures(tmp_path: Path) -> None:
    images = [png("red"), png("blue", (9, 9)), png("green"), b"not an image", png("gray")]
    captions = ["a red one", "a small one", "no", "a broken one", "a gray one"]
    filters = FilterConfig(min_side=10, min_caption_characters=3)
    rows, keys, outcome = run_download(tmp_path, images, captions, filters=filters)
    assert [row["status"] for row in rows] == ["ok", "filtered", "filtered", "not_an_image", "ok"]
    assert [row["error"] for row in rows][1:3] == ["shortest side below 10 pixels", "caption shorter than 3 characters"]
    assert keys == [rows[0]["key"], rows[4]["key"]]
    metrics = outcome.metrics
    assert (metrics["num_ok"], metrics["num_filtered"], metrics["num_failed"]) == (2, 2, 1)
    assert metrics["filters"] == {"shortest side below 10 pixels": 1, "caption shorter than 3 characters": 1}
    assert outcome.metadata["splits"] == {"train": 2}


@pytest.mark.parametrize("seed", range(4))
def test_first_of_equal_images_in_the_list_stays_whoever_was_faster(tmp_path: Path, seed: int) -> None:
    images = [png(colour) for colour in ("red", "blue", "red", "green", "blue", "red", "gray")]
    rows, keys, outcome = run_download(tmp_path, images, seed=seed, filters=FilterConfig(exact_duplicates=True))
    assert [row["error"] for row in rows] == [None, None, EXACT, None, EXACT, EXACT, None]
    assert keys == [row["key"] for row in rows if row["status"] == "ok"]
    assert outcome.metrics["status"] == {"filtered": 3, "ok": 4}
    reference = run_download(tmp_path / "again", images, seed=0, filters=FilterConfig(exact_duplicates=True))[2]
    assert sorted(outcome.files, key=lambda e: e.path) == sorted(reference.files, key=lambda e: e.path)


def test_copies_that_were_scaled_or_recompressed_are_near_duplicates_and_others_are_not(tmp_path: Path) -> None:
    images = [
        encoded(scene(1)),
        encoded(scene(2)),
        encoded(scene(1), "JPEG", quality=60),
        encoded(scene(1, 90)),
        encoded(scene(3)),
        encoded(scene(1)),
    ]
    both = FilterConfig(exact_duplicates=True, near_duplicate_bits=4)
    rows, keys, _ = run_download(tmp_path, images, filters=both)
    assert [row["error"] for row in rows] == [None, None, NEAR, NEAR, None, EXACT]
    assert keys == [rows[index]["key"] for index in (0, 1, 4)]
    assert all(len(row["perceptual_hash"]) == 16 for row in rows)


def _hash(data: bytes) -> str:
    found = Inspector(Limits(), hashed=True)(data)
    assert isinstance(found, ImageFacts) and found.perceptual_hash
    return found.perceptual_hash


def test_image_is_hashed_as_it_is_seen() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(scene(5), "PNG", exif=exif)
    shown = scene(5).transpose(Image.Transpose.ROTATE_270)
    assert _hash(turned) == _hash(encoded(shown, "PNG"))


def flipped(value: int, bits: Sequence[int]) -> int:
    return value ^ sum(1 << int(bit) for bit in bits)


@pytest.mark.parametrize("max_bits", [0, 1, 3, 4, 8, 16, 30, 63])
def test_near_duplicates_are_those_of_the_slow_search(max_bits: int) -> None:
    rng = np.random.default_rng(max_bits)
    values = rng.integers(0, 2**64, 60, dtype=np.uint64).tolist()
    for _ in range(300):  # some of which are equal, and some near others that were left out
        values.append(flipped(values[rng.integers(len(values))], rng.choice(64, rng.integers(0, 12), replace=False)))
    values += [0, 2**64 - 1, 0, 1]
    kept: list[int] = []
    expected = []
    for value in values:
        expected.append(any((value ^ other).bit_count() <= max_bits for other in kept))
        if not expected[-1]:
            kept.append(value)
    assert near_duplicates(np.array(values, np.uint64), max_bits).tolist() == expected


def test_no_hashes_have_no_near_duplicates() -> None:
    assert near_duplicates(np.zeros(0, np.uint64), 4).tolist() == []


def test_filters_that_leave_no_image_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of 2 rows gave an image \(2 x .*loosen download\.filters"):
        run_download(tmp_path, [png("red", (9, 9)), png("blue", (9, 9))], filters={"min_side": 64})


def test_sixteen_bit_images_are_hashed_by_what_is_in_them() -> None:
    ramps = [np.linspace(300, 60_000, 64 * 64).reshape(64, 64).astype(np.uint16) for _ in range(2)]
    hashes = {_hash(encoded(Image.fromarray(ramp), "PNG")) for ramp in (ramps[0], ramps[1].T)}
    assert len(hashes) == 2
