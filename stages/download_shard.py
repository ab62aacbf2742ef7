"""One shard of a download: fetch its rows, check them, store what is good and write the receipt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.filters import FilterConfig
from stages.image_rows import DescribedRow, Limits, describe, unwanted_caption, without_image
from stages.shard_counts import receipt_of
from stages.sources.source import FILTERED, OK, Row, Source
from storage.image_shards import ImageSample, read_image_shard, write_image_shard
from storage.manifest import FileEntry
from storage.store import Store
from storage.tables import image_metadata_table, read_table, write_table


@dataclass(frozen=True)
class DownloadShard:
    """Works on one item: a shard's name, its `start` and `count` in the plan's rows, and its files of an `earlier`
    attempt, whose good and filtered rows are kept as they are.
    """

    store: Store
    action_key: str
    source: Callable[[], Source]
    """Opens the source in the process that fetches."""
    filters: FilterConfig
    limits: Limits
    extra_columns: tuple[str, ...]
    """Of the rows; they also go beside each image."""
    metadata_columns: tuple[str, ...]
    """Of the metadata, after those of its schema."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        # a worker can die between the receipt and its answer; then the item comes again
        if self.store.receipt(self.action_key, item["shard"]) is not None:
            return {"shard": item["shard"]}
        rows = read_slice(self.store.fetch(FileEntry.from_json(item["rows"])), item["start"], item["count"]).to_pylist()
        with self.store.attempt_dir() as scratch:
            shard = _Shard(scratch / "images")
            self._carry(item, shard)
            self._fetch(item, rows, shard, scratch / "fetched")
            receipt = self._put(item, rows, shard, scratch)
        self.store.write_receipt(self.action_key, item["shard"], receipt)
        return {"shard": item["shard"]}

    def _carry(self, item: dict[str, Any], shard: _Shard) -> None:
        """Take over what an earlier attempt got."""
        if item["earlier"] is None:
            return
        images, metadata = (self.store.fetch(FileEntry.from_json(entry)) for entry in item["earlier"])
        positions = {}
        for position, row in enumerate(read_table(metadata).to_pylist()):
            if row["status"] == FILTERED:
                shard.add(position, DescribedRow(row, None))
            elif row["status"] == OK:
                positions[row["key"]] = position, row
        for sample in read_image_shard(images):
            position, row = positions[sample.key]
            shard.add(position, DescribedRow(row, sample.image, sample.extension))

    def _fetch(self, item: dict[str, Any], rows: list[Row], shard: _Shard, scratch: Path) -> None:
        wanted = []
        for position in (position for position in range(len(rows)) if position not in shard.rows):
            unwanted = unwanted_caption(rows[position], self.filters)
            if unwanted is None:
                wanted.append(position)
            else:
                shard.add(position, without_image(rows[position], _key(item, position), item["shard"], unwanted))
        if not wanted:
            return
        scratch.mkdir()
        for index, fetched in self.source().fetch([rows[position] for position in wanted], scratch):
            position = wanted[index]
            key = _key(item, position)
            shard.add(position, describe(rows[position], key, item["shard"], fetched, self.limits, self.filters))
        for position in (position for position in wanted if position not in shard.rows):
            key = _key(item, position)
            shard.add(position, describe(rows[position], key, item["shard"], None, self.limits, self.filters))

    def _put(self, item: dict[str, Any], rows: list[Row], shard: _Shard, scratch: Path) -> dict[str, Any]:
        metadata = [shard.rows[position] for position in range(len(rows))]
        write_image_shard(scratch / "shard.tar", self._samples(rows, shard))
        write_table(image_metadata_table(metadata, self.metadata_columns), scratch / "shard.parquet")
        files = [
            self.store.put_file(scratch / "shard.tar", f"images/{item['shard']}.tar"),
            self.store.put_file(scratch / "shard.parquet", f"metadata/{item['shard']}.parquet"),
        ]
        return receipt_of(files, metadata)

    def _samples(self, rows: list[Row], shard: _Shard) -> Iterator[ImageSample]:
        for position, row in enumerate(rows):
            if position in shard.extensions:
                known = {name: row[name] for name in self.extra_columns} | {"url": row["url"]}
                yield ImageSample(
                    shard.rows[position]["key"],
                    shard.image(position),
                    shard.extensions[position],
                    row["caption"],
                    known,
                )


@dataclass
class _Shard:
    """Rows by position as they arrive; the images wait on disk, since a shard of large ones may not fit in memory."""

    folder: Path
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    extensions: dict[int, str] = field(default_factory=dict)

    def add(self, position: int, row: DescribedRow) -> None:
        self.rows[position] = row.metadata
        if row.image is not None:
            self.folder.mkdir(exist_ok=True)
            (self.folder / str(position)).write_bytes(row.image)
            self.extensions[position] = row.extension

    def image(self, position: int) -> bytes:
        return (self.folder / str(position)).read_bytes()


def read_slice(path: Path, start: int, count: int) -> pa.Table:
    """Some rows of a Parquet file; only the row groups that hold them are read."""
    with pq.ParquetFile(path) as file:
        groups: list[int] = []
        ends = first = 0
        for group in range(file.num_row_groups):
            begins, ends = ends, ends + file.metadata.row_group(group).num_rows
            if ends > start and begins < start + count:
                first = first if groups else begins
                groups.append(group)
        return file.read_row_groups(groups).slice(start - first, count)


def _key(item: dict[str, Any], position: int) -> str:
    return f"{item['start'] + position:09d}"
