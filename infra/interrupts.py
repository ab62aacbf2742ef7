"""Ctrl-C and SIGTERM end a command at once: one line, exit code 128 + the signal's number, no process left behind.

Finished work is in the store, and the same command continues from there, so no clean-up is needed. Unwinding the stack
would not work either: Ray and Prefect turn an interrupt into tracebacks, and Prefect reports it to its server, which
the terminal's Ctrl-C has stopped as well, and would retry that call for minutes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

GOES_ON = "the same command continues where this one stopped"
"""Advice that is printed when a command is stopped whose work is kept."""
REPORT_S = 15.0
"""Seconds that a stopped flow may take to report its state to its server. If the server is gone as well, Prefect would
otherwise retry the call for two minutes."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE_S = 5.0
"""Seconds that child processes may take to end before they are killed."""

_handlers: dict[int, Callable[[int, FrameType | None], None]] = {}
"""The handler of each signal; empty unless a command or a flow has installed one, as in a test or a notebook."""
_is_command = False
_advice = ""
_said = False
_at_end: list[Callable[[], object]] = []


def end_on_signals(advice: str = "") -> None:
    """Make SIGINT and SIGTERM end this process and all its descendants. For commands, which own their process.

    Args:
        advice: what the user can do next, if anything.
    """
    global _advice, _is_command
    _advice, _is_command = advice, True
    _handlers.update(dict.fromkeys(_SIGNALS, end))
    take_back_signals()


def advise(advice: str) -> None:
    """Set the advice that is printed when this command is stopped."""
    global _advice
    _advice = advice


def take_back_signals() -> None:
    """Install the handlers again after a library (`ray.init`, a Prefect flow) has replaced them."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in _handlers.items():
            signal.signal(number, handler)


@contextmanager
def reported_signals(*, owned: bool) -> Iterator[None]:
    """On a signal, give the flow REPORT_S seconds to report the exception to its server, then end all processes.

    Args:
        owned: whether the process belongs to the flow. A notebook's does not, and survives Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield
        return
    numbers = _SIGNALS if owned or _is_command else (signal.SIGTERM,)
    found = {int(number): signal.getsignal(number) for number in numbers}
    before = dict(_handlers)

    def raise_and_watch(number: int, frame: FrameType | None) -> None:
        _say(number)
        threading.Thread(target=_end_later, args=(number,), daemon=True).start()
        handler = found[number]
        if callable(handler) and handler is not end:
            handler(number, frame)
        raise KeyboardInterrupt

    _handlers.update(dict.fromkeys(numbers, raise_and_watch))
    take_back_signals()
    try:
        yield
    finally:
        _handlers.clear()
        _handlers.update(before)
        for number, handler in found.items():
            signal.signal(number, handler)


@contextmanager
def done_at_end(function: Callable[[], object]) -> Iterator[None]:
    """Call a function if a signal ends the process in this block, after all descendants have ended.

    The stack is not unwound, so `finally` blocks do not run.

    Args:
        function: the function, which must not raise.
    """
    _at_end.append(function)
    try:
        yield
    finally:
        _at_end.remove(function)


def end(number: int, frame: FrameType | None = None) -> None:
    """Print which signal came, end all descendants, then this process with exit code 128 + `number`."""
    with suppress(ValueError):  # raised outside the main thread
        for ignored in _SIGNALS:
            signal.signal(ignored, signal.SIG_IGN)
    _say(number)
    end_processes()
    for function in list(_at_end):
        function()
    os._exit(128 + number)


def end_processes(spared: Container[int] = ()) -> None:
    """Send SIGTERM to all descendants of this process, then SIGKILL to those that have not ended.

    Args:
        spared: processes that are not signalled.
    """
    known: dict[int, int] = {}

    def living() -> list[int]:
        # A process whose parent has ended is no descendant any more, and a PID may have been reused meanwhile
        table = _processes()
        known.update({number: table[number].started for number in _below(table) if number not in spared})
        return [number for number, started in known.items() if number in table and table[number].started == started]

    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        for process in living():
            with suppress(ProcessLookupError):
                os.kill(process, signal_number)
        until = time.monotonic() + _PATIENCE_S
        while time.monotonic() < until and living():
            time.sleep(0.1)


def descendants() -> list[int]:
    """Return the PIDs of all living descendants of this process, from Linux's /proc; elsewhere none are found."""
    return _below(_processes())


class _Process(NamedTuple):
    parent: int
    started: int
    """Start time in clock ticks since boot."""


def _processes() -> dict[int, _Process]:
    """Return all living processes by PID."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *others = path.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended meanwhile
            continue
        if state != "Z":
            found[int(path.parent.name)] = _Process(int(parent), int(others[17]))
    return found


def _below(table: dict[int, _Process]) -> list[int]:
    children: dict[int, list[int]] = {}
    for number, process in table.items():
        children.setdefault(process.parent, []).append(number)
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def program_name(process: int) -> str:
    """Return the first 15 characters of the name of a process's program, or '' if the process has ended."""
    try:
        return Path(f"/proc/{process}/comm").read_text().rstrip("\n")
    except OSError:
        return ""


def _end_later(number: int) -> None:
    time.sleep(REPORT_S)
    end(number)


def _say(number: int) -> None:
    """Print the line once. A command prints nothing after it, since threads would still log errors of dying workers."""
    global _said
    if _said:
        return
    _said = True
    with suppress(Exception):  # this write may be the one that was interrupted, or go to a pipe without a reader
        sys.stdout.flush()
    advice = f"; {_advice}" if _advice else ""
    line = f"musevl: stopped by {signal.Signals(number).name}{advice}\n"
    with suppress(OSError):
        os.write(2, (("\n" if _is_within_a_line() else "") + line).encode())
    if not _is_command:
        return
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)


def _is_within_a_line() -> bool:
    """Return whether stderr may be in the middle of a line, after the `^C` of a terminal or in a progress bar."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    with suppress(Exception):
        return os.isatty(2) or bool(getattr(tqdm, "_instances", None))
    return False
