"""SIGKILL in the middle of each stage, then the same command again: the digest of an uninterrupted run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from stages.pipeline.execution import find_artifact
from stages.pipeline.recipe import STAGES
from storage.store import Store
from tests.helpers.tiny import TinyRun, start_stage

_GIVE_UP_S = 180
MAPPED = ("download", "tokenize", "evaluate")
"""Stages that resume by shard; the others resume by checkpoint."""


def _progressed(store: Store, action_key: str) -> bool:
    """Whether a part of the stage is safe: a complete checkpoint, or a receipt."""
    checkpoints = [key for key in store.objects.list(f"checkpoints/{action_key}") if key.endswith("complete.json")]
    return bool(checkpoints) or bool(store.objects.list(f"receipts/{action_key}"))


def _kill_in_the_middle(process: subprocess.Popen[str], store: Store, action_key: str) -> None:
    deadline = time.monotonic() + _GIVE_UP_S
    while not _progressed(store, action_key):
        assert process.poll() is None, f"the stage ended before it could be killed: {process.stderr.read()}"
        assert time.monotonic() < deadline, "the stage made no progress"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("name", list(STAGES))
def test_killed_and_resumed_stage_equals_uninterrupted_one(name: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    expected = tiny_run.results[name]
    store = tiny_run.store_before(name, tmp_path / "store")

    process = start_stage(name, store)
    _kill_in_the_middle(process, store, expected.action_key)
    assert find_artifact(name, tiny_run.recipe, store) is None, "the stage finished before it was killed"

    before = {key: store.objects.read(key) for key in store.objects.list(f"receipts/{expected.action_key}")}
    again = start_stage(name, store)
    output, errors = again.communicate(timeout=_GIVE_UP_S)
    assert again.returncode == 0, errors
    found = find_artifact(name, tiny_run.recipe, store)
    assert found is not None, output
    assert found.digest == expected.digest
    if name in MAPPED:
        left = len(dict(tiny_run.store.work(expected.action_key).receipts())) - len(before)
        assert left > 0 and f"/{left} " in errors, "the progress bar counts the shards that were left"
        assert all(store.objects.read(key) == data for key, data in before.items())
    else:
        assert "resuming at step" in errors
