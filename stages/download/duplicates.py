"""Removal of duplicate images: the first one in the list stays, independent of the workers' speed.

It runs after all shards are finished, on their metadata alone; only shards that lose an image are rewritten.
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
    """The image file and the metadata file of a shard."""

    images: FileEntry
    metadata: FileEntry


def find_duplicates(store: Store, shards: Sequence[ShardFiles], filters: FilterConfig) -> dict[int, dict[int, str]]:
    """Find duplicate rows; returns the reason by row number, by index of the shard.

    Args:
        store: the store with the shards.
        shards: the shards in the list's order.
        filters: the kinds of duplicates to find.
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
    """Mark each hash that differs in at most `max_bits` bits from an earlier hash that is not marked itself.

    Two 64-bit hashes that differ in `max_bits` bits are equal in at least one of `max_bits + 1` pieces, so only hashes
    that share a piece are compared.

    Args:
        hashes: uint64 `[N]`.
        max_bits: largest number of different bits, of 64.

    Returns:
        bool `[N]`.
    """
    # a repeated value duplicates its first occurrence or what that one duplicates, so only first ones are searched
    first = np.sort(np.unique(hashes, return_index=True)[1])
    alike = np.ones(len(hashes), bool)
    alike[first] = _near_a_kept_one(hashes[first], max_bits)
    return alike


def _near_a_kept_one(values: np.ndarray, max_bits: int) -> np.ndarray:
    """Compute `near_duplicates` for distinct values; bool `[N]`.

    The sizes of all buckets are known beforehand, so that the kept values of each bucket are stored in a slice of one
    array, where numpy compares them all at once.
    """
    pieces = _pieces(max_bits + 1)
    buckets = np.empty((len(values), len(pieces)), np.int64)  # [N, P]: the bucket of a value for each piece
    sizes = np.zeros(0, np.int64)
    for index, (shift, mask) in enumerate(pieces):
        keys = (values >> np.uint64(shift)) & np.uint64(mask)
        _, numbers, counts = np.unique(keys, return_inverse=True, return_counts=True)
        buckets[:, index] = numbers + len(sizes)
        sizes = np.concatenate([sizes, counts])
    starts = (np.cumsum(sizes) - sizes).tolist()
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
    """Rewrites a shard without some of its images; an item has its files and the rows with their reasons.

    The result has the receipts of the shard `before` and `after`.
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
        with self.store.scratch_dir() as scratch:
            samples = (s for s in read_image_shard(self.store.fetch(files[0])) if s.key not in gone)
            write_image_shard(scratch / "shard.tar", samples)
            write_table(table, scratch / "shard.parquet")
            written = [
                self.store.put_file(scratch / name, file.path)
                for name, file in zip(("shard.tar", "shard.parquet"), files, strict=True)
            ]
        after = receipt_of(written, table.to_pylist())
        return {"shard": item["shard"], "before": before.to_json(), "after": after.to_json()}


def _words(digests: Sequence[str], words: int) -> np.ndarray:
    """Convert hexadecimal digits to uint64 `[N, words]`."""
    return np.frombuffer(bytes.fromhex("".join(digests)), ">u8").astype(np.uint64).reshape(len(digests), words)


def _repeated(values: np.ndarray) -> np.ndarray:
    """Mark the rows of `[N, words]` that equal an earlier row."""
    _, first = np.unique(values, axis=0, return_index=True)
    repeated = np.ones(len(values), bool)
    repeated[first] = False
    return repeated


def _pieces(count: int) -> list[tuple[int, int]]:
    """Return shift and mask of `count` pieces that make up the bits of a hash, or of one empty piece that all share.

    The latter if the pieces are so short that most hashes share one; then comparing all pairs takes less time.
    """
    ends = [HASH_BITS * index // count for index in range(count + 1)]
    widths = [end - start for start, end in pairwise(ends)]
    if sum(2.0**-width for width in widths) >= 1:
        return [(0, 0)]
    return [(start, (1 << width) - 1) for start, width in zip(ends, widths, strict=False)]
