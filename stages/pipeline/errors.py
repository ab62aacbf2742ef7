"""Error messages for users: one line that says what, where and the remedy."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from infra.terminal import on_one_line, printable, say
from infra.worker_errors import WorkerDied, WorkerFailed
from storage.errors import StoreError

DEBUG_VARIABLE = "MUSEVL_DEBUG"
EXIT_CODE = 2
"""Exit code of commands that end with such a message."""

_OF_TORCH = ("inline_container", "iostream error")
"""Texts of the errors of `torch.save` if a file cannot be written, whatever the reason."""
_NOTHING_FREE = 2**20
"""Free bytes below which a disk counts as full, since the file that did not fit has taken the rest."""

USER_ERRORS = (ValueError, OSError, StoreError, WorkerDied, WorkerFailed)
"""Exceptions whose message is meant for the user; all others are defects and keep their traceback."""

_ROOT = Path(__file__).resolve().parents[2]


class DiskFull(OSError):
    """Raised if there is no space left for a file."""


def report(error: BaseException) -> int:
    """Print a user's error as one line on stderr; with MUSEVL_DEBUG=1 raise it with its traceback instead.

    Returns:
        The exit code.

    Raises:
        BaseException: `error` itself if it is none of `USER_ERRORS`, or if MUSEVL_DEBUG is set.
    """
    if not isinstance(error, USER_ERRORS) or os.environ.get(DEBUG_VARIABLE):
        raise error
    return complain(one_line(error))


def complain(text: str) -> int:
    """Print an error message as one line on stderr; return the exit code."""
    say(f"musevl: {on_one_line(text)}", file=sys.stderr)
    return EXIT_CODE


def one_line(error: BaseException) -> str:
    """Return an error's message on one line; if a library raised it, with its type and how to see the traceback."""
    text = printable(on_one_line(error)) or type(error).__name__
    if not isinstance(error, (OSError, StoreError)) and not _raised_by_us(error.__traceback__):
        text = f"{type(error).__name__}: {text} ({DEBUG_VARIABLE}=1 shows where)"
    return text


@contextmanager
def named_full_disk(scratch: Path, store: str) -> Iterator[None]:
    """Explain which disk is full if the block could not write a file; libraries have different errors for that.

    Args:
        scratch: folder for temporary files.
        store: URI of the store.

    Raises:
        DiskFull: no space was left for a file; the message names the fuller of the two disks.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_a_full_disk(error, scratch):
            raise
        folders = {scratch: "set MUSEVL_SCRATCH (or TMPDIR) to a folder with more room"}
        if (local := Path(store.removeprefix("file://"))).is_dir():
            folders[local] = "free some there (`musevl artifacts gc`), or use another --store"
        full = min(folders, key=lambda folder: shutil.disk_usage(folder).free)
        raise DiskFull(
            f"no space left on the disk of {full} ({shutil.disk_usage(full).free / 1e6:.1f} MB free): {folders[full]}; "
            "the same command then continues where this one stopped"
        ) from error


def _is_of_a_full_disk(error: BaseException | None, scratch: Path) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_TORCH):
            return shutil.disk_usage(scratch).free < _NOTHING_FREE
        error = error.__cause__ or error.__context__
    return False


def _raised_by_us(trace: TracebackType | None) -> bool:
    if trace is None:
        return True
    while trace.tb_next is not None:
        trace = trace.tb_next
    path = Path(trace.tb_frame.f_code.co_filename)
    return path.is_relative_to(_ROOT) and "site-packages" not in path.relative_to(_ROOT).parts
