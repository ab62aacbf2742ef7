"""Death before and after every call of the store, on a folder and on S3: the next run ends with the same digest."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.executors import LocalExecutor
from stages.mapped.engine import Job, Receipt, Shard, finish_shards
from stages.pipeline.execution import StageResult, run_stage
from stages.pipeline.recipe import STAGES, Recipe, load_recipe
from stages.protocol import Outcome, Stage, StageContext
from storage.blobs import blob_key
from storage.digests import sha256_bytes
from storage.store import Store
from tests.helpers.crashing import die_everywhere
from tests.helpers.light import light_run
from tests.helpers.tiny import CAPTIONS_ONLY

SHARDS = ["0", "1"]


@dataclass(frozen=True)
class _Maker:
    """Makes a file a shard."""

    store: Store
    scratch: Path

    def __call__(self) -> _Maker:
        return self

    def make(self, shard: Shard, *, isolated: bool) -> Receipt:
        path = self.scratch / shard.shard
        path.write_bytes(shard.shard.encode() * 100)
        return Receipt((self.store.put_file(path, f"files/{shard.shard}"),))


def _square(context: StageContext[Any]) -> Outcome:
    """The smallest stage that maps: plan, a file and a receipt a shard, outcome."""
    plan = context.store.work(context.action_key).create_plan({"shards": SHARDS})
    shards = [Shard(name) for name in plan["shards"]]
    job = Job(_Maker(context.store, context.scratch), Shard, Receipt, "square shards", "files", lambda receipt: 1)
    receipts = dict(finish_shards(context, shards, job, num_workers=1))
    return Outcome("squares", [entry for shard in shards for entry in receipts[shard.shard].files])


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe whose stage `square` is that one."""
    monkeypatch.setitem(STAGES, "square", Stage("square", "tokenize", (), _square))
    return load_recipe("tiny")


def _check_visible(store: Store) -> None:
    """Whatever a reader can see is whole."""
    for key in store.objects.list("cas/"):
        assert sha256_bytes(store.objects.read(key)) == key.rpartition("/")[2]
    for folder in ("actions/", "plans/", "receipts/", "runs/"):
        for key in store.objects.list(folder):
            json.loads(store.objects.read(key))
    for info in store.artifacts():
        assert store.lookup(info.action_key) is not None


def _every(uri: str, *, local: int, s3: int) -> int:
    """Every n-th call dies, on S3, where a call takes longer, fewer of them; all with MUSEVL_CRASH_POINTS=all."""
    if os.environ.get("MUSEVL_CRASH_POINTS") == "all":
        return 1
    return s3 if uri.startswith("s3://") else local


def _stores(uri: str) -> Callable[[], Store]:
    numbers = itertools.count()
    return lambda: Store(f"{uri}/{next(numbers)}")


@pytest.mark.slow
def test_a_mapped_stage_that_dies_at_any_call_of_the_store_is_completed_by_the_next_run(
    recipe: Recipe, store_uri: str
) -> None:
    fresh = _stores(store_uri)
    expected = run_stage("square", recipe, fresh(), LocalExecutor()).digest

    def resume(store: Store) -> None:
        _check_visible(store)
        assert run_stage("square", recipe, store, LocalExecutor()).digest == expected
        assert store.verify() == []

    every = _every(store_uri, local=1, s3=5)
    num_calls = die_everywhere(
        fresh, lambda store: run_stage("square", recipe, store, LocalExecutor()), resume, every=every
    )
    assert num_calls > 20, "the stage calls the store too seldom for this test to mean something"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["download", "tokenize"])
def test_a_real_stage_that_dies_at_any_call_of_the_store_is_completed_by_the_next_run(
    stage: str, store_uri: str, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    run = light_run(images, num_images=4, rows_per_shard=2)
    recipe = run.recipe
    if stage == "download":
        for path in images.glob("*.png"):
            path.with_suffix(".txt").write_text(f"image {path.stem}")
        files = f"download.files={{kind: folder, path: {images}}}"
        recipe = load_recipe(str(run.recipe_path), [files, *CAPTIONS_ONLY])
    numbers = itertools.count()

    def fresh() -> Store:
        uri = f"{store_uri}/{next(numbers)}"
        return Store(uri) if stage == "download" else run.store(uri)

    def work(store: Store) -> StageResult:
        return run_stage(stage, recipe, store, LocalExecutor())

    expected = work(fresh())

    def resume(store: Store) -> None:
        _check_visible(store)
        before = {key: store.objects.read(key) for key in store.objects.list(f"receipts/{expected.action_key}")}
        assert work(store).digest == expected.digest
        assert all(store.objects.read(key) == data for key, data in before.items())
        assert len(dict(store.work(expected.action_key).receipts())) == 2

    assert die_everywhere(fresh, work, resume, every=_every(store_uri, local=7, s3=21)) > 30


@pytest.mark.parametrize("damage", ["cut", "flipped", "deleted"])
def test_a_damaged_blob_is_found_and_only_its_shard_is_made_again(damage: str, recipe: Recipe, store_uri: str) -> None:
    store = Store(store_uri)
    first = run_stage("square", recipe, store, LocalExecutor())
    key = blob_key(first.manifest.file("files/1").sha256)
    data = store.objects.read(key)
    store.objects.delete(key)
    if damage != "deleted":
        store.objects.put(key, data[:-1] if damage == "cut" else b"?" + data[1:])
    (problem,) = store.verify()
    assert (problem.digest, problem.path) == (first.digest, "files/1")
    again = run_stage("square", recipe, store, LocalExecutor())
    assert (again.hit, again.digest) == (False, first.digest)
    assert store.verify() == []
