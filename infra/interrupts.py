"""Ctrl-C and SIGTERM end a command at once: one line, exit code 128 + the signal's number, and no process left behind.

What is done is in the store, so there is nothing to wind up: the same command goes on from there. Unwinding the stack
would be no way to end instead. Ray and Prefect make tracebacks of an interrupt, and Prefect reports it to its server,
which a terminal's Ctrl-C has ended too: it would repeat that call for minutes.
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

GOES_ON = "the same command goes on where this one was"
"""Advice at the end of a command whose work is kept."""
REPORT_S = 15.0
"""How long a flow may take to tell the server that it lives on what became of it; a server that is gone as well is
otherwise called again for two minutes."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE_S = 5.0
"""How long children may take to end before they are killed."""

_handlers: dict[int, Callable[[int, FrameType | None], None]] = {}
"""What takes each signal; empty where no command and no flow asked for it, as in a test or a notebook."""
_is_command = False
_advice = ""
_said = False
_at_end: list[Callable[[], object]] = []


def end_on_signals(advice: str = "") -> None:
    """From now on SIGINT and SIGTERM end this process and all below it. For commands, which own their process.

    Args:
        advice: what the user can do next, where there is something.
    """
    global _advice, _is_command
    _advice, _is_command = advice, True
    _handlers.update(dict.fromkeys(_SIGNALS, end))
    take_back_signals()


def advise(advice: str) -> None:
    """Say what the user of this command can do after it was stopped."""
    global _advice
    _advice = advice


def take_back_signals() -> None:
    """Take the signals again after a library took them (`ray.init`, a Prefect flow); none where none were taken."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in _handlers.items():
            signal.signal(number, handler)


@contextmanager
def reported_signals(*, owned: bool) -> Iterator[None]:
    """Let the exception that a signal raises in a flow reach the flow's server, for REPORT_S seconds; then all ends.

    Args:
        owned: whether the process is the flow's own. A notebook's is not, and lives on after Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python's signals do not arrive
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
    """Have a signal in the block call a function once all processes below this one have ended: nothing is unwound.

    Args:
        function: must not raise.
    """
    _at_end.append(function)
    try:
        yield
    finally:
        _at_end.remove(function)


def end(number: int, frame: FrameType | None = None) -> None:
    """Say which signal came, end every process below this one, then this one with exit code 128 + `number`."""
    with suppress(ValueError):  # of a thread other than the main one
        for ignored in _SIGNALS:
            signal.signal(ignored, signal.SIG_IGN)
    _say(number)
    end_processes()
    for function in list(_at_end):
        function()
    os._exit(128 + number)


def end_processes(spared: Container[int] = ()) -> None:
    """Ask every process below this one to end, then kill those that did not.

    Args:
        spared: processes that are left alone.
    """
    known: dict[int, int] = {}

    def living() -> list[int]:
        # One whose parent has ended is no descendant any more, and a number may be given to another process meanwhile
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
    """Processes below this one that have not ended, by Linux's /proc; elsewhere none are found."""
    return _below(_processes())


class _Process(NamedTuple):
    parent: int
    started: int
    """In clock ticks after the machine."""


def _processes() -> dict[int, _Process]:
    """All that have not ended, by number."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *others = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
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
    """The name of the program that a process runs, its first 15 letters; empty where it has ended."""
    try:
        return Path(f"/proc/{process}/comm").read_text().rstrip("\n")
    except OSError:
        return ""


def _end_later(number: int) -> None:
    time.sleep(REPORT_S)
    end(number)


def _say(number: int) -> None:
    """Write the line, once. In a command nothing follows it: threads still log what they think of dying workers."""
    global _said
    if _said:
        return
    _said = True
    with suppress(Exception):  # it may be the very write that was interrupted, or a pipe that nobody reads
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
    """Whether stderr may not be at the start of a line: a terminal shows `^C`, and a progress bar waits for its end."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    with suppress(Exception):
        return os.isatty(2) or bool(getattr(tqdm, "_instances", None))
    return False
