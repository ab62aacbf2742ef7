"""The same three images with captions in every layout that people have, and a download of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.executors import LocalExecutor
from stages.download.stage import STAGE, DownloadConfig
from stages.protocol import Outcome, StageContext
from storage.image_shards import ImageSample, read_image_shard, write_image_shard
from storage.store import Store
from tests.helpers.misbehaving_server import png

COLOURS = ("red", "green", "blue")
CAPTIONS = [f"a {colour} picture" for colour in COLOURS]
IMAGES = [png(colour) for colour in COLOURS]


def run_download(config: DownloadConfig, folder: Path) -> tuple[list[dict[str, Any]], list[ImageSample], Outcome]:
    store = Store(str(folder / "store"))
    with store.scratch_dir() as scratch:  # not in `folder`: the files there are the source's
        context = StageContext(config, 0, {}, store, STAGE.action_key(config, 0, {}), LocalExecutor(), scratch)
        outcome = STAGE.run(context)
    rows, samples = list[dict[str, Any]](), list[ImageSample]()
    for entry in outcome.files:
        if entry.path.startswith("metadata/"):
            rows += pq.read_table(store.fetch(entry)).to_pylist()
        else:
            samples += read_image_shard(store.fetch(entry))
    return rows, samples, outcome


def make_webdataset(folder: Path) -> dict[str, Any]:
    samples = [
        ImageSample(f"{index:03d}", image, "png", caption, {"style": "plain"})
        for index, (image, caption) in enumerate(zip(IMAGES, CAPTIONS, strict=True))
    ]
    write_image_shard(folder / "train-0.tar", samples[:2])
    write_image_shard(folder / "train-1.tar", samples[2:])
    return {"kind": "webdataset", "path": str(folder / "train-*.tar")}


def make_parquet(folder: Path) -> dict[str, Any]:
    rows = [
        {"image": {"bytes": image, "path": None}, "caption": caption, "style": "plain"}
        for image, caption in zip(IMAGES, CAPTIONS, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows[:2]), folder / "0.parquet", row_group_size=1)
    pq.write_table(pa.Table.from_pylist(rows[2:]), folder / "1.parquet")
    return {"kind": "parquet", "path": str(folder)}


def make_plain_parquet(folder: Path) -> dict[str, Any]:
    table = pa.table({"jpg": pa.array(IMAGES, pa.large_binary()), "caption": CAPTIONS, "style": ["plain"] * 3})
    pq.write_table(table, folder / "all.parquet")
    return {"kind": "parquet", "path": str(folder / "all.parquet"), "image_column": "jpg"}


def make_folder(folder: Path) -> dict[str, Any]:
    (folder / "images" / "deep").mkdir(parents=True)
    names = ["a.png", "./deep/b.png", "c.png"]
    for name, image in zip(names, IMAGES, strict=True):
        (folder / "images" / name).write_bytes(image)
    rows = [
        {"file_name": name, "caption": caption, "style": "plain"} for name, caption in zip(names, CAPTIONS, strict=True)
    ]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"kind": "folder", "path": str(folder / "images"), "captions": str(folder / "list.jsonl")}


def make_conversations(folder: Path) -> dict[str, Any]:
    config = make_folder(folder)
    entries = [
        {
            "id": str(index),
            "image": name,
            "style": "plain",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": caption},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes."},
            ],
        }
        for index, (name, caption) in enumerate(zip(["a.png", "deep/b.png", "c.png"], CAPTIONS, strict=True))
    ]
    (folder / "llava.json").write_text(json.dumps(entries), encoding="utf-8")
    return {"kind": "conversations", "path": str(folder / "llava.json"), "image_folder": config["path"]}


MAKERS = [make_webdataset, make_parquet, make_plain_parquet, make_folder, make_conversations]
Maker = Callable[[Path], dict[str, Any]]


def zstandard(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)  # type: ignore[no-any-return]


def tar_of(members: Sequence[tuple[str, bytes | str]]) -> bytes:
    """A tar with these members in this order, where a name may come twice."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            encoded = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(encoded)
            tar.addfile(info, io.BytesIO(encoded))
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.write_bytes(tar_of(list(members.items())))
