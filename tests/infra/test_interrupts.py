"""Ctrl-C and SIGTERM: one line, exit code 128 + the signal's number, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infra import interrupts

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
SIGNALS = [signal.SIGINT, signal.SIGTERM]

START = """
import os, signal, subprocess, sys, time
from pathlib import Path
from infra import interrupts
interrupts._PATIENCE_S = 0.5
def ready(*pids):
    print(*pids, flush=True)
def wait():  # Python notices a signal that comes just before a sleep when that is over, so each is short
    for _ in range(600):
        time.sleep(0.1)
"""
COMMAND = """
interrupts.end_on_signals("do it again")
"""
WITH_CHILDREN = """
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
parent = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
children = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for code in (stubborn, parent)]
grandchild = [int(child.stdout.readline()) for child in children][1]
ready(*(child.pid for child in children), grandchild)
wait()
"""
LIBRARY = """
def library(number, frame):
    raise SystemExit(number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, library)
interrupts.take_back_signals()
ready()
wait()
"""
SCRATCH = """
child = subprocess.Popen(["sleep", "60"])
def remove():
    assert child.poll() is not None
    Path(sys.argv[1]).unlink()
with interrupts.done_at_end(remove):
    ready()
    wait()
"""
FLOW = """
class Termination(BaseException): pass
def library(number, frame):
    raise Termination
signal.signal(signal.SIGTERM, library)
interrupts.REPORT_S = float(sys.argv[1])
try:
    with interrupts.reported_signals(owned=True):
        ready()
        wait()
except (Termination, KeyboardInterrupt) as error:
    print(type(error).__name__, flush=True)
    time.sleep(float(sys.argv[2]))
    print("told the server", flush=True)
"""


def interruptible() -> None:
    """A shell without job control makes its background children deaf to SIGINT; the process is no such child."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(program: str, number: signal.Signals, *arguments: str) -> tuple[int, str, str, list[int]]:
    """Exit code, stdout, stderr of a program that gets a signal once it is ready, and the processes that it named."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "MUSEVL_STORE"} | {"MUSEVL_FAST_MALLOC": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    assert process.stdout is not None
    named = [int(word) for word in process.stdout.readline().split()]
    process.send_signal(number)
    printed, said = process.communicate(timeout=500)
    return process.returncode, printed, said, named


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_command_and_all_below_it_with_one_line(number: signal.Signals) -> None:
    code, _, said, children = interrupted(START + COMMAND + WITH_CHILDREN, number)
    assert (code, said) == (128 + number, f"musevl: stopped by {number.name}; do it again\n")
    assert len(children) == 3 and not any(map(lives, children))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_library_that_took_the_signals_gives_them_back(number: signal.Signals) -> None:
    code, _, said, _ = interrupted(START + COMMAND + LIBRARY, number)
    assert (code, said) == (128 + number, f"musevl: stopped by {number.name}; do it again\n")


def test_what_is_to_be_done_at_the_end_is_done_when_the_children_are_gone(tmp_path: Path) -> None:
    (tmp_path / "scratch").write_bytes(b"large")
    interrupted(START + COMMAND + SCRATCH, signal.SIGTERM, str(tmp_path / "scratch"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Termination")])
def test_a_flow_has_time_to_tell_its_server(number: signal.Signals, raised: str) -> None:
    code, printed, said, _ = interrupted(START + FLOW, number, "60", "0")
    assert (code, printed.splitlines()) == (0, [raised, "told the server"])
    assert said == f"musevl: stopped by {number.name}\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_flow_whose_server_does_not_answer_ends_too(number: signal.Signals) -> None:
    code, printed, said, _ = interrupted(START + FLOW, number, "0.2", "50")
    assert code == 128 + number
    assert "told the server" not in printed
    assert said == f"musevl: stopped by {number.name}\n"


def test_nothing_is_caught_where_no_command_asked_for_it() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    interrupts.take_back_signals()
    assert [signal.getsignal(number) for number in SIGNALS] == before
