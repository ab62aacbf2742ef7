"""Every image of a tar comes with its own text or with a reason, whoever wrote the tar and in whatever order."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from stages.download.sources.tar_samples import REPEATED, TarReader
from stages.download.stage import DownloadConfig, read_rows
from storage.image_shards import ImageSample, write_image_shard
from tests.helpers.given_files import CAPTIONS, IMAGES, run_download, tar_of, zstandard

RED, GREEN, BLUE = IMAGES
Members = Sequence[tuple[str, bytes | str]]


def download(folder: Path, path: Path | None = None, **config: Any) -> list[dict[str, Any]]:
    """The rows of the tars in a folder, each with its image."""
    files = {"kind": "webdataset", "path": str(path or folder)}
    rows, samples, _ = run_download(DownloadConfig(files=files, max_failed_fraction=1, **config), folder)
    images = {sample.key: sample.image for sample in samples}
    return [row | {"image": images.get(row["key"])} for row in rows]


def told(folder: Path, members: Members) -> list[tuple[Any, ...]]:
    """Name, caption and status of each row of a tar, and whose image it has."""
    folder.mkdir(exist_ok=True)
    (folder / "a.tar").write_bytes(tar_of(members))
    given = dict(zip(IMAGES, "RGB", strict=True))
    rows = download(folder)
    return [(row["url"].removeprefix("a.tar/"), row["caption"], given.get(row["image"], row["status"])) for row in rows]


NULL, OTHER = json.dumps({"caption": None, "url": "u"}), json.dumps({"caption": "of the json"})


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        pytest.param(
            [("1.png", RED), ("photo.v2.png", GREEN), ("photo.v2.txt", "g"), ("d.v1/3.png", BLUE), ("d.v1/3.txt", "b"),
             ("1.txt", "r")],
            [("1.png", "r", "R"), ("photo.v2.png", "g", "G"), ("d.v1/3.png", "b", "B")],
            id="dots in names",
        ),
        pytest.param(
            [("i.0001.png", RED), ("i.0001.txt", "r"), ("i.0002.png", GREEN), ("i.0002.txt", "g"), ("i.png", BLUE),
             ("i.txt", "b")],
            [("i.0001.png", "r", "R"), ("i.0002.png", "g", "G"), ("i.png", "b", "B")],
            id="the same before the first dot",
        ),
        pytest.param(
            [("i.0001.png", RED), ("i.0003.txt", "other"), ("i.0002.png", GREEN), ("i.0002.txt", "g")],
            [("i.0001.png", "", "no_caption"), ("i.0003", "other", "missing"), ("i.0002.png", "g", "G")],
            id="the text of another image",
        ),
        pytest.param(
            [("i.0001.png", RED), ("i.0003.txt", "other"), ("2.png", GREEN), ("2.txt", "g")],
            [("i.0001.png", "", "no_caption"), ("i.0003", "other", "missing"), ("2.png", "g", "G")],
            id="one image and the text of another",
        ),
        pytest.param(
            [("i.0001.png", RED), ("i.0001.caption.txt", "r"), ("i.0002.png", GREEN), ("i.0002.caption.txt", "g")],
            [("i.0001.png", "r", "R"), ("i.0002.png", "g", "G")],
            id="a dot before the suffix of the text",
        ),
        pytest.param(
            [("9.input.png", RED), ("9.outputs.txt", "r"), ("8.image.png", GREEN), ("8.json", OTHER)],
            [("9.input.png", "r", "R"), ("8.image.png", "of the json", "G")],
            id="suffixes of two parts",
        ),
        pytest.param(
            [("1.mask.png", BLUE), ("1.png", RED), ("1.txt", "r"), ("2.left.png", GREEN), ("2.right.png", BLUE),
             ("2.txt", "g")],
            [("1.png", "r", "R"), ("2.left.png", "g", "G")],
            id="several images",
        ),
        pytest.param(
            [("1.png", RED), ("2.png", GREEN), ("3.png", BLUE), ("3.txt", "b"), ("1.txt", "r"), ("2.txt", "g")],
            [("1.png", "r", "R"), ("2.png", "g", "G"), ("3.png", "b", "B")],
            id="members that do not follow each other",
        ),
        pytest.param(
            [("1.png", RED), ("1.txt", "r"), ("1.png", BLUE), ("1.txt", "b")],
            [("1.png", "r", "R"), ("1.png", "b", "B")],
            id="a name twice",
        ),
        pytest.param(
            [("1.png", RED), ("1.txt", "r"), ("1.png", BLUE), ("2.png", GREEN), ("2.txt", "g"), ("2.txt", "x"),
             ("3.png", BLUE), ("3.txt", "b")],
            [("1.png", "r", "no_caption"), ("1.png", "", "no_caption"), ("2.png", "g", "no_caption"),
             ("3.png", "b", "B")],
            id="a name twice and no telling which is which",
        ),
        pytest.param(
            [("1.JPG", RED), ("1.TXT", "r"), ("2.png", GREEN), ("2.JSON", OTHER), ("./3.png", BLUE), ("3.txt", "b")],
            [("1.JPG", "r", "R"), ("2.png", "of the json", "G"), ("3.png", "b", "B")],
            id="case of suffixes",
        ),
        pytest.param(
            [("IMG_1.JPG", RED), ("img_1.txt", "r"), ("caf\u00e9.png", GREEN), ("cafe\u0301.txt", "g")],
            [("IMG_1.JPG", "r", "R"), ("caf\u00e9.png", "g", "G")],
            id="case of names and accents",
        ),
        pytest.param(
            [("A.png", RED), ("a.png", GREEN), ("a.txt", "g"), ("B.png", BLUE), ("b.png", BLUE), ("\u00df.txt", "x")],
            [("A.png", "", "no_caption"), ("a.png", "g", "G"), ("B.png", "", "no_caption"),
             ("b.png", "", "no_caption"), ("\u00df", "x", "missing")],
            id="names that differ in case alone",
        ),
        pytest.param(
            [("1.img", RED), ("1.txt", "r"), ("2.bin", GREEN), ("2.json", OTHER), ("3", BLUE), ("3.txt", "b")],
            [("1.img", "r", "R"), ("2.bin", "of the json", "G"), ("3", "b", "B")],
            id="suffixes that say nothing",
        ),
        pytest.param(
            [("1.cls", "3"), ("1.bin", b"no image"), ("1.png", RED), ("1.txt", "r"), ("2.mp4", b"x"), ("2.txt", "g")],
            [("1.png", "r", "R"), ("2.mp4", "g", "not_an_image")],
            id="members of other kinds",
        ),
        pytest.param(
            [("1.png", RED), ("1.cap", "r"), ("2.png", GREEN), ("2.caption", "g"), ("3.png", BLUE), ("3.text", "b")],
            [("1.png", "r", "R"), ("2.png", "g", "G"), ("3.png", "b", "B")],
            id="other suffixes of texts",
        ),
        pytest.param(
            [("1.png", RED), ("1.json", NULL), ("1.txt", "r"), ("2.png", GREEN), ("2.txt", "g"), ("2.json", NULL),
             ("3.png", BLUE), ("3.txt", "of the txt"), ("3.json", OTHER)],
            [("1.png", "r", "R"), ("2.png", "g", "G"), ("3.png", "of the json", "B")],
            id="no caption in the json",
        ),
        pytest.param(
            [("1.png", RED), ("2.png", GREEN), ("2.txt", " \n"), ("3.png", BLUE), ("3.json", NULL), ("4.png", RED),
             ("4.txt", "\u200b"), ("5.png", RED), ("5.txt", ""), ("5.caption", "r\n")],
            [("1.png", "", "no_caption"), ("2.png", "", "no_caption"), ("3.png", "", "no_caption"),
             ("4.png", "", "no_caption"), ("5.png", "r", "R")],
            id="no text",
        ),
        pytest.param(
            [("__MACOSX/._1.png", RED), (".DS_Store", b"x"), ("._1.txt", "x"), ("1.png", RED), ("1.txt", "r")],
            [("1.png", "r", "R")],
            id="what macOS leaves",
        ),
    ],
)  # fmt: skip
def test_an_image_of_a_tar_has_its_own_text_or_none(tmp_path: Path, members: Members, expected: list[Any]) -> None:
    assert told(tmp_path / "given", members) == expected


def test_the_reason_of_a_row_without_text_is_the_one_that_holds(tmp_path: Path) -> None:
    members = [("1.png", RED), ("1.txt", "r"), ("1.txt", "x"), ("2.png", RED), ("3.png", RED), ("3.txt", "")]
    (tmp_path / "a.tar").write_bytes(tar_of([*members, ("4.png", RED), ("4.txt", "good")]))
    errors = [row["error"] for row in download(tmp_path)]
    assert errors == [REPEATED, "no text beside the image", "the caption is empty", None]


def test_members_that_are_not_used_are_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [("1.png", RED), ("1.txt", "r"), ("1.cls", "3"), ("1.mask.png", BLUE), ("._1.png", b"x"), ("x.npy", b"x")]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    (tmp_path / "a.parquet").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert len(download(tmp_path)) == 1
    assert f"WebDataset {tmp_path}: left out 4 members that are neither an image nor its text: a.tar/" in caplog.text
    assert f"WebDataset {tmp_path}: left out 1 files that are no tars: a.parquet" in caplog.text


SAMPLE = [("1.png", RED), ("1.txt", "r"), ("2.png", GREEN), ("2.txt", "g")]


@pytest.mark.parametrize(
    ("name", "compress"),
    [("b.tar.gz", gzip.compress), ("b.tgz", gzip.compress), ("b.tar.bz2", bz2.compress), ("b.tar.xz", lzma.compress),
     ("b.tar", gzip.compress), ("b.TAR", bytes)],
)  # fmt: skip
def test_compressed_tars_are_read_beside_plain_ones(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(SAMPLE))
    (tmp_path / name).write_bytes(compress(tar_of(SAMPLE)))
    rows = download(tmp_path, rows_per_shard=3)
    assert [row["url"] for row in rows] == ["a.tar/1.png", "a.tar/2.png", f"{name}/1.png", f"{name}/2.png"]
    assert [row["image"] for row in rows] == [RED, GREEN, RED, GREEN]


WHOLE = tar_of(SAMPLE)
THIRD = 512 * (2 + -(-len(RED) // 512) + 1)
"""Where the third member begins."""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (WHOLE[:THIRD], "its end is missing: it is cut off"),
        (WHOLE[: THIRD + 100], "a damaged header|cut off"),
        (WHOLE[: THIRD + 520], "unexpected end of data"),
        (WHOLE[:THIRD] + b"x" * 512 + WHOLE[THIRD + 512 :], "a damaged header"),
        (WHOLE + WHOLE, "more follows after its end: are these several tars in one file"),
        (b"", "empty file"),
        (gzip.compress(WHOLE)[:-40], "a.tar is not readable as tar"),
        (zstandard(WHOLE), "compressed with Zstandard: unpack it"),
        (b"PK\x03\x04" + WHOLE, "it is a ZIP; unpack it"),
    ],
)
def test_a_tar_that_is_not_whole_is_never_taken_for_a_shorter_one(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "b.tar").write_bytes(WHOLE)
    with pytest.raises(ValueError, match=message) as raised:
        read_rows(DownloadConfig(files={"kind": "webdataset", "path": str(tmp_path)}))
    assert "a.tar is not readable as tar" in str(raised.value)


def test_captions_of_an_exported_shard_come_back(tmp_path: Path) -> None:
    samples = [ImageSample(str(at), image, "png", CAPTIONS[at], {}) for at, image in enumerate(IMAGES)]
    write_image_shard(tmp_path / "a.tar", samples)
    assert [row["caption"] for row in download(tmp_path)] == CAPTIONS


def test_of_a_tar_no_image_and_no_unwanted_field_is_kept_in_memory() -> None:
    junk = json.dumps({"caption": "c", "junk": "x" * 20_000})
    members: list[tuple[str, bytes | str]] = []
    for number in range(300):
        members += [(f"{number}.png", bytes(20_000)), (f"{number}.json", junk)]
    file = io.BytesIO(tar_of(members))
    tracemalloc.start()
    try:
        samples = TarReader(["caption"]).samples(file, "a.tar")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [sample.caption("caption") for sample in samples] == ["c"] * 300
    assert peak < 2_000_000 < file.getbuffer().nbytes / 5
