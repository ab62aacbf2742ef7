"""Several processes on one store, and processes that die at any moment."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

import pytest

from storage import files
from storage.digests import sha256_bytes
from storage.manifest import Manifest
from storage.store import Store

pytestmark = pytest.mark.processes

StartPython = Callable[..., subprocess.Popen[str]]

RACER = """
import json, sys
from storage.digests import sha256_bytes
from storage.manifest import Manifest
from storage.store import Store
store = Store(sys.argv[1])
results = []
for round in range(int(sys.argv[3])):
    entry = store.put_bytes(f"{sys.argv[2]} {round}".encode(), "a")
    manifest = Manifest(kind="sample", schema_version=1, stage="race", config={}, inputs={}, files=(entry,),
                        metrics={}, metadata={})
    receipt = {"files": [entry.to_json()]}
    print("ready", flush=True)
    sys.stdin.readline()
    commit = store.commit(f"key{round}", manifest)
    winner = store.work(f"key{round}").write_receipt("0", receipt)
    results.append([manifest.digest, commit.digest, commit.created, commit.adopted, winner == receipt])
print(json.dumps(results))
"""


def race(start_python: StartPython, uri: str, contents: list[str], rounds: int) -> list[list[list[object]]]:
    """Let processes commit to the same keys at the same moments; return what each of them saw, by process and round."""
    children = [start_python(RACER, uri, content, str(rounds)) for content in contents]
    for _ in range(rounds):
        for child in children:
            assert child.stdout is not None
            line = child.stdout.readline()
            assert line == "ready\n", child.communicate()[1]
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
    results = []
    for child in children:
        output, errors = child.communicate()
        assert child.returncode == 0, errors
        results.append(json.loads(output))
    return results


def test_of_two_different_results_at_once_one_wins_and_both_processes_agree(
    store: Store, start_python: StartPython
) -> None:
    rounds = 8
    one, two = race(start_python, store.uri, ["one", "two"], rounds)
    for round_number, (first, second) in enumerate(zip(one, two, strict=True)):
        assert first[1] == second[1]
        assert {first[2], second[2]} == {True, False}
        assert [first[3], second[3]] == [not first[2], not second[2]]
        assert {first[4], second[4]} == {True, False}
        winner = store.lookup(f"key{round_number}")
        assert winner is not None
        assert winner.digest == first[1]
    assert len([run for run in store.runs() if run["event"] == "nondeterminism"]) == rounds


def test_of_two_equal_results_at_once_both_succeed(store: Store, start_python: StartPython) -> None:
    for first, second in zip(*race(start_python, store.uri, ["same", "same"], 4), strict=True):
        assert first[0] == first[1] == second[1]
        assert {first[2], second[2]} == {True, False}
        assert not first[3]
        assert not second[3]
    assert store.runs() == []


def test_a_process_killed_while_it_copies_a_file_leaves_no_visible_blob(local_store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789" * 10)

    def die_after_some_bytes() -> None:
        real_open = open

        class Dying:
            def __init__(self, path: object, mode: str) -> None:
                self.file = real_open(path, mode, buffering=0)  # type: ignore[call-overload]

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *exc_info: object) -> None:
                self.file.close()

            def write(self, chunk: bytes) -> None:
                self.file.write(chunk)
                if self.file.tell() >= 50:
                    os.kill(os.getpid(), signal.SIGKILL)

        files.CHUNK_BYTES = 10
        files.open = lambda path, mode: Dying(path, mode) if mode == "wb" else real_open(path, mode)  # type: ignore[attr-defined]
        local_store.put_file(tmp_path / "file", "a")

    assert in_child(die_after_some_bytes) == -signal.SIGKILL
    left = [path for path in Path(local_store.uri).rglob("*") if path.is_file()]
    assert [path.stat().st_size for path in left] == [50]
    assert local_store.objects.list("") == []
    entry = local_store.put_file(tmp_path / "file", "a")
    assert local_store.fetch(entry).read_bytes() == (tmp_path / "file").read_bytes()


def test_a_process_killed_at_any_step_leaves_a_store_that_the_next_one_completes(
    tmp_path: Path, manifest_of: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A killed process loses nothing that it wrote, so waiting for the disk would only make this slow.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for step in range(400):
        folder = tmp_path / str(step)
        exit_code = in_child(partial(work_until_killed, folder, manifest_of, step))
        check_consistent(Store(str(folder / "store")), folder)
        work(folder, manifest_of)
        store = Store(str(folder / "store"))
        assert store.lookup("key") is not None
        assert list(dict(store.work("key").receipts())) == ["0"]
        assert store.work("key").load_checkpoint(folder / "final") == 2
        assert store.verify() == []
        if exit_code == 0:
            break
    assert exit_code == 0
    assert step > 50, "the child was killed at too few steps for this test to mean something"


def work(folder: Path, manifest_of: Callable[..., Manifest]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "state").mkdir(exist_ok=True)
    (folder / "state" / "model").write_bytes(b"state")
    (folder / "state" / "rng").write_bytes(b"rng")
    store = Store(str(folder / "store"))
    store.work("key").create_plan({"shards": 1})
    store.work("key").save_checkpoint(1, folder / "state")
    store.work("key").save_checkpoint(2, folder / "state")
    entry = store.put_file(folder / "state" / "model", "model")
    store.work("key").write_receipt("0", {"files": [entry.to_json()]})
    store.commit("key", manifest_of(entry))


def work_until_killed(folder: Path, manifest_of: Callable[..., Manifest], step: int) -> None:
    """Do `work`, and die at its `step`-th operation on files."""
    count = 0

    def die_at_step(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in ("open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"):
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    folder.mkdir()
    sys.addaudithook(die_at_step)
    work(folder, manifest_of)


def check_consistent(store: Store, folder: Path) -> None:
    for key in store.objects.list("cas/"):
        assert sha256_bytes(store.objects.read(key)) == key.rpartition("/")[2]
    for record in ("actions/", "plans/", "receipts/", "runs/"):
        for key in store.objects.list(record):
            json.loads(store.objects.read(key))
    if store.objects.list("actions/"):
        assert store.lookup("key") is not None
    assert len(dict(store.work("key").receipts())) == len(store.objects.list("receipts/"))
    complete = [key for key in store.objects.list("checkpoints/") if key.endswith("complete.json")]
    step = store.work("key").load_checkpoint(folder / "loaded")
    assert (step is None) == (not complete)


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked child; return its exit code, negative for a signal."""
    child = multiprocessing.get_context("fork").Process(target=action)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def test_a_store_opened_before_a_fork_works_in_the_child(s3_uri: str) -> None:
    store = Store(s3_uri)
    entry = store.put_bytes(b"data", "a")

    def read() -> None:
        assert store.read_bytes(entry) == b"data"

    assert in_child(read) == 0
