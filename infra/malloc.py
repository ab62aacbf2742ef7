"""Start the process again with allocator settings that keep large buffers: about twice as fast for PyTorch on a CPU.

By default glibc maps every large tensor afresh and gives it back at once, so each step pays for page faults again.
The settings are read when a process starts; hence the new start.
"""

from __future__ import annotations

import os
import sys

SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
}
"""Never map a buffer on its own, give nothing back below 100 GB, grow the heap by 1 GB (of address space) at a time."""

MARKER = "MUSEVL_FAST_MALLOC"
"""Environment variable: `0` switches the new start off; `1` is set by it, so that it happens once."""


def reexec_with_fast_malloc() -> None:
    """Replace this process by the same command with `SETTINGS` in the environment; child processes inherit them.

    Call it first thing in a command, before imports that cost time. Does nothing outside Linux with glibc, where all
    settings are in the environment already, where `MUSEVL_FAST_MALLOC` is set, and in an interactive interpreter.
    Settings that the user made stay as they are.
    """
    if MARKER in os.environ or not _has_glibc() or not _has_command():
        return
    missing = {name: value for name, value in SETTINGS.items() if name not in os.environ}
    if not missing:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing | {MARKER: "1"})


def _has_glibc() -> bool:
    try:
        return sys.platform == "linux" and bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (ValueError, OSError):  # a Linux with another C library
        return False


def _has_command() -> bool:
    return bool(sys.executable) and len(sys.orig_argv) > 1
