"""Folders that last as long as the process that made them, and are found and removed when it died.

Beside each stands a lock file, held by an exclusive lock that the kernel gives back however a process ends. A process
number would say less: another process may have it by now, or the folder be of another machine.
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
    """Yield a new private folder in MUSEVL_SCRATCH, else where temporary files are kept; removed at the end.

    Those that processes of this machine left behind when they were killed go first, once in the life of a process.
    """
    parent = Path(os.environ.get(SCRATCH_VARIABLE) or tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    # The names tell this machine's from others', whose locks may not be seen here where several share the folder
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
    """Remove a folder of `scratch_folder` when its process is about to end, and those of dead processes beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(f"{folder}{_LOCK}").unlink(missing_ok=True)
    remove_dead(folder.parent, folder.name[: -len(uuid.uuid4().hex)])


class HeldFolder:
    """A new private folder, and the lock that says that its owner lives.

    Args:
        parent: must exist.
        prefix: of its name.
    """

    def __init__(self, parent: Path, prefix: str = "") -> None:
        while True:
            self.path = parent / f"{prefix}{uuid.uuid4().hex}"
            self._lock_path = Path(f"{self.path}{_LOCK}")
            self._file = open(self._lock_path, "xb")  # noqa: SIM115 - closed, and so unlocked, with this object
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX)
            except OSError:  # a file system without locks: what nobody can tell from a dead one's is never removed
                self._lock_path.unlink(missing_ok=True)
                break
            if self._lock_path.exists():  # else another process took it for a dead one's before it was locked
                break
            self._file.close()
        self.path.mkdir(mode=0o700)

    def is_there(self) -> bool:
        """Whether nobody has removed it."""
        return self.path.exists()

    def remove(self) -> None:
        """Remove the folder with all that is in it; what cannot be removed is left."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
        self._file.close()


def remove_dead(parent: Path, prefix: str = "") -> None:
    """Remove the folders of processes that have ended: this user's, and no links.

    Args:
        parent: of the folders; need not exist.
        prefix: of their names.
    """
    with suppress(OSError):
        for entry in list(os.scandir(parent)):
            if re.fullmatch(f"{re.escape(prefix)}[0-9a-f]{{32}}{_LOCK}", entry.name):
                with suppress(OSError):  # it is held, or another process was faster
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
