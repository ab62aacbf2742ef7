"""The local cache of an S3 store's blobs: bounded in size, with checksums, and without eviction of files in use.

`cas/sha256/ab/...` holds the copies, which all processes of a machine share. Each reading process has a folder
`held/ID/` with hard links to the copies that it uses, to which it also downloads, and holds a lock on `held/ID.lock`
while it is alive. A copy with a single link is not in use; when the cache is full, the least recently used of these are
evicted. A hard link stays valid when its copy is removed, so the processes need no further synchronisation, and may be
killed at any point.
"""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PosixPath

from storage.errors import StoreError
from storage.files import CheckedFiles, atomic_path, refuse_links
from storage.held_folders import HeldFolder, remove_dead
from storage.manifest import FileEntry

logger = logging.getLogger(__name__)

LIMIT_VARIABLE = "MUSEVL_CACHE_GB"
DEFAULT_LIMIT_GB = 50.0
RELEASE_AFTER_S = 600
"""Seconds for which a file is kept after its last use, because a library may hold its path as a string."""
_LOOK_EVERY = 0.05
"""Fraction of the limit that a process downloads before it measures the size of the cache again."""
_COPIES, _HELD = "cas", "held"


def default_cache_dir() -> Path:
    """Return the folder for downloaded blobs: MUSEVL_CACHE, or `musevl` in the user's cache folder."""
    if named := os.environ.get("MUSEVL_CACHE"):
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "musevl"


def cache_limit_bytes() -> int:
    """Return the size limit of the cache: MUSEVL_CACHE_GB, or 50 GB; raise ValueError if that is no size."""
    text = os.environ.get(LIMIT_VARIABLE) or str(DEFAULT_LIMIT_GB)
    try:
        return int(_at_least_zero(float(text)) * 1e9)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{LIMIT_VARIABLE} is {text!r}; give a number of gigabytes, 0 or more, such as 200") from error


class HeldPath(PosixPath):
    """A path whose file stays in the cache as long as this object exists."""

    holder: "_Holder"


class Cache:
    """Local copies of blobs.

    Args:
        folder: folder of the cache, which belongs to the user; created when it is first needed.
        limit_bytes: size limit; files in use are kept even beyond it.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self.checked = CheckedFiles()
        """Checksums that this process has verified; `download` functions use it too, so that no file is hashed
        twice."""
        self._holder: _Holder | None = None
        self._lock = threading.Lock()
        self._unseen = limit_bytes
        """Bytes downloaded since the size of the cache was measured; initially so large that it is measured at once."""
        self._warned = False

    def fetch(self, key: str, entry: FileEntry, download: Callable[[Path], None]) -> Path:
        """Return a read-only file with the blob's bytes, which is kept as long as the returned object exists.

        Args:
            key: key of the blob, which is also its relative path in the cache.
            entry: size and sha256 of the blob.
            download: writes the blob to a path, and raises if it does not match `entry`.
        """
        for path in (key, f"{_HELD}/ID"):
            refuse_links(self._folder, path, "the cache")
        copy = self._folder / key
        held = self._held_path(copy.name)
        if _link(copy, held):
            if self.checked.right(held, entry):
                # Update the access time only: the modification time identifies files that were verified.
                os.utime(held, ns=(time.time_ns(), held.stat().st_mtime_ns))
                return held
            logger.warning("the copy of %s in the cache was damaged (%s); it is downloaded again", entry.path, copy)
            copy.unlink(missing_ok=True)
        self._make_room(entry.size)
        with atomic_path(held) as private:
            download(private)
            os.chmod(private, 0o444)
        copy.parent.mkdir(parents=True, exist_ok=True)
        _link(held, copy)
        return held

    def _held_path(self, name: str) -> HeldPath:
        with self._lock:
            if self._holder is None or not self._holder.is_valid():
                self._holder = _Holder(self._folder / _HELD)
            return self._holder.path(name)

    def _make_room(self, incoming: int) -> None:
        """Evict the least recently used copies as far as `incoming` more bytes would exceed the limit."""
        with self._lock:
            self._unseen += incoming
            if self._unseen < self._limit * _LOOK_EVERY:
                return
            self._unseen = 0
            if self._holder is not None:
                self._holder.release(time.time() - RELEASE_AFTER_S)
        remove_dead(self._folder / _HELD)
        copies = sorted(_copies(self._folder / _COPIES), key=lambda copy: copy.used)
        excess = sum(copy.size for copy in copies) + incoming - self._limit
        for copy in copies:
            if excess > 0 and not copy.held:
                copy.path.unlink(missing_ok=True)
                excess -= copy.size
        if excess > 0 and not self._warned:
            self._warned = True
            logger.warning(
                "the cache %s holds %.1f GB more than %s=%g, all of it in use; it shrinks as processes end",
                self._folder, excess / 1e9, LIMIT_VARIABLE, self._limit / 1e9,
            )  # fmt: skip


class _Holder:
    """The folder of one process and the lock that shows that the process is alive, kept while any of its paths exists.

    Args:
        folder: the parent folder of all holders.
    """

    def __init__(self, folder: Path) -> None:
        self._pid = os.getpid()
        self._paths: weakref.WeakValueDictionary[str, HeldPath] = weakref.WeakValueDictionary()
        folder.mkdir(parents=True, exist_ok=True)
        self._held = HeldFolder(folder)

    def is_valid(self) -> bool:
        """Return whether this process may use it: not after a fork, and not after the cache was emptied."""
        return self._pid == os.getpid() and self._held.is_there()

    def path(self, name: str) -> HeldPath:
        """Return the path with that name, the same object as long as it is referenced."""
        held = self._paths.get(name)
        if held is None:
            held = HeldPath(self._held.path / name)
            held.holder = self
            self._paths[name] = held
        return held

    def release(self, before: float) -> None:
        """Remove the files whose paths are not referenced and that were last used or written before a time."""
        for copy in _copies(self._held.path):
            if copy.path.name not in self._paths and copy.used < before:
                copy.path.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> bool:
    """Make `target` a hard link to `source`; return True if `target` exists afterwards, False if neither exists.

    If `source` is a symbolic link it is removed, since its target does not belong to the cache.
    """
    if source.is_symlink():
        source.unlink(missing_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        return True
    except FileNotFoundError:
        return target.exists()
    except OSError as error:
        raise StoreError(
            f"cannot link {source} in the cache of blobs: {error.strerror}; set MUSEVL_CACHE to a folder of your own, "
            "on a file system with hard links"
        ) from error
    return True


@dataclass(frozen=True)
class _Copy:
    path: Path
    size: int
    used: float
    held: bool


def _copies(folder: Path) -> Iterator[_Copy]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            try:
                stat = path.lstat()
            except FileNotFoundError:
                continue
            yield _Copy(path, stat.st_size, max(stat.st_atime, stat.st_mtime), stat.st_nlink > 1)


def _at_least_zero(number: float) -> float:
    if not number >= 0:  # also true for NaN
        raise ValueError(number)
    return number
