"""Start a process with an allocator that keeps large buffers: about twice as fast for PyTorch on a CPU.

By default glibc maps every large tensor afresh and gives it back at once, so each step pays for page faults again. The
jemalloc that comes with Ray keeps them, in huge pages; where it is missing, glibc can at least be told to keep them,
though searching its free list then takes longer and longer. Both are chosen when a process starts; hence the new start.

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
"""Give buffers back after ten seconds without use, and ask for huge pages. Never giving back was tried: free buffers
stayed split into sizes that later ones did not fit, and training a tokenizer grew by 12 GB in 900 steps. By default
buffers of 8 MB and more (activations in float32) are given back at once, whatever the decay: every step then paid for
their pages again, a sixth of its time."""

JEMALLOC_PURGE = b"arena.4096.purge"
"""The command for the freed pages of every arena: 4096 is jemalloc's MALLCTL_ARENAS_ALL."""

GLIBC_SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
}
"""Never map a buffer on its own, give nothing back below 100 GB, grow the heap by 1 GB (of address space) at a time."""

MARKER = "MUSEVL_FAST_MALLOC"
"""Environment variable: `0` switches the new start off; `1` is set by it, so that it happens once."""


def missing_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What has to be added to an environment; what the user set stays as it is, a preloaded library too.

    Empty outside Linux with glibc, and where `MUSEVL_FAST_MALLOC` is set.
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
    """Replace this process by the same command with `missing_settings`; child processes inherit them.

    Call it first thing in a command, before imports that cost time. Does nothing where nothing is missing, and in an
    interactive interpreter.
    """
    missing = missing_settings(os.environ)
    if not missing or not _has_command():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)


def give_back_freed_memory() -> None:
    """Return the buffers that this process freed to the system; both allocators otherwise keep them for reuse.

    For a process that has done its heavy work and now waits for others: jemalloc counts its ten seconds only while the
    process allocates, so that a waiting one keeps all that it ever freed.
    """
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "mallctl"):
        library.mallctl(JEMALLOC_PURGE, None, None, None, ctypes.c_size_t(0))
    elif hasattr(library, "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))


def _jemalloc() -> Path | None:
    """Ray's copy of jemalloc, found without importing Ray."""
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
