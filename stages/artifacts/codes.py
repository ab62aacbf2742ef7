"""Reading of a `tokenize` artifact into memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.artifacts.rows import ORIGINAL, SPLIT, TRAIN, image_key, split_of
from stages.artifacts.shards import CODES
from stages.runtime.progress import tracked
from storage.code_table import CodeTableInfo, read_code_table
from storage.manifest import Manifest
from storage.store import Store


@dataclass(frozen=True)
class CodedRows:
    """Rows of a code table in memory."""

    info: CodeTableInfo
    keys: list[str]
    columns: dict[str, list[str]]
    """Text columns by name; `text` is the caption, the others are those of the data set."""
    codes: Tensor
    """`[R, N, D, h, w]` int32 codes of R rows."""

    def __len__(self) -> int:
        return len(self.keys)

    @functools.cached_property
    def originals(self) -> list[int]:
        """For each row, the index of the row of the original image that it is a view of."""
        place = {key: index for index, key in enumerate(self.keys)}
        views = self.columns["view"]
        return [place[image_key(key, view)] for key, view in zip(self.keys, views, strict=True)]

    def row(self, index: int) -> dict[str, str]:
        """Return the text fields of one row."""
        return {name: values[index] for name, values in self.columns.items()}


def load_rows(store: Store, table: Manifest, *, split: str, views: bool) -> CodedRows:
    """Load the rows of one split.

    Args:
        store: the store with the table.
        table: manifest of kind `code_table`.
        split: value of the `split` column; in a table without that column all rows are train.
        views: whether rows of augmented views are included.

    Raises:
        ValueError: the split has no row.
    """
    entries = table.files_under(CODES)
    loaded = read_code_table(
        [store.fetch(entry) for entry in tracked(iter(entries), len(entries), "reading the code table", delay=5)]
    )
    splits = loaded.columns.get(SPLIT) or [TRAIN] * len(loaded.keys)
    shown = loaded.columns["view"]
    kept = [
        index
        for index in range(len(loaded.keys))
        if split_of(splits[index]) == split and (views or shown[index] == ORIGINAL)
    ]
    if not kept:
        raise ValueError(f"code table {table.digest[:12]} has no row in split {split!r}; see its `split` column")
    columns = {name: [values[index] or "" for index in kept] for name, values in loaded.columns.items()}
    codes = torch.from_numpy(loaded.codes[kept].astype("int32"))
    return CodedRows(loaded.info, [loaded.keys[index] for index in kept], columns, codes)
