"""Ctrl-C ends a local run with everything that it started, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.flows.conftest import ROOT
from tests.infra.test_interrupts import SIGNALS, START, interrupted, interruptible

pytestmark = pytest.mark.processes


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "executor", "moment"),
    [
        pytest.param(signal.SIGTERM, "local", "stage download: making", marks=pytest.mark.exhaustive),
        (signal.SIGINT, "ray", "started a local Ray cluster"),
    ],
)
def test_a_signal_ends_the_run_and_its_server(
    prefect_environment: dict[str, str], tmp_path: Path, number: signal.Signals, executor: str, moment: str
) -> None:
    log, scratch = tmp_path / "log.txt", tmp_path / "scratch"
    command = [sys.executable, "-m", "flows.cli", "run", "--recipe", "tiny", "--executor", executor]
    with log.open("wb") as stream:
        run = subprocess.Popen(
            [*command, "--store", str(tmp_path / "store")],
            cwd=ROOT,
            env=prefect_environment | {"MUSEVL_SCRATCH": str(scratch)},
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            preexec_fn=interruptible,
        )
    try:
        for _ in range(5000):
            if moment in log.read_text() or run.poll() is not None:
                break
            time.sleep(0.1)
        assert run.poll() is None, log.read_text()
        assert len(_group(run.pid)) > 1, "the run's own server is there"
        os.kill(run.pid, number)
        assert run.wait(timeout=500) == 128 + number
        assert _group(run.pid) == [], "nothing is left behind"
        assert [path.name for path in scratch.iterdir() if path.is_dir()] == []
    finally:
        for left in _group(run.pid):
            os.kill(left, signal.SIGKILL)
    last = log.read_text().strip().splitlines()[-1]
    assert last == f"musevl: stopped by {number.name}; the same command continues where this one stopped"


@pytest.mark.slow
def test_a_server_that_lives_on_is_told_of_the_signal(
    prefect_environment: dict[str, str], prefect_server: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.flows.stubs", "run", "--recipe", "tiny", "--executor", "local"]
    environment = prefect_environment | {"PREFECT_API_URL": prefect_server, "STUB_SECONDS": "300"}
    run = subprocess.Popen(
        [*command, "--store", str(tmp_path)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert run.stderr is not None
    assert any("stage download: making" in line for line in run.stderr)
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=500)[1] == (
        "musevl: stopped by SIGTERM; the same command continues where this one stopped\n"
    )
    assert run.returncode == 128 + signal.SIGTERM
    runs = httpx.post(f"{prefect_server}/flow_runs/filter", json={}).raise_for_status().json()
    assert "CRASHED" in {found["state_type"] for found in runs}


MUSEVL = """
import flows.cli
def app(*arguments, **options):
    flows.cli.advise(flows.cli.GOES_ON if sys.argv[1] == "run" else "")
    ready()
    wait()
flows.cli.app = app
flows.cli.main()
"""
STAGE = """
import stages.pipeline.command
def run(*arguments):
    ready()
    wait()
stages.pipeline.command.run_one_stage = run
stages.pipeline.command.run_standalone(sys.argv.pop())
"""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("program", "argument", "advice"),
    [
        (MUSEVL, "ask", ""),
        (MUSEVL, "run", "; the same command continues where this one stopped"),
        (STAGE, "tokenize", "; the same command continues where this one stopped"),
    ],
    ids=["musevl ask", "musevl run", "python -m stages.tokenize"],
)
def test_every_command_takes_the_signals(program: str, argument: str, advice: str, number: signal.Signals) -> None:
    code, _, said, _ = interrupted(START + program, number, argument)
    assert (code, said) == (128 + number, f"musevl: stopped by {number.name}{advice}\n")
