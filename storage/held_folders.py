"""Temporary folders that belong to a process, and are removed by another process if it has died.

Each has a lock file next to it with an exclusive lock, which the kernel releases however the process ends. A PID would
not do: it may have been reused, or the folder may belong to a process of another machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SCRATCH_VARIABLE = "MUSEVL_SCRATCH"
_LOCK = ".lock"
_swept: set[tuple[Path, str]] = set()


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Yield a new private folder in MUSEVL_SCRATCH, by default the system's temporary folder; remove it at the end.

    The first call in a process also removes the folders of killed processes of this machine.
    """
    parent = Path(os.environ.get(SCRATCH_VARIABLE) or tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    # Names contain the host, because locks of other machines that share the folder may not be visible here
    prefix = f"{prefix}{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}-"
    if (parent, prefix) not in _swept:
        _swept.add((parent, prefix))
        remove_dead(parent, prefix)
    held = HeldFolder(parent, prefix)
    try:
        yield held.path
    finally:
        held.remove()


def remove_scratch(folder: Path) -> None:
    """Remove a folder of `scratch_folder` whose process is about to end, and those of dead processes next to it."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(f"{folder}{_LOCK}").unlink(missing_ok=True)
    remove_dead(folder.parent, folder.name[: -len(uuid.uuid4().hex)])


class HeldFolder:
    """A new private folder, and the lock that shows that its owner is alive.

    Args:
        parent: parent folder, which must exist.
        prefix: prefix of the folder's name.
    """

    def __init__(self, parent: Path, prefix: str = "") -> None:
        while True:
            self.path = parent / f"{prefix}{uuid.uuid4().hex}"
            self._lock_path = Path(f"{self.path}{_LOCK}")
            self._file = open(self._lock_path, "xb")  # noqa: SIM115 - closed, and so unlocked, with this object
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX)
            except OSError:  # no locks on this file system, so the folder will never be removed by others
                self._lock_path.unlink(missing_ok=True)
                break
            if self._lock_path.exists():  # otherwise another process removed it before it was locked
                break
            self._file.close()
        self.path.mkdir(mode=0o700)

    def is_there(self) -> bool:
        """Return whether the folder still exists."""
        return self.path.exists()

    def remove(self) -> None:
        """Remove the folder with its content; files that cannot be removed are left."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
        self._file.close()


def remove_dead(parent: Path, prefix: str = "") -> None:
    """Remove the folders of this user's processes that have ended; links are not followed.

    Args:
        parent: parent folder of the folders; it need not exist.
        prefix: prefix of their names.
    """
    with suppress(OSError):
        for entry in list(os.scandir(parent)):
            if re.fullmatch(f"{re.escape(prefix)}[0-9a-f]{{32}}{_LOCK}", entry.name):
                with suppress(OSError):  # it is locked, or another process was faster
                    _remove_unless_held(parent, entry.name)


def _remove_unless_held(parent: Path, name: str) -> None:
    lock = os.open(parent / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(lock)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = parent / name.removesuffix(_LOCK)
        if not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            os.unlink(parent / name)
    finally:
        os.close(lock)
