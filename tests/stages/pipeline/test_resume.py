"""Death in the middle of each stage, then the same again: the digest of an uninterrupted run."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from infra.executors import LocalExecutor
from stages.pipeline.execution import find_artifact, run_stage
from stages.pipeline.recipe import STAGES
from storage.store import Store
from tests.helpers.crashing import Died, dying_once_written
from tests.helpers.tiny import TinyRun, start_stage

_GIVE_UP_S = 500
MAPPED = ("download", "tokenize", "evaluate")
"""Stages that resume by shard; the others resume by checkpoint."""
KILLED = ("train_tokenizer", "tokenize")
"""One of each sort, whose process is killed for real also where time is short."""


def _safe_part(action_key: str) -> str:
    """Keys of what says that a part of the stage is safe: a complete checkpoint, or a receipt."""
    return f"^(checkpoints/{action_key}/.*complete.json|receipts/{action_key}/.*)$"


def _receipts(store: Store, action_key: str) -> dict[str, bytes]:
    return {key: store.objects.read(key) for key in store.objects.list(f"receipts/{action_key}")}


def _check_resumed(name: str, run: TinyRun, store: Store, before: dict[str, bytes], said: str) -> None:
    """The second run went on where the first one was, and ended as an uninterrupted one."""
    expected = run.results[name]
    found = find_artifact(name, run.recipe, store)
    assert found is not None and found.digest == expected.digest
    if name in MAPPED:
        left = len(dict(run.store.work(expected.action_key).receipts())) - len(before)
        assert left > 0 and f"/{left} " in said, "the progress bar counts the shards that were left"
        now = _receipts(store, expected.action_key)
        assert all(now[key] == data for key, data in before.items())
    else:
        assert "resuming at step" in said


@pytest.mark.usefixtures("fresh_loggers")
@pytest.mark.parametrize("name", list(STAGES))
def test_a_stage_that_dies_in_the_middle_ends_as_an_uninterrupted_one(
    name: str,
    tiny_run: TinyRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = tiny_run.store_before(name, tmp_path / "store")
    key = tiny_run.results[name].action_key
    with pytest.raises(Died):
        run_stage(name, tiny_run.recipe, dying_once_written(store, _safe_part(key)), LocalExecutor())
    assert find_artifact(name, tiny_run.recipe, store) is None, "the stage finished before it died"
    before = _receipts(store, key)
    capsys.readouterr()
    with caplog.at_level(logging.INFO):
        run_stage(name, tiny_run.recipe, store, LocalExecutor())
    _check_resumed(name, tiny_run, store, before, capsys.readouterr().err + caplog.text)


@pytest.mark.processes
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in KILLED else pytest.mark.exhaustive) for name in STAGES]
)
def test_a_stage_whose_process_is_killed_ends_as_an_uninterrupted_one(
    name: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    store = tiny_run.store_before(name, tmp_path / "store")
    key = tiny_run.results[name].action_key
    process = start_stage(name, store)
    _kill_in_the_middle(process, store, key)
    assert find_artifact(name, tiny_run.recipe, store) is None, "the stage finished before it was killed"
    before = _receipts(store, key)
    again = start_stage(name, store)
    _, said = again.communicate(timeout=_GIVE_UP_S)
    assert again.returncode == 0, said
    _check_resumed(name, tiny_run, store, before, said)


def _kill_in_the_middle(process: subprocess.Popen[str], store: Store, action_key: str) -> None:
    deadline = time.monotonic() + _GIVE_UP_S
    while not _progressed(store, action_key):
        assert process.poll() is None, f"the stage ended before it could be killed: {process.communicate()[1]}"
        assert time.monotonic() < deadline, "the stage made no progress"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _progressed(store: Store, action_key: str) -> bool:
    checkpoints = [key for key in store.objects.list(f"checkpoints/{action_key}") if key.endswith("complete.json")]
    return bool(checkpoints) or bool(store.objects.list(f"receipts/{action_key}"))
