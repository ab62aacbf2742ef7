"""Images that bring the encoder down: found, recorded, and nothing else lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.executors import LocalExecutor
from stages.artifacts.rows import ORIGINAL
from stages.mapped.isolation import InputCrashed, Isolated, Unusable, isolate, loses_device
from stages.pipeline.execution import run_stage
from stages.pipeline.recipe import load_recipe
from stages.runtime.child_process import TRIES, ChildProcess, RaisedInChild, described
from stages.tokenize import stage as tokenize
from stages.tokenize.encoding import CodeArray, ImageBatch
from stages.tokenize.worker import CRASHED, FAILED, WORDING, EncoderSandbox
from storage.code_table import read_code_table
from storage.manifest import Manifest
from storage.store import Store
from storage.tables import read_table
from tests.helpers.light import LightRun, light_run
from tests.helpers.poison import PoisonableFactory

ROOT = Path(__file__).parents[3]


def _batch(count: int) -> ImageBatch:
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 2), np.uint8)
    return ImageBatch(pixels, [str(number) for number in range(count)], [ORIGINAL] * count)


def _isolate(encode: Callable[[ImageBatch, list[int]], CodeArray], count: int) -> Isolated[Any]:
    batch = _batch(count)
    return isolate(partial(encode, batch), batch.keys, WORDING)


class _Picky:
    """CodeArray are the pixels; fails while a bad image is among those asked for."""

    def __init__(self, bad: set[int], error: Exception) -> None:
        self.bad, self.error, self.calls = bad, error, 0

    def encode(self, batch: ImageBatch, slots: list[int]) -> CodeArray:
        self.calls += 1
        if self.bad & set(slots):
            raise self.error
        return batch.pixels[slots, :1, :1, :1].astype(np.int64)[:, :, None]


@pytest.mark.parametrize("bad", [set(), {0}, {15}, {3, 4}, set(range(0, 16, 2)), set(range(15))])
def test_bisection_loses_the_bad_images_and_no_other(bad: set[int]) -> None:
    encoder = _Picky(bad, InputCrashed("died"))
    found = _isolate(encoder.encode, 16)
    assert set(found.failures) == bad
    assert all(failure.crashed for failure in found.failures.values())
    assert found.slots == [slot for slot in range(16) if slot not in bad]
    assert [int(codes.item()) for codes in found.results] == found.slots


def test_one_bad_image_costs_a_logarithm_of_tries() -> None:
    encoder = _Picky({9}, InputCrashed("died"))
    _isolate(encoder.encode, 32)
    assert encoder.calls <= 1 + 2 * 5 + TRIES


def test_what_strikes_once_is_no_poison() -> None:
    encoder = _Picky({2}, InputCrashed("died"))

    def once(batch: ImageBatch, slots: list[int]) -> CodeArray:
        try:
            return encoder.encode(batch, slots)
        finally:
            if len(slots) == 1:
                encoder.bad = set()

    found = _isolate(once, 4)
    assert (found.failures, found.slots) == ({}, [0, 1, 2, 3])


def test_an_encoder_that_fails_on_everything_is_no_row_but_an_error() -> None:
    encoder = _Picky(set(range(8)), RuntimeError("out of memory"))
    with pytest.raises(Unusable, match="none of 8 images.*out of memory.*tokenize.batch_size"):
        _isolate(encoder.encode, 8)


@pytest.fixture
def run(tmp_path: Path) -> LightRun:
    return light_run(
        tmp_path, num_images=12, rows_per_shard=6, sections={"tokenize": {"batch_size": 4, "max_failed_fraction": 0.5}}
    )


def _tokenize(run: LightRun, store: Store, executor: str, *poison: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.helpers.poison", str(run.recipe_path), store.uri, executor, *poison]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)


@pytest.fixture
def poisoned(run: LightRun, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Manifest]:
    """Tokenize in this process, without Ray, with the same encoder."""

    def tokenized(store: Store, poison: str, effect: str = "crash") -> Manifest:
        with monkeypatch.context() as patch:
            patch.setenv("TEST_POISON", poison)
            patch.setenv("TEST_POISON_EFFECT", effect)
            patch.setattr(tokenize, "EncoderFactory", PoisonableFactory)
            return run_stage("tokenize", run.recipe, store, LocalExecutor()).manifest

    return tokenized


def _left_out(store: Store, table: Manifest) -> list[tuple[str, str]]:
    rows = [row for entry in table.files_under("left_out") for row in read_table(store.fetch(entry)).to_pylist()]
    return [(row["key"], row["status"]) for row in rows]


def _check_only_missing(run: LightRun, store: Store, table: Manifest, missing: list[str], folder: Path) -> None:
    """The table is that of an undisturbed run without the rows of the missing images."""
    plain_store = run.store(str(folder / "plain"))
    plain = run_stage("tokenize", run.recipe, plain_store, LocalExecutor()).manifest
    whole = read_code_table([plain_store.fetch(entry) for entry in plain.files_under("codes")])
    found = read_code_table([store.fetch(entry) for entry in table.files_under("codes")])
    kept = [at for at, key in enumerate(whole.keys) if key.split("_")[0] not in missing]
    assert found.keys == [whole.keys[at] for at in kept]
    assert np.array_equal(found.codes, whole.codes[kept])
    assert table.metrics == {"num_rows": len(kept), "num_filtered": 0, "num_failed": len(missing)}


def _leave_marks(run: LightRun, store: Store, shard: str, count: int) -> None:
    """As if so many workers had died on a shard."""
    for number in range(count):
        store.objects.put(f"marks/{run.action_key}/{shard}/dead{number}.json", b"{}")


@pytest.mark.processes
@pytest.mark.slow
def test_images_that_kill_ray_workers_end_as_rows(run: LightRun, tmp_path: Path) -> None:
    """Bounded retries: two workers die on the shard, the third looks for the images."""
    store, poison = run.store(str(tmp_path / "store")), ["000000007", "000000011"]
    ended = _tokenize(run, store, "ray", ",".join(poison))
    assert ended.returncode == 0, ended.stderr
    table = store.lookup(run.action_key)
    assert table is not None
    assert _left_out(store, table) == [(key, CRASHED) for key in poison]
    _check_only_missing(run, store, table, poison, tmp_path)
    assert store.objects.list("marks/") == [], "the marks of dead workers are gone"


@pytest.mark.processes
@pytest.mark.slow
def test_an_image_that_kills_the_run_itself_is_found_by_a_later_run(
    run: LightRun, poisoned: Callable[..., Manifest], tmp_path: Path
) -> None:
    store = run.store(str(tmp_path / "store"))
    assert _tokenize(run, store, "local", "000000007").returncode == -signal.SIGSEGV
    assert len(store.objects.list("marks/")) == 1, "one of the first two runs, which die in the same way"
    _leave_marks(run, store, "00001", 1)
    table = poisoned(store, "000000007")
    assert _left_out(store, table) == [("000000007", CRASHED)]
    _check_only_missing(run, store, table, ["000000007"], tmp_path)


@pytest.mark.processes
@pytest.mark.usefixtures("fresh_loggers")
def test_an_image_that_the_encoder_refuses_ends_as_the_same_row_whoever_died_before(
    run: LightRun, poisoned: Callable[..., Manifest], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digests = set()
    for num_deaths in (0, 2):
        store = run.store(str(tmp_path / f"store{num_deaths}"))
        _leave_marks(run, store, "00000", num_deaths)
        table = poisoned(store, "000000001", "raise")
        assert _left_out(store, table) == [("000000001", FAILED)]
        assert ("looking for the input" in caplog.text) == (num_deaths == 2)
        assert store.objects.list("marks/") == []
        digests.add(table.digest)
    assert len(digests) == 1
    _check_only_missing(run, store, table, ["000000001"], tmp_path)


@pytest.mark.processes
@pytest.mark.slow
def test_an_image_that_loses_the_device_is_found_and_the_worker_goes_on_without(
    run: LightRun, poisoned: Callable[..., Manifest], tmp_path: Path
) -> None:
    """From the middle of the first shard on the worker's own encoder fails on every image."""
    store = run.store(str(tmp_path / "store"))
    table = poisoned(store, "000000003", "device")
    assert _left_out(store, table) == [("000000003", CRASHED)]
    _check_only_missing(run, store, table, ["000000003"], tmp_path)
    assert store.objects.list("marks/") == []


