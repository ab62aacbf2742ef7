"""Each image once: who came first in the list stays, whichever worker was faster.

It runs when every shard is there, over the shards' metadata alone; only shards that lose an image are written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.artifacts.rows import FILTERED, OK
from stages.download.counts import receipt_of
from stages.download.filters import HASH_BITS, PERCEPTUAL_HASH, FilterConfig
from storage.image_shards import read_image_shard, write_image_shard
from storage.manifest import FileEntry
from storage.store import Store
from storage.tables import read_table, write_table

EXACT = "same bytes as an image before it"
NEAR = "looks like an image before it"


@dataclass(frozen=True)
class ShardFiles:
    """The two files of a shard."""

    images: FileEntry
    metadata: FileEntry


def find_duplicates(store: Store, shards: Sequence[ShardFiles], filters: FilterConfig) -> dict[int, dict[int, str]]:
    """Rows to leave out: reason by row number, by index of the shard.

    Args:
        store: holds the shards.
        shards: in the list's order.
        filters: which kinds of duplicates are not wanted.
    """
    columns = ["status", "sha256", *([PERCEPTUAL_HASH] if filters.near_duplicate_bits is not None else [])]
    places, digests, hashes = [], [], []
    for index, shard in enumerate(shards):
        table = read_table(store.fetch(shard.metadata), columns)
        good = np.flatnonzero(pc.equal(table["status"], OK).to_numpy(zero_copy_only=False))
        rows = table.take(pa.array(good))
        places.append(np.stack([np.full(len(good), index), good], axis=1))
        digests.append(_words(rows["sha256"].to_pylist(), 4))
        if filters.near_duplicate_bits is not None:
            hashes.append(_words(rows[PERCEPTUAL_HASH].to_pylist(), 1)[:, 0])
    place = np.concatenate(places)
    repeated = _repeated(np.concatenate(digests)) if filters.exact_duplicates else np.zeros(len(place), bool)
    alike = np.zeros(len(place), bool)
    if filters.near_duplicate_bits is not None:
        rest = np.flatnonzero(~repeated)
        alike[rest] = near_duplicates(np.concatenate(hashes)[rest], filters.near_duplicate_bits)
    found: dict[int, dict[int, str]] = {}
    for index in np.flatnonzero(repeated | alike).tolist():
        shard_index, row = place[index].tolist()
        found.setdefault(shard_index, {})[row] = EXACT if repeated[index] else NEAR
    return found


def near_duplicates(hashes: np.ndarray, max_bits: int) -> np.ndarray:
    """Which hashes differ in at most `max_bits` bits from one that came before and is none of these itself.

    Two hashes of 64 bits that differ in `max_bits` agree in at least one of `max_bits + 1` pieces, so only those that
    share a piece are compared.

    Args:
        hashes: uint64 `[N]`.
        max_bits: of 64.

    Returns:
        bool `[N]`.
    """
    # a value that came before is alike to it, or to what that one is alike to; so only first ones are searched for
    first = np.sort(np.unique(hashes, return_index=True)[1])
    alike = np.ones(len(hashes), bool)
    alike[first] = _near_a_kept_one(hashes[first], max_bits)
    return alike


def _near_a_kept_one(values: np.ndarray, max_bits: int) -> np.ndarray:
    """`near_duplicates` of different values: bool `[N]`.

    All values of a bucket are known beforehand, so that those which are kept fill a room of it in one array, where
    numpy compares them all at once.
    """
    pieces = _pieces(max_bits + 1)
    buckets = np.empty((len(values), len(pieces)), np.int64)  # [N, P]: in which bucket a value is, by each piece
    room = np.zeros(0, np.int64)
    for index, (shift, mask) in enumerate(pieces):
        keys = (values >> np.uint64(shift)) & np.uint64(mask)
        _, numbers, counts = np.unique(keys, return_inverse=True, return_counts=True)
        buckets[:, index] = numbers + len(room)
        room = np.concatenate([room, counts])
    starts = (np.cumsum(room) - room).tolist()
    ends = list(starts)
    kept = np.empty(buckets.size, np.uint64)
    alike = np.zeros(len(values), bool)
    for index, value in enumerate(values):
        own = buckets[index].tolist()
        alike[index] = any(
            starts[bucket] < ends[bucket]
            and np.bitwise_count(kept[starts[bucket] : ends[bucket]] ^ value).min() <= max_bits
            for bucket in own
        )
        if not alike[index]:
            for bucket in own:
                kept[ends[bucket]] = value
                ends[bucket] += 1
    return alike


@dataclass(frozen=True)
class LeaveOut:
    """Writes a shard again without some of its images; an item has its files and the rows with their reasons.

    A result has the receipts of the shard `before` and `after`.
    """

    store: Store

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        files = [FileEntry.from_json(item[name]) for name in ("images", "metadata")]
        reasons = {int(row): reason for row, reason in item["rows"].items()}
        table = read_table(self.store.fetch(files[1]))
        before = receipt_of(files, table.to_pylist())
        status, error = table["status"].to_pylist(), table["error"].to_pylist()
        for row, reason in reasons.items():
            status[row], error[row] = FILTERED, reason
        for name, values in (("status", status), ("error", error)):
            at = table.column_names.index(name)
            table = table.set_column(at, table.schema.field(name), pa.array(values, pa.string()))
        gone = {table["key"][row].as_py() for row in reasons}
        with self.store.attempt_dir() as scratch:
            samples = (s for s in read_image_shard(self.store.fetch(files[0])) if s.key not in gone)
            write_image_shard(scratch / "shard.tar", samples)
            write_table(table, scratch / "shard.parquet")
            written = [
                self.store.put_file(scratch / name, file.path)
                for name, file in zip(("shard.tar", "shard.parquet"), files, strict=True)
            ]
        return {"shard": item["shard"], "before": before, "after": receipt_of(written, table.to_pylist())}


def _words(digests: Sequence[str], words: int) -> np.ndarray:
    """Hexadecimal digits as uint64 `[N, words]`."""
    return np.frombuffer(bytes.fromhex("".join(digests)), ">u8").astype(np.uint64).reshape(len(digests), words)


def _repeated(values: np.ndarray) -> np.ndarray:
    """Which rows of `[N, words]` are equal to one that came before."""
    _, first = np.unique(values, axis=0, return_index=True)
    repeated = np.ones(len(values), bool)
    repeated[first] = False
    return repeated


def _pieces(count: int) -> list[tuple[int, int]]:
    """Shift and mask of `count` pieces that make up the bits of a hash, or of one that all hashes share.

    The latter where the pieces are so short that most hashes share one: then comparing all with all takes less.
    """
    ends = [HASH_BITS * index // count for index in range(count + 1)]
    widths = [end - start for start, end in pairwise(ends)]
    if sum(2.0**-width for width in widths) >= 1:
        return [(0, 0)]
    return [(start, (1 << width) - 1) for start, width in zip(ends, widths, strict=False)]
