"""Codes as another project's tokenizer would give them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from storage.code_table import CodeTable, CodeTableInfo, write_code_shard


def write_codes(
    table: CodeTable, folder: Path, *, leave_out: int = 0, shape: tuple[int, int, int, int] = (1, 1, 1, 6)
) -> None:
    """Codes of another layout for every row of a table: the first of its own, modulo 32."""
    folder.mkdir()
    transform = {"image_size": 40, "resize": "squash"}
    info = CodeTableInfo(shape, ("theirs",) * shape[0], (32,) * shape[0], "SEED-2", transform)
    base = table.codes.reshape(len(table.keys), -1)[:, : int(np.prod(shape))].astype(np.int64) % 32
    codes = base.reshape(len(table.keys), *shape)
    keys, views = table.keys[leave_out:], table.columns["view"][leave_out:]
    half = len(keys) // 2
    for number, part in enumerate((slice(half, None), slice(half))):  # in another order, cut elsewhere
        columns = {"view": views[part]}
        write_code_shard(folder / f"{number}.parquet", info, keys[part], columns, codes[leave_out:][part])
