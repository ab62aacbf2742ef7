"""What a source says of an image arrives as it was written; what is no text costs its own row or letters, no more."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.download.stage import DownloadConfig, read_rows
from tests.helpers.given_files import CAPTIONS, IMAGES, run_download, write_tar

CUT = "a cat \\ud83d"
"""Half of an emoji, as JSON escapes it: what is left where somebody cut a text by its UTF-16 length."""


def broken_captions(kind: str, folder: Path) -> dict[str, Any]:
    """Three images of a kind, whose captions are 'caf\\xe9' in Latin-1, the cut emoji, and a good one."""
    images = folder / "images"
    images.mkdir()
    names = ["0.png", "1.png", "2.png"]
    for name, image in zip(names, IMAGES, strict=True):
        (images / name).write_bytes(image)
    spelled = [b"caf\xe9", CUT.encode(), CAPTIONS[2].encode()]
    if kind == "webdataset":
        texts = {"0.txt": spelled[0], "1.json": b'{"caption": "%s"}' % spelled[1], "2.txt": spelled[2]}
        write_tar(folder / "a.tar", {n: d for i in range(3) for n, d in [(names[i], IMAGES[i]), *texts.items()]
                                     if n[0] == str(i)})  # fmt: skip
        return {"kind": kind, "path": str(folder / "a.tar")}
    if kind == "parquet":
        captions = pa.array([spelled[0], "a cat \ufffd".encode(), spelled[2]], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"image": pa.array(IMAGES, pa.binary()), "caption": captions}), folder / "a.parquet")
        return {"kind": kind, "path": str(folder / "a.parquet")}
    if kind == "conversations":
        entry = b'{"image": "%s", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "%s"}]}'
        entries = b", ".join(entry % (n.encode(), text) for n, text in zip(names, spelled, strict=True))
        (folder / "a.json").write_bytes(b"[" + entries + b"]")
        return {"kind": kind, "path": str(folder / "a.json"), "image_folder": str(images)}
    if kind == "texts":
        for index, text in enumerate([spelled[0], "a cat \ufffd".encode(), spelled[2]]):
            (images / f"{index}.txt").write_bytes(text)
        return {"kind": "folder", "path": str(images)}
    lines = {
        "jsonl": b"".join(b'{"file_name": "%d.png", "caption": "%s"}\n' % each for each in enumerate(spelled)),
        "csv": b"file_name,caption\n0.png,caf\xe9\n1.png,a cat \xf0\x9f\n2.png," + spelled[2],
    }
    (folder / f"list.{kind}").write_bytes(lines[kind])
    return {"kind": "folder", "path": str(images), "captions": str(folder / f"list.{kind}")}


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "conversations", "texts", "jsonl", "csv"])
def test_caption_that_is_no_unicode_loses_its_bad_characters_and_stops_nothing(tmp_path: Path, kind: str) -> None:
    config = DownloadConfig(files=broken_captions(kind, tmp_path))
    rows, samples, _ = run_download(config, tmp_path)
    assert [row["caption"] for row in rows] == ["caf\ufffd", "a cat \ufffd", CAPTIONS[2]]
    assert [sample.text for sample in samples] == [row["caption"] for row in rows]
    assert {row["status"] for row in rows} == {"ok"}


def test_sample_whose_json_cannot_be_read_is_a_failure_and_the_others_are_not(tmp_path: Path) -> None:
    good = {"1.png": IMAGES[0], "1.json": b'{"caption": "one"}', "4.png": IMAGES[1], "4.txt": b"four"}
    bad = {"2.png": IMAGES[1], "2.txt": b"two", "2.json": b'{"split": "te', "3.png": IMAGES[2], "3.json": b"[1]"}
    write_tar(tmp_path / "a.tar", dict(sorted((good | bad).items())))
    files = {"kind": "webdataset", "path": str(tmp_path / "a.tar")}
    rows, samples, _ = run_download(DownloadConfig(files=files, max_failed_fraction=0.5), tmp_path)
    assert [row["status"] for row in rows] == ["ok", "no_caption", "no_caption", "ok"]
    assert {row["error"] for row in rows} == {None, "the .json beside the image is no JSON object"}
    assert [sample.text for sample in samples] == ["one", "four"]


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes")
def test_names_that_are_no_unicode_stop_nothing(tmp_path: Path) -> None:
    folder, bad_name = tmp_path / "images", os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for name in (bad_name, "good"):
        (folder / f"{name}.png").write_bytes(IMAGES[0])
        (folder / f"{name}.txt").write_text("x")
    rows, _, _ = run_download(
        DownloadConfig(files={"kind": "folder", "path": str(folder)}, max_failed_fraction=0.5), tmp_path
    )
    assert [(row["url"], row["status"]) for row in rows] == [("caf\ufffd.png", "missing"), ("good.png", "ok")]
    write_tar(tmp_path / "a.tar", {f"{bad_name}.png": IMAGES[0], f"{bad_name}.txt": b"one"})
    rows = read_rows(DownloadConfig(files={"kind": "webdataset", "path": str(tmp_path / "a.tar")})).to_pylist()
    assert [row["url"] for row in rows] == ["a.tar/caf\ufffd.png"]
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}]
    entries = [{"image": name, "conversations": turns} for name in ("good.png", "\ud83d.png", "\x00.png", [None])]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    files = {"kind": "conversations", "path": str(tmp_path / "a.json"), "image_folder": str(folder)}
    (tmp_path / "out").mkdir()
    rows, _, _ = run_download(DownloadConfig(files=files, max_failed_fraction=1), tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "missing", "missing", "missing"]


WRITTEN = [
    "2024-05-01",
    "007",
    "1.50",
    "1e5",
    "null",
    "NA",
    "true",
    " x ",
    "12345678901234567890",
    "2024-05-01T10:00:00",
]


@pytest.mark.parametrize("written", [WRITTEN, *([value] for value in WRITTEN)], ids=str)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_columns_of_a_list_are_kept_exactly_as_they_were_written(tmp_path: Path, kind: str, written: list[str]) -> None:
    path = tmp_path / f"list.{kind}"
    if kind == "jsonl":
        text = "".join(json.dumps({"file_name": "a.png", "caption": value}) + "\n" for value in written)
    else:
        separator = {"csv": ",", "tsv": "\t"}[kind]
        text = f"file_name{separator}caption\n" + "".join(f"a.png{separator}{value}\n" for value in written)
    path.write_text(text, encoding="utf-8")
    files = {"kind": "folder", "path": str(tmp_path), "captions": str(path)}
    assert read_rows(DownloadConfig(files=files))["caption"].to_pylist() == written


def test_column_of_several_types_in_jsonl_keeps_each_value_as_it_was_written(tmp_path: Path) -> None:
    spelled = ['"x"', "1.50", "7", "null", "true", "[1.50, null]", '{"b": "\\ud83d", "a": [2]}', '"2024-05-01"']
    expected = ["x", "1.50", "7", "", "true", "[1.5, null]", '{"a": [2], "b": "\ufffd"}', "2024-05-01"]
    lines = [f'{{"file_name": "a.png", "caption": "c", "extra": {value}}}\n' for value in spelled]
    (tmp_path / "list.jsonl").write_text("".join(lines) + '{"file_name": "a.png"}\n', encoding="utf-8")
    files = {"kind": "folder", "path": str(tmp_path), "captions": str(tmp_path / "list.jsonl")}
    rows = read_rows(DownloadConfig(files=files, extra_columns=("extra",)))
    assert rows["extra"].to_pylist() == [*expected, ""]


def test_column_that_begins_late_in_a_long_list_is_empty_before(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "caption": str(index)} for index in range(25_000)]
    rows[21_000]["extra"] = "late"
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {"kind": "folder", "path": str(tmp_path), "captions": str(tmp_path / "list.jsonl")}
    table = read_rows(DownloadConfig(files=files, extra_columns=("extra",)))
    assert table["caption"].to_pylist() == [row["caption"] for row in rows]
    assert table["extra"].to_pylist() == [row.get("extra", "") for row in rows]


@pytest.mark.parametrize("layout", ["list", "images"])
def test_nested_columns_of_parquet_become_json_and_bytes_in_them_are_an_error(tmp_path: Path, layout: str) -> None:
    day = datetime.date(2024, 5, 1)
    columns = {
        "tags": pa.array([["a", "b"], None], pa.list_(pa.string())),
        "box": pa.array([{"x": 1, "when": day}, None]),
        "kind": pa.array(["k", None]).dictionary_encode(),
        "bytes_of": pa.array([b"caf\xe9", b"ok"], pa.binary_view()),
        "raw": pa.array([[b"\xff"], [b"1"]], pa.list_(pa.binary())),
    }
    given = {"file_name": ["a.png", "b.png"], "image": pa.array(IMAGES[:2], pa.binary()), "caption": ["1", "2"]}
    pq.write_table(pa.table(given | columns), tmp_path / "a.parquet")
    files = {"kind": "parquet", "path": str(tmp_path / "a.parquet")}
    if layout == "list":
        files = {"kind": "folder", "path": str(tmp_path), "captions": str(tmp_path / "a.parquet")}
    rows = read_rows(DownloadConfig(files=files, extra_columns=("tags", "box", "kind", "bytes_of"))).to_pylist()
    assert [[row[name] for name in ("tags", "box", "kind", "bytes_of")] for row in rows] == [
        ['["a", "b"]', '{"when": "2024-05-01", "x": 1}', "k", "caf\ufffd"],
        ["", "", "", "ok"],
    ]
    with pytest.raises(ValueError, match=r"column 'raw'.* is list.*cannot be kept as text.*extra_columns"):
        read_rows(DownloadConfig(files=files, extra_columns=("raw",)))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_row_of_several_megabytes_is_read(tmp_path: Path, kind: str) -> None:
    caption = "ab" * 2_000_000
    row = json.dumps({"file_name": "a.png", "caption": caption})
    text = {"csv": f"file_name,caption\na.png,{caption}\n", "jsonl": f"{row}\n{row}\n"}[kind]
    (tmp_path / f"list.{kind}").write_text(text, encoding="utf-8")
    files = {"kind": "folder", "path": str(tmp_path), "captions": str(tmp_path / f"list.{kind}")}
    assert set(read_rows(DownloadConfig(files=files))["caption"].to_pylist()) == {caption}


def test_url_list_follows_the_same_rules(tmp_path: Path) -> None:
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"url": "http://a/1", "caption": "2024-05-01", "tags": ["caf\\u00e9", "\\ud83d"]}\n')
    rows = read_rows(DownloadConfig(url_list=str(listed), extra_columns=("tags",))).to_pylist()
    assert [(row["caption"], row["tags"]) for row in rows] == [("2024-05-01", '["café", "\ufffd"]')]
    doubled = tmp_path / "list.csv"
    doubled.write_text("url,url,caption\nhttp://a/1,http://a/2,x\n")
    with pytest.raises(ValueError, match="has 2 columns 'url'; give each its own name"):
        read_rows(DownloadConfig(url_list=str(doubled)))
