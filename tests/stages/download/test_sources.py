"""Files that people already have become the same rows and images as a URL list; each mistake has one clear message."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages.artifacts.images import table_columns
from stages.artifacts.rows import ORIGINAL
from stages.artifacts.templates import fill_row
from stages.download.sources.folder import FolderImages
from stages.download.sources.lists import RowList
from stages.download.stage import STAGE, DownloadConfig, open_source, read_rows
from storage.code_table import CodeTableInfo, read_code_table, write_code_shard
from tests.helpers.given_files import (
    CAPTIONS,
    IMAGES,
    MAKERS,
    Maker,
    make_conversations,
    make_folder,
    make_webdataset,
    run_download,
    write_tar,
)
from tests.helpers.misbehaving_server import encoded, png


@pytest.mark.parametrize("make", MAKERS)
def test_part_of_any_source_is_held_out(tmp_path: Path, make: Maker) -> None:
    config = DownloadConfig(files=make(tmp_path), held_out_fraction=0.5, rows_per_shard=2)
    splits = [row["split"] for row in read_rows(config).to_pylist()]
    assert len(splits) == 3 and set(splits) == {"train", "test"}, "chosen so that three rows fall on both sides"
    *_, outcome = run_download(config, tmp_path)
    assert outcome.metadata["splits"] == {split: splits.count(split) for split in set(splits)}


@pytest.mark.parametrize("make", MAKERS)
def test_every_source_gives_one_schema_in_the_order_of_its_rows(tmp_path: Path, make: Maker) -> None:
    config = DownloadConfig(files=make(tmp_path), extra_columns=("style",), rows_per_shard=2)
    rows, samples, outcome = run_download(config, tmp_path)
    assert [row["caption"] for row in rows] == CAPTIONS
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["style"] for row in rows} == {"plain"}
    assert [(sample.image, sample.text) for sample in samples] == list(zip(IMAGES, CAPTIONS, strict=True))
    assert {sample.json["style"] for sample in samples} == {"plain"}
    assert len({row["url"] for row in rows}) == 3
    assert not any(str(tmp_path) in row["url"] for row in rows)
    assert "musevl_place" not in rows[0]
    assert outcome.metrics["num_ok"] == 3


@pytest.mark.parametrize("make", MAKERS)
def test_moved_files_are_the_same_input_and_changed_ones_are_not(tmp_path: Path, make: Maker) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    files = make(here)
    shutil.copytree(here, there)

    def key(values: dict[str, Any]) -> str:
        return STAGE.action_key(DownloadConfig(files=values), 0, {})

    moved = {name: value.replace(str(here), str(there)) for name, value in files.items()}
    assert key(files) == key(moved)
    images = there / "images" / "a.png"
    changed = images if images.exists() else sorted(there.glob("*.*"))[0]
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(bytes(data))
    assert key(files) != key(moved)


def test_digest_of_unchanged_files_is_not_worked_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSEVL_CACHE", str(tmp_path / "cache"))
    config = DownloadConfig(files=make_webdataset(tmp_path))
    for tar in tmp_path.glob("*.tar"):
        os.utime(tar, (1_000_000, 1_000_000))  # files that changed just now are never remembered
    first = open_source(config).content()
    for tar in tmp_path.glob("*.tar"):
        data = bytearray(tar.read_bytes())
        data[600] ^= 1
        tar.write_bytes(bytes(data))
        os.utime(tar, (1_000_000, 1_000_000))  # the same stamp: nobody looks inside
    assert open_source(config).content() == first
    os.utime(tar, (1_000_001, 1_000_001))
    assert open_source(config).content() != first


@pytest.mark.parametrize("make", [make_folder, make_conversations])
def test_look_up_of_a_list_that_was_read_before_takes_no_second_reading(
    tmp_path: Path, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUSEVL_CACHE", str(tmp_path / "cache"))
    files = make(tmp_path)
    listed = Path(files.get("captions") or files["path"])
    for path in tmp_path.rglob("*.*"):
        os.utime(path, (1_000_000, 1_000_000))  # files that changed just now are never remembered
    config = DownloadConfig(files=files)
    first = open_source(config).content()
    data = listed.read_bytes()
    listed.write_bytes(b"?" * len(data))
    os.utime(listed, (1_000_000, 1_000_000))  # the same stamp: nobody looks inside
    assert open_source(config).content() == first
    renamed = listed.with_stem("renamed")
    renamed.write_bytes(data)
    field = "captions" if "captions" in files else "path"
    assert open_source(DownloadConfig(files=files | {field: str(renamed)})).content() == first
    for file in (tmp_path / "cache" / "lists").iterdir():
        file.write_text("damaged")
    assert open_source(DownloadConfig(files=files | {field: str(renamed)})).content() == first
    (tmp_path / "images" / "a.png").write_bytes(png("black"))
    assert open_source(DownloadConfig(files=files | {field: str(renamed)})).content() != first, "its images still count"


def test_list_that_changes_while_it_is_read_is_not_remembered_as_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUSEVL_CACHE", str(tmp_path / "cache"))
    files = make_folder(tmp_path)
    listed, config = tmp_path / "list.jsonl", DownloadConfig(files=files)
    before, after = listed.read_bytes(), b'{"file_name": "a.png", "caption": "x"}\n'
    expected = open_source(config).content()
    shutil.rmtree(tmp_path / "cache")

    read = RowList.read

    def read_after_a_change(*arguments: Any) -> pa.Table:
        listed.write_bytes(after)
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RowList, "read", read_after_a_change)
        open_source(config).content()
    listed.write_bytes(before)
    assert open_source(config).content() == expected


def test_captions_may_stand_in_text_files_beside_the_images(tmp_path: Path) -> None:
    for name, image, caption in zip("abc", IMAGES, CAPTIONS, strict=True):
        (tmp_path / f"{name}.png").write_bytes(image)
        (tmp_path / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    (tmp_path / "b.txt").unlink()
    config = DownloadConfig(files={"kind": "folder", "path": str(tmp_path)}, max_failed_fraction=0.5)
    rows = read_rows(config).to_pylist()
    assert [(row["url"], row["caption"]) for row in rows] == [
        ("a.png", CAPTIONS[0]),
        ("b.png", ""),
        ("c.png", CAPTIONS[2]),
    ]
    (tmp_path / "out").mkdir()
    described, samples, _ = run_download(config, tmp_path / "out")
    assert [row["status"] for row in described] == ["ok", "no_caption", "ok"]
    assert [sample.image for sample in samples] == [IMAGES[0], IMAGES[2]]


def test_rows_of_a_list_that_name_no_good_file_are_failures(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "secret.png").write_bytes(png("black"))
    (tmp_path / "images" / "cut.png").write_bytes(IMAGES[0][:50])
    names = ["a.png", "absent.png", "../secret.png", str(tmp_path / "secret.png"), "", "cut.png"]
    (tmp_path / "list.csv").write_text(
        "file_name,caption\n" + "".join(f"{name},x\n" for name in names), encoding="utf-8"
    )
    files = {"kind": "folder", "path": str(tmp_path / "images"), "captions": str(tmp_path / "list.csv")}
    rows, samples, _ = run_download(DownloadConfig(files=files, max_failed_fraction=1), tmp_path)
    assert [row["status"] for row in rows] == ["ok", "missing", "refused", "refused", "missing", "undecodable"]
    assert [sample.image for sample in samples] == [IMAGES[0]]


def test_parquet_row_without_bytes_and_sample_without_image_are_failures(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"image": pa.array([IMAGES[0], None], pa.binary()), "caption": ["a", "b"]}), tmp_path / "a.parquet"
    )
    files = {"kind": "parquet", "path": str(tmp_path / "a.parquet")}
    rows, _, _ = run_download(DownloadConfig(files=files, max_failed_fraction=1), tmp_path)
    assert [row["status"] for row in rows] == ["ok", "missing"]
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", {"1.png": IMAGES[0], "1.txt": b"one", "2.txt": b"two"})
    files = {"kind": "webdataset", "path": str(tmp_path / "tars")}
    rows, _, _ = run_download(DownloadConfig(files=files, max_failed_fraction=1), tmp_path / "tars")
    assert [(row["caption"], row["status"]) for row in rows] == [("one", "ok"), ("two", "missing")]


def test_conversation_keeps_its_first_turn_and_all_turns_as_columns(tmp_path: Path) -> None:
    files = make_conversations(tmp_path)
    columns = ("question", "answer", "conversation", "id")
    rows = read_rows(DownloadConfig(files=files, extra_columns=columns)).to_pylist()
    assert [(row["question"], row["answer"], row["id"]) for row in rows] == [
        ("What is it?", caption, str(index)) for index, caption in enumerate(CAPTIONS)
    ]
    turns = json.loads(rows[0]["conversation"])
    assert [turn["value"] for turn in turns] == ["What is it?", CAPTIONS[0], "Sure?", "Yes."]


def test_entries_of_a_conversation_file_that_cannot_be_used_are_rows_with_the_reason(tmp_path: Path) -> None:
    files = make_conversations(tmp_path)
    path = Path(files["path"])
    turns: list[Any] = [{"from": "bot", "value": "x"}]
    wrong = [7, {"image": "a.png"}, {"image": ["a.png", "b.png"], "conversations": turns}]
    path.write_text(json.dumps([*wrong, {"image": "a.png", "conversations": turns}, *json.loads(path.read_text())]))
    rows, _, _ = run_download(DownloadConfig(files=files, max_failed_fraction=1), tmp_path)
    assert [row["status"] for row in rows[:4]] == ["no_caption"] * 4
    for row, reason in zip(rows, ["is no object", "no list", "several images", "not from 'human'"], strict=False):
        assert row["error"].startswith("the entry ") and reason in row["error"]
    assert [row["caption"] for row in rows[4:]] == CAPTIONS


def _entry(*turns: str, **fields: Any) -> dict[str, Any]:
    """`h:` begins what a human says, `g:` what the model does."""
    speakers = {"h": "human", "g": "gpt", "s": "system"}
    said = [{"from": speakers[turn[0]], "value": turn[2:]} for turn in turns]
    return {"id": "mine", "image": "a.png", "conversations": said} | fields


def _conversation_rows(tmp_path: Path, *entries: Any) -> list[dict[str, Any]]:
    files = make_conversations(tmp_path)
    path = Path(files["path"])
    path.write_text(json.dumps([*entries, *json.loads(path.read_text())]))
    config = DownloadConfig(files=files, extra_columns=("question", "answer", "id"), max_failed_fraction=1)
    rows, _, _ = run_download(config, tmp_path)
    assert [row["id"] for row in rows[: len(entries)]] == ["mine"] * len(entries), "whatever else is wrong"
    return rows[: len(entries)]


@pytest.mark.parametrize(
    ("entry", "question", "answer"),
    [
        (_entry("g:Hello!", "h:<image>\nWhich colour?", "g:Green."), "Which colour?", "Green."),
        (_entry("s:Be terse.", "h:<image>\nWhich colour?", "g:Green."), "Which colour?", "Green."),
        (_entry("h:<image>", "h:Which colour?", "g:Green."), "Which colour?", "Green."),
        (_entry("h:Look.\n<image>", "h:Which colour?", "g:Green."), "Look.\nWhich colour?", "Green."),
        (_entry("h:Which colour?\n<image>", "g:Green."), "Which colour?", "Green."),
        (_entry("h:<image>Which colour?", "g:Green."), "Which colour?", "Green."),
        (_entry("h:<image>\nWhat does <image> do?", "g:It is no tag."), "What does <image> do?", "It is no tag."),
        (_entry("h:<image>\nWhich tag?", "g:<image> or <img>."), "Which tag?", "<image> or <img>."),
        (_entry("h:<image>\n<image> is a tag?", "g:No."), "<image> is a tag?", "No."),
        (_entry("h:Which of <image> and <img>?", "g:<img>"), "Which of <image> and <img>?", "<img>"),
        (_entry("h:<image>\nWhat?", "g:Green.", image=["a.png"]), "What?", "Green."),
        (_entry("h:<image>\nWhat?", "g:Green.", caption=" "), "What?", "Green."),
    ],
)
def test_question_and_answer_are_those_of_the_first_exchange(
    tmp_path: Path, entry: dict[str, Any], question: str, answer: str
) -> None:
    (row,) = _conversation_rows(tmp_path, entry)
    assert (row["status"], row["question"], row["answer"], row["caption"]) == ("ok", question, answer, answer)


@pytest.mark.parametrize(
    ("entry", "status", "reason"),
    [
        (_entry("h:<image>\nWhat?"), "no_caption", "the entry has a question and no answer"),
        (_entry("g:Hello!", "h:<image>\nWhat?"), "no_caption", "the entry has a question and no answer"),
        (_entry("g:Hello!"), "no_caption", "the entry has no question"),
        (_entry("h:<image>\nWhat?", "g: \n"), "no_caption", "the entry has an empty answer"),
        (_entry("h:Draw a square.", "g:<image>"), "no_caption", "the entry has an image for an answer"),
        (
            _entry("h:<image>\nWhat?", "g:Red.", image=["a.png", "b.png"]),
            "no_caption",
            "the entry has several images, of which only one could be used",
        ),
        (_entry("h:What?", "g:Red.", image=[7]), "no_caption", "the entry has an image that is no path"),
        (_entry("h:What?", "g:Red.", image=[]), "missing", "the conversation has no image"),
        (_entry("h:What?", "g:Red.", image=None), "missing", "the conversation has no image"),
        (_entry("h:What?", "g:Red.", image=""), "missing", "the conversation has no image"),
        (_entry("h:What?", "g:Red.", image=["zz.png"]), "missing", "there is no such file"),
    ],
)
def test_an_entry_without_picture_or_answer_is_never_ok(
    tmp_path: Path, entry: dict[str, Any], status: str, reason: str
) -> None:
    (row,) = _conversation_rows(tmp_path, entry)
    assert (row["status"], row["error"]) == (status, reason)


def bad(kind: str, path: str, prepare: Callable[[Path], Any], message: str, **fields: str) -> Any:
    return pytest.param({"kind": kind, "path": path, **fields}, prepare, message, id=message[:40])


def bad_turns(text: str | None, message: str) -> Any:
    def prepare(folder: Path) -> None:
        if text is not None:
            (folder / "a.json").write_text(text, encoding="utf-8")

    return bad("conversations", "a.json", prepare, message, image_folder="")


def parquet_of(table: dict[str, Any]) -> Callable[[Path], None]:
    return lambda folder: pq.write_table(pa.table(table), folder / "a.parquet")


def list_of(text: str) -> Callable[[Path], Any]:
    return lambda folder: [(folder / name).write_text(text, encoding="utf-8") for name in ("l.csv", "l.jsonl")]


@pytest.mark.parametrize(
    ("files", "prepare", "message"),
    [
        bad("webdataset", "no-*.tar", lambda f: None, "matches no file"),
        bad("webdataset", "", lambda f: (f / "a.zip").write_bytes(b"x"), r"holds no \.tar, but 'a\.zip'"),
        bad("webdataset", "", lambda f: (f / "a.tar").write_bytes(b"x" * 9999), "a.tar is not readable as tar"),
        bad("webdataset", "", lambda f: write_tar(f / "a.tar", {"1.png": b""}), "has no column 'caption'"),
        bad("webdataset", "", lambda f: write_tar(f / "a.tar", {"1.json": b"[1]"}), "a.tar: 1.json is no JSON object"),
        bad(
            "webdataset", "", lambda f: write_tar(f / "a.tar", {"1.json": b"{"}), "a.tar: 1.json is not JSON: Expecting"
        ),
        bad("webdataset", "", lambda f: write_tar(f / "a.tar", {}), "has no rows"),
        bad("parquet", "absent.parquet", lambda f: None, "matches no file"),
        bad("parquet", "", lambda f: (f / "a.parquet").write_bytes(b"x" * 99), "a.parquet is not readable as Parquet"),
        bad("parquet", "", lambda f: (f / "a.csv").write_bytes(b"x"), "holds no .parquet file"),
        bad("parquet", "", parquet_of({"x": [1]}), "has no column 'image'"),
        bad("parquet", "", parquet_of({"image": [1]}), "is int64; it must hold"),
        bad("parquet", "", parquet_of({"image": [b"1"]}), "no column 'caption'"),
        bad("folder", "absent", lambda f: None, "matches no file"),
        bad("folder", "", lambda f: (f / "a.png").write_bytes(b"x"), r"1 images and no \.txt next to them"),
        bad("folder", "", lambda f: (f / "a.doc").write_bytes(b"x"), "holds no images"),
        bad("folder", "", list_of("caption\nx\n"), "no column 'file_name'", captions="l.csv"),
        bad("folder", "", list_of("file_name\nx\n"), "no column 'caption'", captions="l.csv"),
        bad("folder", "", lambda f: (f / "l.xls").write_bytes(b""), "unknown suffix '.xls'", captions="l.xls"),
        bad("folder", "", lambda f: None, r"download\.files\.captions=.*matches no file", captions="absent.csv"),
        bad("folder", "", list_of("file_name,caption,caption\nx,a,b\n"), "has 2 columns 'caption'", captions="l.csv"),
        bad("folder", "", list_of("file_name,file_name,caption\n,,\n"), "has 2 columns 'file_name'", captions="l.csv"),
        bad("folder", "", list_of('{"a": 1}\n\n{"a": \n'), "not readable as json: line 3, column", captions="l.jsonl"),
        bad("folder", "", list_of('{"a": 1}\n[2]\n'), r"line 2 is '\[2\]', not an object", captions="l.jsonl"),
        bad("folder", "", list_of("\n"), "not readable as json: it is empty", captions="l.jsonl"),
        bad("folder", "", list_of("[" * 99_999), "entry 1: values are nested too deeply", captions="l.jsonl"),
        bad_turns(None, r"cannot read download\.files\.path"),
        bad_turns("{", "not readable as JSON"),
        bad_turns("{}", "a dict, not a list"),
        bad_turns("[]", "has no"),
        bad_turns("[" * 99_999, "not readable as JSON: values are nested too deeply"),
        bad_turns('[{"image": "x"}]', "entry 0 has no list"),
        bad_turns('[{"image": 3, "conversations": [{}]}]', r"an image that is no path: \[3\]"),
        bad_turns('[{"conversations": [{"from": "bot"}]}]', "not from 'human' or 'gpt'"),
        bad_turns('[{"conversations": [{"from": "gpt"}]}]', "a turn without text"),
    ],
)
def test_bad_source_is_named_with_what_was_expected_before_anything_is_fetched(
    tmp_path: Path, files: dict[str, str], prepare: Callable[[Path], Any], message: str
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    prepare(folder)
    placed = {name: value if name == "kind" else str(folder / value) for name, value in files.items()}
    with pytest.raises(ValueError, match=message) as raised:
        read_rows(DownloadConfig(files=placed))
    assert str(folder) in str(raised.value)


def test_unknown_kind_of_files_lists_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="webdataset.*parquet.*folder.*conversations"):
        DownloadConfig(files={"kind": "zip", "path": str(tmp_path)})


@pytest.mark.parametrize("name", ["status", "text", "view", "codes", "key", "url", "caption"])
def test_column_of_our_own_tables_cannot_be_an_extra_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"columns {name} are of our own tables.*rename them in the data"):
        DownloadConfig(extra_columns=("style", name))


def test_a_column_is_named_once() -> None:
    with pytest.raises(ValueError, match="columns style are named twice"):
        DownloadConfig(extra_columns=("style", "size", "style"))


def _listed(folder: Path, header: str, lines: list[str]) -> dict[str, str]:
    """A folder with a list of its images, whose file names stand before each line."""
    for number in range(len(lines)):
        (folder / f"{number}.png").write_bytes(png("red"))
    listed = [f"file_name,{header}", *(f"{number}.png,{line}" for number, line in enumerate(lines))]
    (folder / "list.csv").write_text("\n".join(listed) + "\n", encoding="utf-8")
    return {"kind": "folder", "path": str(folder), "captions": str(folder / "list.csv")}


def test_columns_with_spaces_and_dots_reach_the_templates(tmp_path: Path) -> None:
    columns = ("Image Size", "a.b", "class", "__x__", "größe")
    files = _listed(tmp_path, "caption,Image Size,a.b,class,__x__,größe", ["one,large,ab,cls,u,10"])
    rows, (sample,), _ = run_download(DownloadConfig(files=files, extra_columns=columns), tmp_path)
    expected = dict(zip(columns, ["large", "ab", "cls", "u", "10"], strict=True))
    assert {name: rows[0][name] for name in columns} == expected
    held = {name: [value] for name, value in table_columns(sample, ORIGINAL).items()}
    info = CodeTableInfo((1, 1, 2, 2), ("main",), (4,), "digest", {})
    write_code_shard(tmp_path / "codes.parquet", info, ["0"], held, np.zeros((1, 1, 1, 2, 2), np.int64))
    table = read_code_table([tmp_path / "codes.parquet"])
    row = {name: value or "" for name, (value,) in table.columns.items()}
    assert {name: row[name] for name in columns} == expected
    template = "{caption}: {Image Size}, {a.b}, {class}, {__x__}, {größe} {{c}}"
    assert fill_row(template, row) == "one: large, ab, cls, u, 10 {c}"


def test_rows_of_splits_that_no_stage_uses_are_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    splits = ["train"] * 3 + ["", "test", "val", "val", "validation", "Test", " test", "TRAIN"]
    files = _listed(tmp_path, "caption,split", [f"one,{split}" for split in splits])
    with caplog.at_level("WARNING", logger="stages.download"):
        *_, outcome = run_download(DownloadConfig(files=files, extra_columns=("split",)), tmp_path)
    assert outcome.metrics["num_in_unused_splits"] == 6
    assert outcome.metrics["splits"] == {
        "train": 4, "val": 2, " test": 1, "TRAIN": 1, "Test": 1, "test": 1, "validation": 1
    }  # fmt: skip
    (said,) = [record.getMessage() for record in caplog.records]
    assert "6 of 11 rows are in splits that no stage uses: 'val' (2), ' test' (1), 'TRAIN' (1)" in said
    assert "name them `train` or `test`, exactly so" in said


def test_a_list_without_training_rows_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    files = _listed(tmp_path, "caption,split", ["one,Train", "two,test"])
    with pytest.raises(ValueError, match=r"no row has the split 'train'.* they have 'Train' \(1\): name them"):
        run_download(DownloadConfig(files=files, extra_columns=("split",)), tmp_path)


@pytest.mark.parametrize(
    ("splits", "said"),
    [(["train", "test"], ""), (["train", "dev"], "no row is held"), (None, "no row is held")],
)
def test_that_nothing_is_held_out_is_said_at_download(
    splits: list[str] | None, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    header = "caption" if splits is None else "caption,split"
    files = _listed(tmp_path, header, ["one", "two"] if splits is None else [f"one,{split}" for split in splits])
    with caplog.at_level("WARNING", logger="stages.download"):
        run_download(DownloadConfig(files=files, extra_columns=() if splits is None else ("split",)), tmp_path)
    assert said in caplog.text if said else not caplog.records


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_no_more_of_a_huge_file_is_read_than_is_allowed(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = IMAGES[0] + bytes(1_000_000)
    (tmp_path / "files").mkdir()
    if kind == "folder":
        (tmp_path / "files" / "a.png").write_bytes(huge)
        (tmp_path / "files" / "a.txt").write_text("a")
    else:
        write_tar(tmp_path / "files" / "a.tar", {"1.png": huge, "1.txt": b"one"})
    files = {"kind": kind, "path": str(tmp_path / "files")}
    config = DownloadConfig(files=files, max_bytes=5000, max_failed_fraction=1)
    source = open_source(config)
    rows = read_rows(config).to_pylist()
    ((_, fetched),) = source.fetch(rows, tmp_path)
    assert isinstance(fetched, bytes) and len(fetched) == 5001
    with pytest.raises(ValueError, match="too_large"):
        run_download(config, tmp_path)


def test_a_folder_in_trouble_is_no_missing_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path)
    images = FolderImages(str(tmp_path / "images"), "path", 10**6)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "the service does not answer")

    monkeypatch.setattr(images.files, "read", fail)
    with pytest.raises(OSError, match="does not answer"):
        images.read("a.png")


@pytest.mark.parametrize("kind", ["MPO", "JPEG2000", "TIFF", "AVIF", "WEBP", "PPM"])
def test_a_shard_is_read_back_as_a_webdataset_whatever_its_images_are(tmp_path: Path, kind: str) -> None:
    image = Image.effect_noise((64, 64), 30)
    options = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}
    (tmp_path / "a.png").write_bytes(encoded(image, kind, **options))
    (tmp_path / "a.txt").write_text("noise")
    first = tmp_path / "first"
    first.mkdir()
    rows, samples, _ = run_download(DownloadConfig(files={"kind": "folder", "path": str(tmp_path)}), first)
    assert rows[0]["status"] == "ok"
    for extension in {samples[0].extension, "mpo", "jpeg2000"}:  # the last two are in shards of older versions
        folder = tmp_path / extension
        folder.mkdir()
        write_tar(folder / "a.tar", {f"0.{extension}": samples[0].image, "0.txt": b"noise"})
        again, _, _ = run_download(DownloadConfig(files={"kind": "webdataset", "path": str(folder)}), folder)
        assert [(row["status"], row["caption"], row["sha256"]) for row in again] == [("ok", "noise", rows[0]["sha256"])]


def test_a_file_that_a_program_would_be_run_for_is_no_image(tmp_path: Path) -> None:
    make_folder(tmp_path)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    (tmp_path / "images" / "a.png").write_bytes(eps)
    (tmp_path / "list.csv").write_text("file_name,caption\na.png,x\n")
    files = {"kind": "folder", "path": str(tmp_path / "images"), "captions": str(tmp_path / "list.csv")}
    with pytest.raises(ValueError, match="undecodable: unsupported format: EPS or PostScript"):
        run_download(DownloadConfig(files=files, max_failed_fraction=1), tmp_path)
