"""One shard of a download: fetch its rows, check them, store what is good and write the receipt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from models.images import Limits
from stages.artifacts.rows import FILTERED, OK
from stages.download.counts import receipt_of
from stages.download.filters import FilterConfig
from stages.download.image_facts import Inspect, Inspector, apart
from stages.download.image_rows import DescribedRow, describe, unwanted_caption, without_image
from stages.download.sources.source import Fetched, Row, Source
from stages.runtime.child_process import DEATHS_BEFORE_ISOLATION
from storage.image_shards import ImageSample, read_image_shard, write_image_shard
from storage.manifest import FileEntry
from storage.store import Store
from storage.tables import image_metadata_table, read_table, write_table

logger = logging.getLogger(__name__)


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
        shard, store, key = item["shard"], self.store, self.action_key
        if (found := store.receipt(key, shard)) is not None:
            # a worker can die between the receipt and its answer; then the item comes again
            return {"shard": shard, "receipt": found}
        with store.attempt_at(key, shard) as deaths, self._inspector(shard, deaths) as inspect:
            receipt = store.write_receipt(key, shard, self._make(item, inspect))
        if deaths:
            store.forget_attempts(key, shard)
        return {"shard": shard, "receipt": receipt}

    def _inspector(self, shard: str, deaths: int) -> AbstractContextManager[Inspect]:
        """What decodes the images; in a child process where workers died of the shard."""
        factory = partial(Inspector, self.limits, self.filters.near_duplicate_bits is not None)
        if deaths < DEATHS_BEFORE_ISOLATION:
            return nullcontext(factory())
        logger.warning("%d workers died on shard %s: decoding its images in a child process", deaths, shard)
        return apart(factory)

    def _make(self, item: dict[str, Any], inspect: Inspect) -> dict[str, Any]:
        """Store a shard's files and return its receipt."""
        rows = read_slice(self.store.fetch(FileEntry.from_json(item["rows"])), item["start"], item["count"]).to_pylist()
        with self.store.attempt_dir() as scratch:
            shard = _Shard(scratch / "images")
            self._carry(item, shard)
            self._fetch(item, rows, shard, scratch / "fetched", inspect)
            return self._put(item, rows, shard, scratch)

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

    def _fetch(self, item: dict[str, Any], rows: list[Row], shard: _Shard, scratch: Path, inspect: Inspect) -> None:
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

        def describe_row(position: int, fetched: Fetched | None) -> None:
            row, key = rows[position], _key(item, position)
            shard.add(position, describe(row, key, item["shard"], fetched, inspect, self.filters))

        try:
            for index, fetched in self.source().fetch([rows[position] for position in wanted], scratch):
                describe_row(wanted[index], fetched)
        except ChildProcessError as error:
            raise ChildProcessError(f"shard {item['shard']} of the download: {error}") from error
        for position in (position for position in wanted if position not in shard.rows):
            describe_row(position, None)

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
