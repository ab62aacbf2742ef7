"""Rights taken away for real: a folder whose files this thread may read and not write, also as root."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_VERSION_3 = 0x20080522
_DAC_OVERRIDE = 1 << 1
"""What lets root write where permissions do not."""
_NEW_MOUNTS, _PRIVATE, _BIND, _REMOUNT, _READ_ONLY = 0x20000, 0x44000, 0x1000, 0x20, 0x1
_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextmanager
def readable_only(folder: Path) -> Iterator[None]:
    """Take the right to write from a folder and all in it, for the length of the block."""
    paths = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths if not path.is_symlink()}
    header, sets = _Header(_VERSION_3, 0), (_Sets * 2)()
    _libc.capget(ctypes.byref(header), ctypes.byref(sets))
    before = sets[0].effective
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        sets[0].effective = before & ~_DAC_OVERRIDE
        _libc.capset(ctypes.byref(header), ctypes.byref(sets))
        yield
    finally:
        sets[0].effective = before
        _libc.capset(ctypes.byref(header), ctypes.byref(sets))
        for path, mode in modes.items():
            path.chmod(mode)


def mount_read_only(folder: Path) -> bool:
    """Mount a folder read-only where it is, for this process alone; False where that is not allowed here."""
    name = os.fsencode(folder)
    steps = [
        lambda: _libc.unshare(_NEW_MOUNTS),
        lambda: _libc.mount(b"none", b"/", None, _PRIVATE, None),
        lambda: _libc.mount(name, name, None, _BIND, None),
        lambda: _libc.mount(b"none", name, None, _BIND | _REMOUNT | _READ_ONLY, None),
    ]
    return all(step() == 0 for step in steps)
