"""Objects in a local folder: a private file, fsynced, then linked (create-only) or renamed to its final name."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from storage.errors import DamagedObject, StoreError
from storage.files import TEMPORARY_PREFIX, copy_and_hash, fsync_path, remove_quietly, temporary_name
from storage.object_info import ObjectInfo

TEMPORARY_FOLDER = "tmp"
_FILE_MODE = 0o444
_LINK_ATTEMPTS = 20


class LocalBackend:
    """Keys are paths under one folder. `tmp/` holds unfinished files; it may be emptied while nothing runs."""

    is_remote = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self._temporary = root / TEMPORARY_FOLDER

    def check_access(self) -> None:
        """Make the folder if needed; StoreError unless files can be created and linked in it."""
        probe, linked = (self._temporary / temporary_name() for _ in range(2))
        try:
            self._temporary.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"probe")
            os.link(probe, linked)
        except OSError as error:
            remedy = "choose a folder that you can write to"
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK) and probe.exists():
                remedy = "choose a file system with hard links; create-only files need them"
            raise StoreError(f"cannot write to the store folder {self.root}: {error.strerror}; {remedy}") from error
        finally:
            for path in (probe, linked):
                try:
                    remove_quietly(path)
                except OSError:
                    # The folder itself is not there: nothing was written.
                    continue

    def create(self, key: str, data: bytes) -> bool:
        """Create the object; False when it exists."""
        with self._private_file() as private:
            _write_bytes(private, data)
            return self._publish(private, self.root / key, os.link)

    def put(self, key: str, data: bytes) -> None:
        """Create or replace the object."""
        with self._private_file() as private:
            _write_bytes(private, data)
            self._publish(private, self.root / key, os.replace)

    def put_file(self, key: str, local_path: Path, sha256: str | None) -> None:
        """Create the object from a file, or replace it."""
        with self._private_file() as private:
            copied = copy_and_hash(local_path, private)
            if sha256 is not None and copied != sha256:
                raise DamagedObject(f"{local_path} changed while it was stored; write it completely, then store it")
            os.chmod(private, _FILE_MODE)
            self._publish(private, self.root / key, os.replace)

    def get_file(self, key: str, local_path: Path) -> None:
        """Copy the object to a local file."""
        copy_and_hash(self.root / key, local_path)

    def read(self, key: str) -> bytes:
        """Return the object's bytes; FileNotFoundError when it is missing."""
        return (self.root / key).read_bytes()

    def open(self, key: str) -> BinaryIO:
        """Open the object for reading; FileNotFoundError when it is missing."""
        return open(self.root / key, "rb")

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, None when it is missing."""
        path = self.root / key
        try:
            return path.stat().st_size if path.is_file() else None
        except FileNotFoundError:
            return None

    def touch(self, key: str) -> bool:
        """Make the object as young as if it were written now; False where it is gone, or another user's."""
        try:
            os.utime(self.root / key)
        except (FileNotFoundError, PermissionError):
            return False
        return True

    def modified(self, key: str) -> float | None:
        """Return when the object was written, in seconds since the epoch, None when it is missing."""
        try:
            return (self.root / key).stat().st_mtime
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> list[str]:
        """Return the keys that begin with `prefix`, in no order."""
        start = self.root / prefix.rpartition("/")[0]
        return [key for key in self._walk(start) if key.startswith(prefix)]

    def details(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose keys begin with `prefix`, in no order; one that vanishes meanwhile is left out."""
        for key in self.list(prefix):
            try:
                stat = (self.root / key).stat()
            except FileNotFoundError:
                continue
            yield ObjectInfo(key, stat.st_size, stat.st_mtime)

    def unfinished(self) -> Iterator[ObjectInfo]:
        """Yield the files in the folder of unfinished ones, in no order."""
        try:
            names = os.listdir(self._temporary)
        except FileNotFoundError:
            return
        for name in names:
            try:
                stat = (self._temporary / name).stat()
            except FileNotFoundError:
                continue
            yield ObjectInfo(f"{TEMPORARY_FOLDER}/{name}", stat.st_size, stat.st_mtime)

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        (self.root / key).unlink(missing_ok=True)
        # Empty folders go too, as far as they are empty; _publish copes with one that vanishes under it.
        for parent in (self.root / key).parents:
            if parent == self.root:
                return
            try:
                parent.rmdir()
            except OSError:
                return

    def move(self, key: str, new_key: str) -> None:
        """Give the object another key."""
        self._publish(self.root / key, self.root / new_key, os.replace)

    def local_path(self, key: str) -> Path | None:
        """Return where the object lies as a local file."""
        return self.root / key

    def _walk(self, start: Path) -> Iterator[str]:
        for folder, folders, names in os.walk(start, onerror=_raise_unless_missing):
            if Path(folder) == self.root:
                folders[:] = [name for name in folders if name != TEMPORARY_FOLDER]
            for name in names:
                if not name.startswith(TEMPORARY_PREFIX):
                    yield (Path(folder) / name).relative_to(self.root).as_posix()

    def _private_file(self) -> "_PrivateFile":
        return _PrivateFile(self._temporary)

    def _publish(self, source: Path, final: Path, operation: Callable[[Path, Path], None]) -> bool:
        for attempt in range(_LINK_ATTEMPTS):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                operation(source, final)
            except FileExistsError:
                return False
            except FileNotFoundError:
                # Another process removed the folder, empty until now, between mkdir and link.
                if attempt == _LINK_ATTEMPTS - 1 or not source.exists():
                    raise
                continue
            fsync_path(final.parent)
            return True
        raise AssertionError("unreachable")


class _PrivateFile:
    """A path in the folder of unfinished files, removed at the end of the block."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / temporary_name()

    def __enter__(self) -> Path:
        return self._path

    def __exit__(self, *exc_info: object) -> None:
        self._path.unlink(missing_ok=True)


def _raise_unless_missing(error: OSError) -> None:
    # os.walk leaves out a folder that it cannot read, and so would a list that decides what is garbage.
    if not isinstance(error, FileNotFoundError):
        raise error


def _write_bytes(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(path, _FILE_MODE)
