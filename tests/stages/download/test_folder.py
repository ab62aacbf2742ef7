"""Images of a folder find their text whatever system their names come from; what is not used is counted and said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.download.stage import DownloadConfig, open_source, read_rows
from tests.helpers.given_files import CAPTIONS, IMAGES, run_download, write_tar
from tests.helpers.misbehaving_server import png

NFC, NFD = "caf\u00e9", "cafe\u0301"


def config_of(folder: Path, captions: Path | None = None, **config: Any) -> DownloadConfig:
    files = {"kind": "folder", "path": str(folder), "captions": str(captions or "")}
    return DownloadConfig(files=files, max_failed_fraction=1, **config)


def fill(folder: Path, files: dict[str, str | bytes]) -> Path:
    """A folder whose files hold these bytes; an image, where a name alone is given."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def captions_of(folder: Path) -> list[tuple[str, str]]:
    return [(row["url"], row["caption"]) for row in read_rows(config_of(folder)).to_pylist()]


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("IMG_1.JPG", "IMG_1.txt"),
        ("IMG_1.JPG", "img_1.txt"),
        ("IMG_1.JPG", "IMG_1.TXT"),
        ("Sub/a.png", "sub/a.txt"),
        (f"{NFD}.png", f"{NFC}.txt"),
        (f"{NFC}.png", f"{NFD}.TXT"),
        ("a.png", "a.png.txt"),
        ("A.PNG", "a.png.txt"),
        ("a.v2.png", "a.v2.txt"),
        ("d.v1/a.png", "d.v1/a.txt"),
        ("a.png", "a.caption"),
        ("a.png", "a.cap"),
        ("a.png", "a.text"),
        ("a.jfif", "a.txt"),
        ("a", "a.txt"),
    ],
)
def test_a_text_is_found_whatever_system_spelled_its_name(tmp_path: Path, image: str, text: str) -> None:
    fill(tmp_path, {image: IMAGES[0], text: "its text\n", "z.png": IMAGES[1], "z.txt": "z"})
    assert captions_of(tmp_path) == [(image, "its text"), ("z.png", "z")]


def test_names_that_differ_in_case_alone_keep_their_own_texts(tmp_path: Path) -> None:
    names: dict[str, str | bytes] = {"A.png": b"", "a.png": b"", "a.txt": "lower", "B.png": b"", "b.png": b""}
    fill(tmp_path, names | {"B.txt": "upper", "b.txt": "lower", "C.png": b"", "c.png": b"", "\u00c7.txt": "other"})
    assert captions_of(tmp_path) == [
        ("A.png", ""),
        ("B.png", "upper"),
        ("C.png", ""),
        ("a.png", "lower"),
        ("b.png", "lower"),
        ("c.png", ""),
    ]


