"""The engine of mapped stages: which shards are made, by whom, and what stays when a worker dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from infra.executors import Item, LocalExecutor, WorkerFactory
from models.config import Config
from stages.mapped.engine import FailureLimit, Finished, Job, LeftOut, Receipt, Shard, finish_shards
from stages.protocol import StageContext
from storage.manifest import FileEntry
from storage.store import Store

KEY = "0" * 64


@dataclass(frozen=True)
class Numbers(Shard):
    count: int
    hint: str = ""


@dataclass(frozen=True)
class Counted(Receipt):
    count: int
    left_out: tuple[LeftOut, ...] = ()


@dataclass
class Maker:
    """Makes a file a shard, and notes what it was asked for."""

    store: Store
    made: list[tuple[str, bool]] = field(default_factory=list)
    fails_on: str = ""

    def __call__(self) -> Maker:
        return self

    def make(self, shard: Numbers, *, isolated: bool) -> Counted:
        self.made.append((shard.shard + shard.hint, isolated))
        if shard.shard == self.fails_on:
            raise RuntimeError("cannot")
        return Counted((self.store.put_bytes(shard.shard.encode(), f"files/{shard.shard}"),), shard.count)


class Watched(LocalExecutor):
    """Notes whether its iteration was ended early, and lets something happen before each item."""

    ended = False

    def map(
        self, factory: WorkerFactory, items: list[Item], *, num_workers: int, num_gpus: float = 0
    ) -> Iterator[Item]:
        try:
            yield from super().map(factory, items, num_workers=num_workers, num_gpus=num_gpus)
        except GeneratorExit:
            self.ended = True
            raise


@pytest.fixture
def context(tmp_path: Path) -> StageContext[Any]:
    return StageContext(Config(), 0, {}, Store(str(tmp_path / "store")), KEY, Watched(), tmp_path)


def shards(*names: str) -> list[Numbers]:
    return [Numbers(name, 10) for name in names]


def finish(context: StageContext[Any], maker: Maker, *names: str, **options: Any) -> list[Finished[Counted]]:
    job = Job(maker, Numbers, Counted, "count shards", "numbers", lambda receipt: receipt.count)
    return list(finish_shards(context, shards(*names), job, num_workers=1, **options))


def test_what_is_finished_comes_first_and_is_not_made_again(context: StageContext[Any]) -> None:
    first, second = Maker(context.store), Maker(context.store)
    finish(context, first, "b")
    found = finish(context, second, "a", "b", "c")
    assert [shard for shard, _ in found] == ["b", "a", "c"]
    assert first.made == [("b", False)] and second.made == [("a", False), ("c", False)]
    assert all(receipt.count == 10 for _, receipt in found)
    assert [receipt.files[0].path for _, receipt in found] == ["files/b", "files/a", "files/c"]


def test_only_the_shards_that_are_left_are_prepared(context: StageContext[Any]) -> None:
    maker = Maker(context.store)
    finish(context, maker, "a")

    def prepare(left: list[Numbers]) -> list[Numbers]:
        return [Numbers(shard.shard, shard.count, hint="!") for shard in left]

    finish(context, maker, "a", "b", prepare=prepare)
    assert maker.made == [("a", False), ("b!", False)]


def test_a_shard_that_another_run_finished_meanwhile_is_taken_from_it(context: StageContext[Any]) -> None:
    maker, entry = Maker(context.store), context.store.put_bytes(b"theirs", "files/b")

    def meanwhile(left: list[Numbers]) -> list[Numbers]:
        context.store.work(KEY).write_receipt("b", Counted((entry,), 7).to_json())
        return left

    found = finish(context, maker, "a", "b", prepare=meanwhile)
    assert maker.made == [("a", False)] and found[1].receipt == Counted((entry,), 7)


@pytest.mark.parametrize(("deaths", "isolated"), [(0, False), (1, False), (2, True), (3, True)])
def test_a_shard_on_which_two_workers_died_is_made_in_isolation_and_its_marks_go(
    context: StageContext[Any], deaths: int, isolated: bool
) -> None:
    for number in range(deaths):
        context.store.objects.put(f"marks/{KEY}/a/dead{number}.json", b"{}")
    maker = Maker(context.store)
    finish(context, maker, "a", "b")
    assert maker.made == [("a", isolated), ("b", False)]
    assert context.store.objects.list("marks/") == []


def test_an_exception_is_no_death_and_ends_the_stage(context: StageContext[Any]) -> None:
    with pytest.raises(RuntimeError, match="cannot"):
        finish(context, Maker(context.store, fails_on="b"), "a", "b", "c")
    assert context.store.objects.list("marks/") == []
    assert [shard for shard, _ in context.store.work(KEY).receipts()] == ["a"]


def test_workers_stop_when_the_stage_leaves_early(context: StageContext[Any]) -> None:
    job = Job(Maker(context.store), Numbers, Counted, "count shards", "numbers", lambda receipt: receipt.count)
    finished = finish_shards(context, shards("a", "b", "c"), job, num_workers=1)
    assert next(finished).shard == "a"
    finished.close()
    assert isinstance(context.executor, Watched) and context.executor.ended


def test_a_receipt_of_another_version_names_what_to_remove(context: StageContext[Any]) -> None:
    context.store.work(KEY).write_receipt("a", {"files": [], "number": 3})
    with pytest.raises(ValueError, match=rf"receipt of shard a is of another version.*count.*remove receipts/{KEY}/"):
        finish(context, Maker(context.store), "a")


def test_shards_and_receipts_survive_json_and_are_checked() -> None:
    entry = FileEntry("codes/a.parquet", 3, "0" * 64)
    receipt = Counted((entry,), 2, (LeftOut("k", "filtered", "why"),))
    assert Counted.from_json(receipt.to_json()) == receipt
    assert receipt.to_json()["files"] == [entry.to_json()]
    assert Numbers("a", 1).to_json() == {"shard": "a", "count": 1}, "defaults stay out of plans"
    with pytest.raises(ValidationError):
        Numbers.from_json({"shard": "a", "count": "many"})
    with pytest.raises(ValidationError):
        Counted.from_json({"files": [{"path": os.sep, "size": 1, "sha256": "0" * 64}], "count": 1})


def test_the_limit_on_failures_is_a_part_of_all_inputs() -> None:
    limit = FailureLimit("tokenize.max_failed_fraction", 0.25, 8, "images could not be tokenized")
    assert [limit.is_passed(failed) for failed in (0, 2, 3)] == [False, False, True]
    assert str(limit.error(3, "first: k: damaged", "raise the limit", to_come=4)) == (
        "3 of 8 images could not be tokenized with 4 still to come, more than tokenize.max_failed_fraction=0.25 "
        "(first: k: damaged); raise the limit"
    )
