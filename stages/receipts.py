"""Receipts of many shards, read so that no more of them are in memory than are looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from storage.store import Store

_TOGETHER = 256
"""Receipts that are asked for, and held, at a time."""


def read_receipts(store: Store, action_key: str, shards: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and receipt of those of these shards that are done.

    A receipt of `download` counts the hosts of its rows, about 100 kB where each row has its own: the receipts of
    24,000 shards do not fit in memory together.
    """
    for start in range(0, len(shards), _TOGETHER):
        some = shards[start : start + _TOGETHER]
        found = store.objects.map(lambda shard: store.receipt(action_key, shard), some)
        yield from ((shard, receipt) for shard, receipt in zip(some, found, strict=True) if receipt is not None)