def test_a_text_in_utf_16_is_read(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": IMAGES[0], "a.txt": "ein B\u00e4r".encode("utf-16")})
    assert captions_of(tmp_path) == [("a.png", "ein B\u00e4r")]


def test_what_macos_and_windows_leave_is_no_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shadow = b"\0\5\x16\7" + bytes(99)
    clutter = ["._a.jpg", "._a.txt", "__MACOSX/._a.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", ".trash/a.jpg"]
    fill(tmp_path / "in", {"a.jpg": IMAGES[0], "a.txt": "a", **dict.fromkeys(clutter, shadow)})
    with caplog.at_level(logging.WARNING):
        rows, _, _ = run_download(config_of(tmp_path / "in"), tmp_path)
    assert [(row["url"], row["status"]) for row in rows] == [("a.jpg", "ok")]
    assert "in: left out 7 files that are hidden or a system's own: .DS_Store, ._a.jpg, ._a.txt, ..." in caplog.text
    assert "neither images nor texts" not in caplog.text


def test_files_without_a_partner_are_rows_or_are_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone: dict[str, str | bytes] = {"alone.png": IMAGES[1], "README.txt": "x", "x.pdf": b"x", "y.csv": b"x"}
    fill(tmp_path / "in", {"a.png": IMAGES[0], "a.txt": "a", "new.heic": b"x", "new.txt": "new", **alone})
    with caplog.at_level(logging.WARNING):
        rows, _, _ = run_download(config_of(tmp_path / "in"), tmp_path)
    assert [(row["url"], row["caption"], row["status"]) for row in rows] == [
        ("a.png", "a", "ok"),
        ("alone.png", "", "no_caption"),
        ("new.heic", "new", "not_an_image"),
    ]
    assert "in: left out 3 files that are neither images nor texts beside one: README.txt, x.pdf, y.csv" in caplog.text


LISTED = {
    NFC + ".png": NFD + ".png",
    "sub\\1.png": "sub/1.png",
    "./sub/1.png": "sub/1.png",
    "up.png": "UP.PNG",
    "a b.png ": "a b.png",
    "back\\slash.png": "back\\slash.png",
}


@pytest.mark.parametrize(("spelled", "name"), LISTED.items())
def test_a_list_means_the_file_that_differs_in_spelling_alone(tmp_path: Path, spelled: str, name: str) -> None:
    folder = fill(tmp_path / "in", {each: png("red") for each in [*LISTED.values(), "SUB/other.png"]})
    row = {"file_name": spelled, "caption": "x"}
    (tmp_path / "l.jsonl").write_text(json.dumps(row) + "\n")
    config = config_of(folder, tmp_path / "l.jsonl")
    rows, _, _ = run_download(config, tmp_path)
    assert [(row["url"], row["status"]) for row in rows] == [(name, "ok")]
    before = open_source(config).content()
    (folder / name).write_bytes(png("blue"))
    assert open_source(config).content() != before, "the file that is meant counts"


def test_a_list_may_name_files_by_their_whole_path_but_none_outside(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", {"sub/1.png": IMAGES[0], "A.png": IMAGES[1], "a.png": IMAGES[2]})
    fill(tmp_path, {"outside.png": IMAGES[0]})
    names = [f"{folder}/sub/1.png", f"{tmp_path}/outside.png", "..\\outside.png", "a.PNG"]
    (tmp_path / "l.csv").write_text("file_name,caption\n" + "".join(f"{name},x\n" for name in names))
    rows, _, _ = run_download(config_of(folder, tmp_path / "l.csv"), tmp_path)
    assert [row["status"] for row in rows] == ["ok", "refused", "refused", "missing"], (
        "A.png and a.png: not clear which"
    )


@pytest.mark.parametrize("kind", ["folder", "conversations"])
def test_images_that_a_list_does_not_name_are_counted_and_said(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = fill(
        tmp_path / "in", {f"{number}.png": IMAGES[0] for number in range(6)} | {"notes.md": b"", "._0.png": b""}
    )
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}]
    row = {"file_name": "4.png", "image": "4.png", "caption": "x", "conversations": turns}
    (tmp_path / "l.json").write_text(json.dumps([row]))
    files = {"kind": kind, "path": str(tmp_path / "l.json"), "image_folder": str(folder)}
    config = DownloadConfig(files=files) if kind == "conversations" else config_of(folder, tmp_path / "l.json")
    with caplog.at_level(logging.WARNING):
        assert read_rows(config)["url"].to_pylist() == ["4.png"]
    (message,) = (each for each in caplog.messages if "left out" in each)
    assert "in: left out 5 images that " in message and message.endswith(" does not name: 0.png, 1.png, 2.png, ...")


EMPTY = ["", "  \n", "\u200b\ufeff"]


@pytest.mark.parametrize("kind", ["texts", "list", "parquet", "webdataset", "conversations"])
def test_an_image_without_a_caption_is_never_ok(tmp_path: Path, kind: str) -> None:
    captions = [*EMPTY, CAPTIONS[0]]
    files: dict[str, Any] = {"kind": "folder", "path": str(tmp_path / "in"), "captions": ""}
    fill(tmp_path / "in", {f"{at}.png": IMAGES[0] for at in range(4)})
    if kind == "texts":
        fill(tmp_path / "in", {f"{at}.txt": caption for at, caption in enumerate(captions)})
    if kind == "list":
        rows = [{"file_name": f"{at}.png", "caption": caption or None} for at, caption in enumerate(captions)]
        (tmp_path / "l.json").write_text(json.dumps(rows))
        files["captions"] = str(tmp_path / "l.json")
    if kind == "parquet":
        table = pa.table({"image": pa.array([IMAGES[0]] * 4, pa.binary()), "caption": [None, *captions[1:]]})
        pq.write_table(table, tmp_path / "a.parquet")
        files = {"kind": kind, "path": str(tmp_path / "a.parquet")}
    if kind == "webdataset":
        pairs = [(f"{at}.png", IMAGES[0], f"{at}.txt", caption.encode()) for at, caption in enumerate(captions)]
        write_tar(tmp_path / "a.tar", {name: data for one, image, two, text in pairs
                                       for name, data in ((one, image), (two, text))})  # fmt: skip
        files = {"kind": kind, "path": str(tmp_path / "a.tar")}
    if kind == "conversations":
        turns = [[{"from": "human", "value": "?"}, {"from": "gpt", "value": caption}] for caption in captions]
        entries = [{"image": f"{at}.png", "conversations": each} for at, each in enumerate(turns)]
        (tmp_path / "a.json").write_text(json.dumps(entries))
        files = {"kind": kind, "path": str(tmp_path / "a.json"), "image_folder": str(tmp_path / "in")}
    rows, samples, outcome = run_download(DownloadConfig(files=files, max_failed_fraction=1), tmp_path)
    assert [row["status"] for row in rows] == ["no_caption"] * 3 + ["ok"]
    assert [sample.text for sample in samples] == [CAPTIONS[0]]
    assert outcome.metrics["num_failed"] == 3


def test_empty_captions_that_a_filter_leaves_out_are_no_failures(tmp_path: Path) -> None:
    fill(tmp_path / "in", {"0.png": IMAGES[0], "0.txt": "", "1.png": IMAGES[1], "1.txt": "good"})
    config = config_of(tmp_path / "in", filters={"min_caption_characters": 1})
    rows, _, outcome = run_download(config, tmp_path)
    assert [row["status"] for row in rows] == ["filtered", "ok"] and outcome.metrics["num_failed"] == 0


@pytest.mark.parametrize("name", ["photos [2023]", "what?", "star*"])
@pytest.mark.parametrize("kind", ["folder", "list", "tar", "parquet", "url_list"])
def test_every_source_is_read_from_paths_that_look_like_patterns(tmp_path: Path, kind: str, name: str) -> None:
    given = fill(tmp_path / name, {"1.png": IMAGES[0], "1.txt": "red", f"{name}.csv": "file_name,caption\n1.png,red\n"})
    write_tar(given / f"{name}.tar", {"1.png": IMAGES[0], "1.txt": b"red"})
    pq.write_table(pa.table({"image": [IMAGES[0]], "caption": ["red"]}), given / f"{name}.parquet")
    config = {
        "folder": config_of(given),
        "list": config_of(given, given / f"{name}.csv"),
        "tar": DownloadConfig(files={"kind": "webdataset", "path": str(given / f"{name}.tar")}),
        "parquet": DownloadConfig(files={"kind": "parquet", "path": str(given / f"{name}.parquet")}),
        "url_list": DownloadConfig(url_list=str(given / f"{name}.csv"), url_column="file_name"),
    }[kind]
    assert read_rows(config)["caption"].to_pylist() == ["red"]
    assert open_source(config).content()
