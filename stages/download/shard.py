"""The worker of `download`: it fetches the rows of a shard, checks them, and stores the images and metadata."""

from __future__ import annotations

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
from stages.artifacts.shards import images_file, metadata_file
from stages.download.counts import DownloadedShard, receipt_of
from stages.download.filters import FilterConfig
from stages.download.image_facts import Inspect, Inspector, in_child_process
from stages.download.image_rows import DescribedRow, describe, unwanted_caption, without_image
from stages.download.sources.source import Fetched, Row, Source
from stages.mapped.engine import Shard
from storage.image_shards import ImageSample, read_image_shard, write_image_shard
from storage.manifest import FileEntry
from storage.store import Store
from storage.tables import image_metadata_table, read_table, write_table


@dataclass(frozen=True)
class RowRange(Shard):
    """A range of the plan's rows, which becomes one shard."""

    start: int
    count: int
    earlier: tuple[FileEntry, ...] = ()
    """The shard's images and metadata of an earlier attempt, whose usable and filtered rows are kept."""

    def key(self, position: int) -> str:
        """Return the key of a row by its position in this range."""
        return f"{self.start + position:09d}"


@dataclass(frozen=True)
class DownloadWorker:
    """Makes the shards of a download."""

    store: Store
    rows: FileEntry
    """The plan's Parquet file with all rows."""
    source: Callable[[], Source]
    """Opens the source in the worker process."""
    filters: FilterConfig
    limits: Limits
    extra_columns: tuple[str, ...]
    """Further columns of the rows, which are also stored with each image."""
    metadata_columns: tuple[str, ...]
    """Columns of the metadata after those of its schema."""

    def make(self, item: RowRange, *, isolated: bool) -> DownloadedShard:
        """Fetch the rows of a shard and store its files; see `stages.mapped.engine.MakesShards`."""
        rows = read_slice(self.store.fetch(self.rows), item.start, item.count).to_pylist()
        with self._inspector(isolated) as inspect, self.store.scratch_dir() as scratch:
            shard = _Shard(scratch / "images")
            self._carry(item, shard)
            self._fetch(item, rows, shard, scratch / "fetched", inspect)
            return self._put(item, rows, shard, scratch)

    def _inspector(self, isolated: bool) -> AbstractContextManager[Inspect]:
        """Return the inspector that decodes images, in a child process if workers died of the shard."""
        factory = partial(Inspector, self.limits, self.filters.near_duplicate_bits is not None)
        return in_child_process(factory) if isolated else nullcontext(factory())

    def _carry(self, item: RowRange, shard: _Shard) -> None:
        """Copy the usable and filtered rows of an earlier attempt."""
        if not item.earlier:
            return
        images, metadata = map(self.store.fetch, item.earlier)
        positions = {}
        for position, row in enumerate(read_table(metadata).to_pylist()):
            if row["status"] == FILTERED:
                shard.add(position, DescribedRow(row, None))
            elif row["status"] == OK:
                positions[row["key"]] = position, row
        for sample in read_image_shard(images):
            position, row = positions[sample.key]
            shard.add(position, DescribedRow(row, sample.image, sample.extension))

    def _fetch(self, item: RowRange, rows: list[Row], shard: _Shard, scratch: Path, inspect: Inspect) -> None:
        wanted = []
        for position in (position for position in range(len(rows)) if position not in shard.rows):
            unwanted = unwanted_caption(rows[position], self.filters)
            if unwanted is None:
                wanted.append(position)
            else:
                shard.add(position, without_image(rows[position], item.key(position), item.shard, unwanted))
        if not wanted:
            return
        scratch.mkdir()

        def describe_row(position: int, fetched: Fetched | None) -> None:
            row, key = rows[position], item.key(position)
            shard.add(position, describe(row, key, item.shard, fetched, inspect, self.filters))

        try:
            for index, fetched in self.source().fetch([rows[position] for position in wanted], scratch):
                describe_row(wanted[index], fetched)
        except ChildProcessError as error:
            raise ChildProcessError(f"shard {item.shard} of the download: {error}") from error
        for position in (position for position in wanted if position not in shard.rows):
            describe_row(position, None)

    def _put(self, item: RowRange, rows: list[Row], shard: _Shard, scratch: Path) -> DownloadedShard:
        metadata = [shard.rows[position] for position in range(len(rows))]
        write_image_shard(scratch / "shard.tar", self._samples(rows, shard))
        write_table(image_metadata_table(metadata, self.metadata_columns), scratch / "shard.parquet")
        files = [
            self.store.put_file(scratch / "shard.tar", images_file(item.shard)),
            self.store.put_file(scratch / "shard.parquet", metadata_file(item.shard)),
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
    """Collects rows by position as they arrive; images are kept on disk, as a shard may not fit into memory."""

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
    """Read a range of rows of a Parquet file; only the row groups that contain them are read."""
    with pq.ParquetFile(path) as file:
        groups: list[int] = []
        ends = first = 0
        for group in range(file.num_row_groups):
            begins, ends = ends, ends + file.metadata.row_group(group).num_rows
            if ends > start and begins < start + count:
                first = first if groups else begins
                groups.append(group)
        return file.read_row_groups(groups).slice(start - first, count)