def test_errors_that_lose_the_device_are_told_from_those_of_memory_and_of_images() -> None:
    assert loses_device(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    assert loses_device(RuntimeError("CUDA error: device-side assert triggered"))
    others = ["CUDA out of memory. Tried to allocate 2 GiB", "CUDA error: out of memory"]
    assert not any(loses_device(torch.OutOfMemoryError(text)) for text in others)
    assert not loses_device(torch.AcceleratorError("CUDA error: out of memory"))
    assert not loses_device(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    picky = _Picky({2}, torch.AcceleratorError("CUDA error: device-side assert triggered"))
    with pytest.raises(torch.AcceleratorError, match="device-side"):
        _isolate(picky.encode, 4)
    assert picky.calls == 1, "no image is blamed by a process without its device"
    with pytest.raises(MemoryError, match="out of memory; lower tokenize.batch_size"):
        _isolate(_Picky({2}, torch.AcceleratorError("CUDA error: out of memory")).encode, 4)


def test_a_stage_that_must_fail_stops_at_once_and_goes_on_with_a_higher_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"tokenize": {"batch_size": 4, "max_failed_fraction": 0.25}}
    first = r"tokenize.max_failed_fraction=0.25 \(first: 000000000: ValueError: cannot take this one"
    stopped = rf"6 of 16 images could not be tokenized(?=.*{first}).*what is done is kept"
    run = light_run(tmp_path, num_images=16, rows_per_shard=2, sections=limits)
    store = run.store(str(tmp_path / "store"))
    monkeypatch.setenv("TEST_POISON", ",".join(run.keys[:6]))
    monkeypatch.setenv("TEST_POISON_EFFECT", "raise")
    monkeypatch.setattr(tokenize, "EncoderFactory", PoisonableFactory)
    for _ in range(2):  # the second run counts the receipts of the first
        with pytest.raises(ValueError, match=stopped):
            run_stage("tokenize", run.recipe, store, LocalExecutor())
        assert list(dict(store.work(run.action_key).receipts())) == ["00000", "00001", "00002"]
    higher = load_recipe(str(run.recipe_path), ["tokenize.max_failed_fraction=0.5"])
    assert run_stage("tokenize", higher, store, LocalExecutor()).manifest.metrics["num_failed"] == 6


def test_too_little_memory_is_no_fault_of_an_image() -> None:
    encoder = _Picky({2}, MemoryError("a batch of four"))
    with pytest.raises(MemoryError, match="a batch of four"):
        _isolate(encoder.encode, 4)


@dataclass(frozen=True)
class _CannotLoad:
    """A factory whose process dies."""

    def __call__(self) -> Any:
        os._exit(7)


@pytest.mark.processes
def test_an_encoder_that_dies_while_it_loads_blames_no_image() -> None:
    sandbox = EncoderSandbox(_CannotLoad())
    with pytest.raises(Unusable, match="exit code 7 before it was ready"):
        _isolate(sandbox.encode, 4)


class _Unpicklable(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


@dataclass(frozen=True)
class _Raises:
    def __call__(self) -> Callable[[str], str]:
        def work(text: str) -> str:
            if text == "memory":
                raise MemoryError(text)
            if text:
                raise _Unpicklable(text, "two\nlines")
            return "done"

        return work


@pytest.mark.processes
def test_exceptions_of_a_child_process_are_described_as_those_of_this_one() -> None:
    with ChildProcess(_Raises()) as child:
        with pytest.raises(RaisedInChild) as there:
            child("one")
        with pytest.raises(_Unpicklable) as here:
            _Raises()()("one")
        assert described(there.value) == described(here.value) == "_Unpicklable: one two lines"
        with pytest.raises(MemoryError, match="memory"):
            child("memory")
        assert child("") == "done"
