"""Lists are read in the forms that people have them, or one line says what to do; no row and no quote is lost."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.download.stage import DownloadConfig, open_source, read_rows
from tests.helpers.given_files import IMAGES, tar_of, zstandard

PAIRS = [("https://a.invalid/1.jpg", "one"), ("https://a.invalid/2.jpg", "zwei Bäume 🌳")]
CSV = "url,caption\n" + "".join(f"{url},{caption}\n" for url, caption in PAIRS)
TSV = CSV.replace(",", "\t")
OBJECTS = [{"url": url, "caption": caption} for url, caption in PAIRS]
JSONL = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in OBJECTS)


def parquet(**columns: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def pairs(path: Path, **config: Any) -> list[tuple[str, str]]:
    rows = read_rows(DownloadConfig(url_list=str(path), **config)).to_pylist()
    return [(row["url"], row["caption"]) for row in rows]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("l.csv", CSV),
        ("l.CSV", CSV),
        ("l.csv.gz", gzip.compress(CSV.encode())),
        ("joined.csv.gz", gzip.compress(CSV[:30].encode()) + gzip.compress(CSV[30:].encode())),
        ("gzip-unnamed.csv", gzip.compress(CSV.encode())),
        ("l.jsonl.bz2", bz2.compress(JSONL.encode())),
        ("l.tsv.xz", lzma.compress(TSV.encode())),
        ("l.csv.zst", zstandard(CSV.encode())),
        ("l.json.gz", gzip.compress(json.dumps(OBJECTS).encode())),
        ("utf16.csv", CSV.encode("utf-16")),
        ("utf16.tsv", TSV.encode("utf-16-be")),
        ("utf16.jsonl", JSONL.encode("utf-16")),
        ("utf32.csv", CSV.encode("utf-32")),
        ("bom.csv", CSV.encode("utf-8-sig")),
        ("bom.jsonl", JSONL.encode("utf-8-sig")),
        ("cr.csv", CSV.replace("\n", "\r")),
        ("crlf.csv", CSV.replace("\n", "\r\n")),
        ("crlf.jsonl", JSONL.replace("\n", "\r\n")),
        ("blank-lines.csv", "\n" + CSV.replace("\n", "\n\n")),
        ("no-last-newline.csv", CSV[:-1]),
        ("semicolon.csv", CSV.replace(",", ";")),
        ("bar.csv", CSV.replace(",", "|")),
        ("tabs.csv", TSV),
        ("commas.tsv", CSV),
        ("tabs.txt", TSV),
        ("l.tab", TSV),
        ("quoted.csv", '"url","caption"\n' + "".join(f'"{url}","{caption}"\n' for url, caption in PAIRS)),
        ("trailing-separator.csv", CSV.replace("\n", ",\n")),
        ("spaces.csv", CSV.replace(",", ", ")),
        ("spaces-and-quotes.csv", "url, caption\n" + "".join(f'{url}, "{caption}"\n' for url, caption in PAIRS)),
        ("spaces-in-one-header.csv", CSV.replace("url,caption", "url,caption ")),
        ("upper.csv", CSV.replace("url,caption", "URL,Caption")),
        ("upper.jsonl", JSONL.replace('"url"', '"URL"')),
        ("upper.parquet", parquet(URL=[url for url, _ in PAIRS], CAPTION=[caption for _, caption in PAIRS])),
        ("array.json", json.dumps(OBJECTS)),
        ("pretty.json", "\n " + json.dumps(OBJECTS, indent=2)),
        ("array.jsonl", json.dumps(OBJECTS, ensure_ascii=False)),
        ("lines.json", JSONL),
        ("l.ndjson", JSONL),
        ("spaces-round-urls.csv", CSV.replace("https", " https").replace(".jpg", ".jpg ")),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)
def test_a_list_is_read_in_every_form_that_people_have(tmp_path: Path, name: str, data: bytes | str) -> None:
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    assert pairs(path) == PAIRS


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("l.txt", "https://a/1.jpg\nhttps://a/2.jpg\n", r"first line is a row.*`url,caption`; URLs alone have no capt"),
        ("l.csv", "https://a/1.jpg,one\n", "its first line is a row, not the names of its columns; write a first line"),
        ("l.tsv", "one\thttps://a/1.jpg\n", r"its first line is a row.* such as `url\tcaption`$"),
        ("l.csv", "URL,TEXT\nhttps://a/1.jpg,one\n", "no column 'caption'; it has URL, TEXT: set .*caption_column"),
        ("l.csv", "link,caption\nx,one\n", "no column 'url'; it has link, caption: set download.url_column"),
        ("l.csv", "url,caption\nhttps://a,one, two\nhttps://b,x\n", "line 2 has 3 values, the first line names 2 col"),
        ("l.csv", "url,caption\nhttps://a\n", "line 2 has 1 values, the first line names 2 columns"),
        (
            "l.csv",
            'url,caption\nx,y\nhttps://a,"open\nhttps://b,x\n',
            "line 3: a value in double quotes ends in .*no",
        ),
        ("l.csv", 'url,caption\nx,"open\ny,"closed"\n', "line 2: a value in double quotes ends in the middle"),
        ("l.csv", 'url,caption\nx,"a \\"big\\" dog"\n', "line 2: .*write a quote within a quoted value twice"),
        ("l.csv", "url,URL ,Url,caption\n", "no rows"),
        ("l.csv", "URL,Url,caption\nx,y,z\n", r"has 2 columns 'url' \('URL', 'Url'\); give each its own name"),
        ("l.csv", "", "is not readable as csv: it is empty"),
        ("l.csv", "url,caption\n", "has no rows"),
        ("l.tsv", '"url"\t"caption"\n"https://a"\t"b"\n', "set download.tsv_quotes=true"),
        ("l.json", '[{"url": "x", "caption": "y"}', "entry 1: there is no comma or closing bracket after it"),
        ("l.json", '[{"url": "x", "caption": "y"}] [{}]', "more follows its 1 entries"),
        ("l.json", '{"url": {"0": "x"}, "caption": {"0": "y"}}', "line 1: 'url' is .*write one object per row"),
        ("l.json", "[[1]]", r"entry 1 is '\[1\]', not an object"),
        ("l.csv.gz", gzip.compress(CSV.encode() * 99)[:-20], "is not readable as csv"),
        ("l.csv.zst", zstandard(CSV.encode() * 99)[:-20], "is not readable as csv"),
        ("l.csv", b"PK\x03\x04...", "is no list: it is a ZIP; unpack it"),
        ("l.xlsx", b"PK\x03\x04...", "unknown suffix '.xlsx'; give a CSV, TSV, JSON, JSONL or Parquet file"),
        ("l.parquet", b"PAR1", "is not readable as parquet"),
    ],
)
def test_a_list_that_cannot_be_used_says_what_to_do(tmp_path: Path, name: str, data: bytes | str, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ValueError, match=message) as raised:
        pairs(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


QUOTED = ['"welcome" sign', '" a lonely quote', "a 27\" monitor, 5' tall", 'he said "no"', '"all of it"', '""']


def test_quotes_in_a_tsv_are_text(tmp_path: Path) -> None:
    lines = ["caption\turl", *(f"{caption}\thttps://a/{number}" for number, caption in enumerate(QUOTED * 10))]
    (tmp_path / "l.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert [caption for _, caption in pairs(tmp_path / "l.tsv")] == QUOTED * 10


def test_quotes_in_a_tsv_enclose_values_where_the_setting_says_so(tmp_path: Path) -> None:
    with (tmp_path / "l.tsv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([("url", "caption"), *((f"u{c}", c) for c in [*QUOTED, "a\tb\nc"])])
    assert [caption for _, caption in pairs(tmp_path / "l.tsv", tsv_quotes=True)] == [*QUOTED, "a\tb\nc"]
    keys = {open_source(DownloadConfig(url_list=str(tmp_path / "l.tsv"), tsv_quotes=on)).content()["url_list"]
            for on in (False, True)}  # fmt: skip
    assert len(keys) == 2, "other rows, another input"


def test_quotes_in_a_csv_enclose_commas_line_breaks_and_quotes(tmp_path: Path) -> None:
    with (tmp_path / "l.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("url", "caption"), *((f"u{c}", c) for c in [*QUOTED, "a,b\nc\r\nd"])])
    assert [caption for _, caption in pairs(tmp_path / "l.csv")] == [*QUOTED, "a,b\nc\r\nd"]


def write_parts(folder: Path) -> None:
    """A list in two parts as Spark writes them, the second one first."""
    folder.mkdir()
    for number in (1, 0):
        url, caption = PAIRS[number]
        (folder / f"part-{number}.parquet").write_bytes(parquet(url=[url], caption=[caption], extra=[str(number)]))
    for name in ("_SUCCESS", ".part-0.parquet.crc", "._part-0.parquet", "README.txt"):
        (folder / name).write_bytes(b"x")


@pytest.mark.parametrize("spelled", ["parts", "parts/*.parquet", "parts/part-[01].parquet"])
def test_the_parts_of_a_list_are_read_in_the_order_of_their_names(tmp_path: Path, spelled: str) -> None:
    write_parts(tmp_path / "parts")
    assert pairs(tmp_path / spelled) == PAIRS
    files = {"kind": "folder", "path": str(tmp_path), "captions": str(tmp_path / spelled), "file_column": "url"}
    assert read_rows(DownloadConfig(files=files))["caption"].to_pylist() == [caption for _, caption in PAIRS]


def test_compressed_lists_and_tars_are_read_from_s3_whatever_their_folder_is_called(s3_uri: str) -> None:
    folder = f"{s3_uri}/parts [1]"
    file_system, root = fsspec.core.url_to_fs(folder)
    for name, data in {
        "part-0.csv.gz": gzip.compress(CSV.splitlines()[0].encode() + b"\n"),
        "part-1.csv.gz": gzip.compress(CSV.encode()),
        "tars/a.tar": tar_of([("1.png", IMAGES[0]), ("1.txt", b"one")]),
        "tars/b.tar.gz": gzip.compress(tar_of([("1.png", IMAGES[1]), ("1.txt", b"two")])),
    }.items():
        file_system.pipe_file(f"{root}/{name}", data)
    assert read_rows(DownloadConfig(url_list=f"{folder}/part-*"))["url"].to_pylist() == [url for url, _ in PAIRS]
    source = open_source(DownloadConfig(files={"kind": "webdataset", "path": f"{folder}/tars"}))
    rows = source.rows(["caption"]).to_pylist()
    assert [row["caption"] for row in rows] == ["one", "two"]
    assert dict(source.fetch(rows, Path())) == {0: IMAGES[0], 1: IMAGES[1]}


def test_what_is_no_part_of_a_list_is_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parts(tmp_path / "parts")
    with caplog.at_level(logging.WARNING):
        pairs(tmp_path / "parts")
    assert f"URL list {tmp_path}/parts: left out 4 files that are no lists: ._part-0.parquet, " in caplog.text


def test_parts_that_were_moved_are_the_same_list_and_changed_ones_are_not(tmp_path: Path) -> None:
    def content(folder: str) -> dict[str, str]:
        return open_source(DownloadConfig(url_list=str(tmp_path / folder))).content()

    write_parts(tmp_path / "parts")
    shutil.copytree(tmp_path / "parts", tmp_path / "moved")
    (tmp_path / "moved" / "part-0.parquet").rename(tmp_path / "moved" / "0.parquet")
    assert content("parts") == content("moved")
    shutil.copy(tmp_path / "parts" / "part-0.parquet", tmp_path / "moved" / "part-2.parquet")
    assert content("parts") != content("moved")


def test_lists_of_several_kinds_in_a_folder_are_refused(tmp_path: Path) -> None:
    write_parts(tmp_path / "parts")
    (tmp_path / "parts" / "stats.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds 2 x parquet, 1 x json, not lists of one kind.*FOLDER/\*\.parquet"):
        pairs(tmp_path / "parts")
    (tmp_path / "nothing").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "nothing" / name).write_bytes(b"x")
    with pytest.raises(ValueError, match="holds 2 other files, not lists"):
        pairs(tmp_path / "nothing")


def test_the_same_bytes_read_in_another_way_are_another_input(tmp_path: Path) -> None:
    for name in ("l.csv", "renamed.csv", "l.tsv"):
        (tmp_path / name).write_text(CSV)
    csv_list, renamed, tsv_list = (
        open_source(DownloadConfig(url_list=str(tmp_path / name))).content()
        for name in ("l.csv", "renamed.csv", "l.tsv")
    )
    assert csv_list == renamed != tsv_list


def _junk_json() -> str:
    return json.dumps([{"url": f"u{number}", "caption": "c", "junk": "x" * 4096} for number in range(3000)])


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("l.csv", lambda: "url,caption,junk\n" + "".join(f"u{n},c,{'x' * 4096}\n" for n in range(3000))),
        ("l.jsonl", lambda: _junk_json()[1:-1].replace("}, {", "}\n{")),
        ("l.json", _junk_json),
    ],
)
def test_no_more_of_a_long_list_is_in_memory_than_the_columns_that_are_wanted(
    tmp_path: Path, name: str, make: Callable[[], str]
) -> None:
    (tmp_path / name).write_text(make())
    assert (size := (tmp_path / name).stat().st_size) > 12_000_000
    tracemalloc.start()
    try:
        assert len(pairs(tmp_path / name)) == 3000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 2
