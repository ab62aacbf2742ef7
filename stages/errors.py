"""What a user reads when something is wrong: one line that says what, where and what to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

from infra.worker_errors import WorkerDied, WorkerFailed
from storage.errors import StoreError

DEBUG_VARIABLE = "MUSEVL_DEBUG"
EXIT_CODE = 2
"""Of commands that end with such a line."""

USER_ERRORS = (ValueError, OSError, StoreError, WorkerDied, WorkerFailed)
"""Exceptions whose message is meant for the user; all others are defects and keep their traceback."""

_JOINERS = "\u200c\u200d"
"""Invisible, but part of emoji and of Persian and Indian words."""
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
    sys.stderr.write(f"musevl: {printable(' '.join(text.split()))}\n")
    return EXIT_CODE


def one_line(error: BaseException) -> str:
    """An error's message on one line; where a library raised it, also its type and how to see where."""
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, (OSError, StoreError)) and not _raised_by_us(error.__traceback__):
        text = f"{type(error).__name__}: {text} ({DEBUG_VARIABLE}=1 shows where)"
    return text


def printable(text: str, longest: int | None = None) -> str:
    r"""Text that strangers wrote, on one line and without what a terminal would obey: escape and control characters,
    changes of direction and half surrogates are spelled out, as `\x1b`.

    Args:
        text: of any source.
        longest: most characters of it, the last of which says that there were more; None for all.
    """
    if longest is not None and len(text) > longest:
        text = text[: longest - 1] + "…"
    return "".join(each if each.isprintable() or each in _JOINERS else _spelled(each) for each in text)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _raised_by_us(trace: TracebackType | None) -> bool:
    if trace is None:
        return True
    while trace.tb_next is not None:
        trace = trace.tb_next
    path = Path(trace.tb_frame.f_code.co_filename)
    return path.is_relative_to(_ROOT) and "site-packages" not in path.relative_to(_ROOT).parts
