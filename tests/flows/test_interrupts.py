"""Ctrl-C ends a local run with everything that it started, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.flows.conftest import ROOT


def _group(leader: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def _interruptible() -> None:
    """A shell without job control makes its background children deaf to SIGINT; the run is no such child."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_its_server(
    prefect_environment: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "log.txt"
    command = [sys.executable, "-m", "flows.cli", "run", "--recipe", "tiny", "--executor", "local"]
    with log.open("wb") as stream:
        run = subprocess.Popen(
            [*command, "--store", str(tmp_path / "store")],
            cwd=ROOT,
            env=prefect_environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            preexec_fn=_interruptible,
        )
    try:
        for _ in range(2400):
            if b"stage download: making" in log.read_bytes() or run.poll() is not None:
                break
            time.sleep(0.1)
        assert run.poll() is None, log.read_text()
        assert len(_group(run.pid)) > 1, "the run's own server is there"
        os.kill(run.pid, number)
        assert run.wait(timeout=120) == 128 + number
        assert _group(run.pid) == [], "nothing is left behind"
    finally:
        for left in _group(run.pid):
            os.kill(left, signal.SIGKILL)
    last = log.read_text().strip().splitlines()[-1]
    assert last == f"musevl: stopped by {number.name}; the same command goes on where this one was"


def test_nothing_is_caught_where_the_run_owns_no_processes() -> None:
    script = """
import signal
from flows.interrupts import catch_signals
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
catch_signals()
assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
