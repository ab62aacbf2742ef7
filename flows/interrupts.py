"""Ctrl-C ends a local run at once. What is done is in the store, so the same command goes on from there.

Prefect would report the interrupt to its server first, and a terminal's Ctrl-C has ended the temporary server already:
the process would retry that call for minutes. So a run that owns its server and its cluster ends them and itself.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE_S = 5.0
"""How long children may take to end before they are killed."""

_owned = False


def own_processes() -> None:
    """Say that every child of this process belongs to the run; from now on SIGINT and SIGTERM end them all.

    Not for a run on a configured Prefect server: that one lives on, and is to learn how the run ended.
    """
    global _owned
    _owned = True
    catch_signals()


def catch_signals() -> None:
    """Take both signals where the run owns its children; again in a flow, which starts with Prefect's own handler."""
    if _owned:
        for number in _SIGNALS:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    for ignored in _SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)
    name = signal.Signals(number).name
    sys.stderr.write(f"\nmusevl: stopped by {name}; the same command goes on where this one was\n")
    sys.stderr.flush()
    for asked in (signal.SIGTERM, signal.SIGKILL):
        _send(asked)
        until = time.monotonic() + _PATIENCE_S
        while time.monotonic() < until and _send(0):
            time.sleep(0.1)
    os._exit(128 + number)


def _send(number: int) -> int:
    """Send a signal (0: none) to every living descendant of this process; return how many there are."""
    reached = 0
    for process in _descendants():
        try:
            os.kill(process, number)
            reached += 1
        except ProcessLookupError:
            continue
    return reached


def _descendants() -> list[int]:
    """Processes below this one that have not ended, by Linux's /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(path.parent.name))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found
