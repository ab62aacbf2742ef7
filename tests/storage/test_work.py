"""Work in progress on one action."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

from storage.store import Store
from storage.work import Work


class _Receipt(dict[str, Any]):
    """One that weak references can watch."""


def test_no_more_receipts_are_in_memory_than_are_read_together(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.work._RECEIPTS_AT_A_TIME", 4)
    work, read, most = local_store.work("key"), Work._valid_receipt, 0
    made: list[weakref.ref[_Receipt]] = []

    def watched(self: Work, path: str) -> _Receipt:
        receipt = _Receipt(read(self, path) or {})
        made.append(weakref.ref(receipt))
        return receipt

    monkeypatch.setattr(Work, "_valid_receipt", watched)
    shards = [str(number) for number in range(30)]
    for shard in shards:
        if shard != "7":
            work.write_receipt(shard, {"files": []})
    names = []
    for name, _ in work.receipts(shards):
        names.append(name)
        most = max(most, sum(reference() is not None for reference in made))
    assert names == [shard for shard in shards if shard != "7"]
    assert 0 < most <= 8


def test_receipts_come_in_the_order_that_is_asked_for_or_sorted(local_store: Store) -> None:
    work = local_store.work("key")
    for shard in ("b", "a", "c"):
        work.write_receipt(shard, {"files": []})
    assert [name for name, _ in work.receipts()] == ["a", "b", "c"]
    assert [name for name, _ in work.receipts(["c", "missing", "a"])] == ["c", "a"]


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden"])
def test_only_plain_names_reach_the_store(local_store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="is no plain name"):
        local_store.work(name)
    with pytest.raises(ValueError, match="is no plain name"):
        local_store.work("key").write_receipt(name, {"files": []})
