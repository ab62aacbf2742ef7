"""Restarts a process with an allocator that keeps large buffers: about twice as fast for PyTorch on a CPU.

By default glibc maps every large tensor anew and unmaps it when it is freed, so each step pays for page faults again.
The jemalloc that ships with Ray keeps freed buffers in huge pages. If it is missing, glibc can be told to keep them,
though searching its free list becomes slower over time. An allocator is chosen when a process starts, hence the
restart.

    python -m infra.malloc COMMAND [ARGUMENTS]      runs any command with these settings
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

JEMALLOC_CONF = "dirty_decay_ms:10000,muzzy_decay_ms:-1,thp:always,metadata_thp:always,oversize_threshold:0"
"""Return buffers to the system after ten seconds without use, and ask for huge pages. Without the decay, free buffers
stayed split into sizes that later ones did not fit, and training a tokenizer grew by 12 GB in 900 steps. By default
jemalloc returns buffers of 8 MB and more (activations in float32) at once, whatever the decay: every step then spent a
sixth of its time on page faults."""

JEMALLOC_PURGE = b"arena.4096.purge"
"""The `mallctl` name that returns the freed pages of all arenas: 4096 is jemalloc's MALLCTL_ARENAS_ALL."""

GLIBC_SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
}
"""Never map a buffer on its own, return nothing below 100 GB, and grow the heap by 1 GB (address space) at a time."""

MARKER = "MUSEVL_FAST_MALLOC"
"""Environment variable: `0` switches the restart off; the restart sets `1`, so that it happens only once."""


def missing_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to an environment; values that the user set are kept, also of LD_PRELOAD.

    The result is empty on systems other than Linux with glibc, and if `MUSEVL_FAST_MALLOC` is set.
    """
    if MARKER in environment or not _has_glibc():
        return {}
    library = _jemalloc()
    if library is not None and not environment.get("LD_PRELOAD"):
        wanted = {"LD_PRELOAD": str(library), "MALLOC_CONF": JEMALLOC_CONF}
    else:
        wanted = GLIBC_SETTINGS
    missing = {name: value for name, value in wanted.items() if not environment.get(name)}
    return missing | {MARKER: "1"} if missing else {}


def reexec_with_fast_malloc() -> None:
    """Re-execute the command of this process with `missing_settings`, which child processes inherit.

    Call it first in a command, before expensive imports. It does nothing if no setting is missing, and in an
    interactive interpreter.
    """
    missing = missing_settings(os.environ)
    if not missing or not _has_command():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)


def give_back_freed_memory() -> None:
    """Return freed buffers of this process to the system; both allocators otherwise keep them for reuse.

    For a process that has finished its heavy work and waits for others: jemalloc measures its ten seconds only while
    the process allocates, so a waiting process would keep all its freed memory.
    """
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "mallctl"):
        library.mallctl(JEMALLOC_PURGE, None, None, None, ctypes.c_size_t(0))
    elif hasattr(library, "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))


def _jemalloc() -> Path | None:
    """Return the path of Ray's copy of jemalloc, without importing Ray."""
    spec = importlib.util.find_spec("ray")
    folders = spec.submodule_search_locations if spec is not None else None
    candidates = [Path(folder) / "core" / "libjemalloc.so" for folder in folders or []]
    return next((path for path in candidates if path.is_file()), None)


def _has_glibc() -> bool:
    try:
        return sys.platform == "linux" and bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (ValueError, OSError):  # a Linux with another C library
        return False


def _has_command() -> bool:
    return bool(sys.executable) and len(sys.orig_argv) > 1


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m infra.malloc COMMAND [ARGUMENTS]")
    os.execvpe(sys.argv[1], sys.argv[1:], os.environ | missing_settings(os.environ))
