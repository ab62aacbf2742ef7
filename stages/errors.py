"""What a user reads when something is wrong: one line that says what, where and what to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

from infra.terminal import printable, say
from infra.worker_errors import WorkerDied, WorkerFailed
from storage.errors import StoreError

DEBUG_VARIABLE = "MUSEVL_DEBUG"
EXIT_CODE = 2
"""Of commands that end with such a line."""

USER_ERRORS = (ValueError, OSError, StoreError, WorkerDied, WorkerFailed)
"""Exceptions whose message is meant for the user; all others are defects and keep their traceback."""

_ROOT = Path(__file__).resolve().parents[1]


def report(error: BaseException) -> int:
    """Print a user's error as one line on stderr; with MUSEVL_DEBUG=1 raise it with its traceback instead.

    Returns:
        The exit code.

    Raises:
        BaseException: `error` itself when it is none of `USER_ERRORS`, or when MUSEVL_DEBUG is set.
    """
    if not isinstance(error, USER_ERRORS) or os.environ.get(DEBUG_VARIABLE):
        raise error
    return complain(one_line(error))


def complain(text: str) -> int:
    """Print what is wrong as one line on stderr; return the exit code."""
    say(f"musevl: {' '.join(text.split())}", file=sys.stderr)
    return EXIT_CODE


def one_line(error: BaseException) -> str:
    """An error's message on one line; where a library raised it, also its type and how to see where."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    if not isinstance(error, (OSError, StoreError)) and not _raised_by_us(error.__traceback__):
        text = f"{type(error).__name__}: {text} ({DEBUG_VARIABLE}=1 shows where)"
    return text


def _raised_by_us(trace: TracebackType | None) -> bool:
    if trace is None:
        return True
    while trace.tb_next is not None:
        trace = trace.tb_next
    path = Path(trace.tb_frame.f_code.co_filename)
    return path.is_relative_to(_ROOT) and "site-packages" not in path.relative_to(_ROOT).parts
