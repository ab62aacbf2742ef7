"""What evaluation found, as Parquet: the rows of one shard, and those of all shards together."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from storage.manifest import FileEntry
from storage.store import Store
from storage.tables import read_table, write_table

FILES = {"reconstruction": "reconstructions", "understanding": "answers", "generation": "drawings"}
"""Name of each task's table in the artifact."""

ORIGINAL_FEATURES, DRAWN_FEATURES = "original_features", "reconstruction_features"
"""Columns that end in a Fréchet distance and do not stay in the table."""
RANK, TEACHER_RANK = "class_rank", "teacher_class_rank"
"""Columns of how many concepts lie nearer to an image than its own, by its codes and by the teacher."""
TEXT_CUT = "text_cut"
"""Column of whether the texts of a row were too long for the language model, and lost their end."""

_TYPES: dict[str, pa.DataType] = {
    "answer": pa.int32(),
    "picked": pa.int32(),
    "choices": pa.list_(pa.string()),
    "log_likelihoods": pa.list_(pa.float64()),
    "pixel_baseline_correct": pa.bool_(),
    RANK: pa.int32(),
    TEACHER_RANK: pa.int32(),
    ORIGINAL_FEATURES: pa.list_(pa.float32()),
    DRAWN_FEATURES: pa.list_(pa.float32()),
}


def store_rows(store: Store, action_key: str, shard: str, task: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows of one shard into the store, and its receipt."""
    names = list(rows[0])
    arrays = [pa.array([row[name] for row in rows], _TYPES.get(name)) for name in names]
    with store.attempt_dir() as scratch:
        write_table(pa.table(arrays, names=names), scratch / "rows.parquet")
        entry = store.put_file(scratch / "rows.parquet", f"{FILES[task]}/{shard}.parquet")
    store.write_receipt(action_key, shard, {"files": [entry.to_json()], "task": task})


def gather(store: Store, receipts: dict[str, dict[str, Any]]) -> dict[str, pa.Table]:
    """All rows of each task, in the order of the shards."""
    parts: dict[str, list[pa.Table]] = {}
    for shard in sorted(receipts):
        receipt = receipts[shard]
        tables = [read_table(store.fetch(FileEntry.from_json(entry))) for entry in receipt["files"]]
        parts.setdefault(receipt["task"], []).extend(tables)
    return {task: pa.concat_tables(tables) for task, tables in parts.items()}
