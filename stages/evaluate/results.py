"""What evaluation found, as Parquet: the rows of one shard, and those of all shards together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from stages.mapped.engine import LeftOut
from stages.metrics.reconstructions import DRAWN_FEATURES, ORIGINAL_FEATURES, RANK, TEACHER_RANK
from storage.manifest import FileEntry
from storage.store import Store
from storage.tables import read_table, write_table

FILES = {"reconstruction": "reconstructions", "understanding": "answers", "generation": "drawings"}
"""Name of each task's table in the artifact."""

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


LEFT_OUT = "left_out"
"""Name of the table of rows that could not be measured."""


def store_rows(store: Store, shard: str, task: str, rows: list[dict[str, Any]]) -> list[FileEntry]:
    """Write what was found on the rows of one shard into the store; no file where nothing was found."""
    if not rows:
        return []
    names = list(rows[0])
    arrays = [pa.array([row[name] for row in rows], _TYPES.get(name)) for name in names]
    with store.scratch_dir() as scratch:
        write_table(pa.table(arrays, names=names), scratch / "rows.parquet")
        return [store.put_file(scratch / "rows.parquet", f"{FILES[task]}/{shard}.parquet")]


def gather(store: Store, shards: Iterable[tuple[str, Sequence[FileEntry]]]) -> dict[str, pa.Table]:
    """Join the tables of each task.

    Args:
        store: holds them.
        shards: task and files of each shard, in order.
    """
    parts: dict[str, list[pa.Table]] = {}
    for task, files in shards:
        parts.setdefault(task, []).extend(read_table(store.fetch(entry)) for entry in files)
    return {task: pa.concat_tables(tables) for task, tables in parts.items() if tables}


def left_out_table(left_out: Mapping[str, Sequence[LeftOut]]) -> pa.Table:
    """Build the table of rows that could not be measured, with task, key, status and error, by task."""
    rows = [(task, row.key, row.status, row.error) for task, some in left_out.items() for row in some]
    columns = zip(*rows, strict=True)
    names = ("task", "key", "status", "error")
    return pa.table({name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)})
