"""Objects in a local folder: a temporary file is fsynced, then hard-linked (create-only) or renamed to its final name.

Symbolic links below the folder are never followed, so that nothing outside it is read, changed or deleted, whatever
the folder contains: folders are opened one after another without following links, and files are accessed relative to
them. The folder itself may be a link, which is its owner's choice.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from storage.errors import DamagedObject, StoreError
from storage.files import TEMPORARY_PREFIX, copy_and_hash, temporary_name
from storage.objects.info import ObjectInfo

TEMPORARY_FOLDER = "tmp"
_FILE_MODE = 0o444
_LINK_ATTEMPTS = 20
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Non-blocking, since opening a pipe would wait for its writer."""
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class LocalBackend:
    """Backend whose keys are paths in one folder; `tmp/` holds unfinished files and may be emptied if nothing runs."""

    is_remote = False

    def __init__(self, root: Path) -> None:
        self.root = root

    def check_exists(self) -> None:
        """Raise StoreError unless the folder exists."""
        try:
            with self._folder(""):
                return
        except OSError as error:
            raise StoreError(
                f"there is no store in {self.root}: {error.strerror}; name another with --store or MUSEVL_STORE, or "
                "make one with `musevl run`"
            ) from error

    def check_access(self) -> None:
        """Create the folder if needed; raise StoreError unless files can be created and hard-linked in it."""
        probe, linked = temporary_name(), temporary_name()
        made = False
        try:
            with self._folder(TEMPORARY_FOLDER, make=True) as folder:
                try:
                    with open(os.open(probe, _WRITE_FLAGS, 0o600, dir_fd=folder), "wb") as file:
                        file.write(b"probe")
                    made = True
                    os.link(probe, linked, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
                finally:
                    for name in (probe, linked):
                        with suppress(FileNotFoundError):
                            os.unlink(name, dir_fd=folder)
        except OSError as error:
            remedy = "choose a folder that you can write to"
            if made and error.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                remedy = "choose a file system with hard links; create-only files need them"
            raise StoreError(f"cannot write to the store folder {self.root}: {error.strerror}; {remedy}") from error

    def create(self, key: str, data: bytes) -> bool:
        """Create the object; return False if it exists already."""
        with self._private_file() as (folder, name):
            self._write(folder, name, data)
            return self._publish(folder, name, key, _link)

    def put(self, key: str, data: bytes) -> None:
        """Create or replace the object."""
        with self._private_file() as (folder, name):
            self._write(folder, name, data)
            self._publish(folder, name, key, _replace)

    def put_file(self, key: str, local_path: Path, sha256: str | None) -> None:
        """Create or replace the object with the content of a file."""
        with self._private_file() as (folder, name):
            copied = copy_and_hash(local_path, os.open(name, _WRITE_FLAGS, 0o600, dir_fd=folder))
            if sha256 is not None and copied != sha256:
                raise DamagedObject(f"{local_path} changed while it was stored; write it completely, then store it")
            os.chmod(name, _FILE_MODE, dir_fd=folder)
            self._publish(folder, name, key, _replace)

    def get_file(self, key: str, local_path: Path) -> None:
        """Copy the object to a local file."""
        copy_and_hash(self._open(key), local_path)

    def read(self, key: str) -> bytes:
        """Return the object's bytes; FileNotFoundError if it is missing, DamagedObject if it is no regular file."""
        with self.open(key) as file:
            return file.read()

    def open(self, key: str) -> BinaryIO:
        """Open the object for reading; FileNotFoundError if it is missing, DamagedObject if it is no regular file."""
        return open(self._open(key), "rb")

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, or None if it is missing or no regular file."""
        found = self._stat(key)
        return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else None

    def touch(self, key: str) -> bool:
        """Set the object's modification time to now; return False if it is missing or belongs to another user."""
        try:
            with self._folder_of(key) as (folder, name):
                os.utime(name, dir_fd=folder, follow_symlinks=False)
        except (FileNotFoundError, PermissionError):
            return False
        return True

    def modified(self, key: str) -> float | None:
        """Return the object's modification time in seconds since the epoch, or None if it is missing."""
        found = self._stat(key)
        return None if found is None else found.st_mtime

    def list(self, prefix: str) -> list[str]:
        """Return the keys that begin with `prefix`, in any order."""
        start = prefix.rpartition("/")[0]
        try:
            with self._folder(start):
                return [key for key in self._walk(start) if key.startswith(prefix)]
        except FileNotFoundError:
            return []

    def details(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose keys begin with `prefix`, in any order; one that vanishes meanwhile is left out."""
        for key in self.list(prefix):
            if (found := self._stat(key)) is not None:
                yield ObjectInfo(key, found.st_size, found.st_mtime)

    def unfinished(self) -> Iterator[ObjectInfo]:
        """Yield the files in the folder of unfinished files, in any order."""
        try:
            with self._folder(TEMPORARY_FOLDER) as folder:
                names = os.listdir(folder)
        except FileNotFoundError:
            return
        for key in [f"{TEMPORARY_FOLDER}/{name}" for name in names]:
            found = self._stat(key)
            if found is not None and not stat.S_ISDIR(found.st_mode):
                yield ObjectInfo(key, found.st_size, found.st_mtime)

    def delete(self, key: str) -> None:
        """Remove the object if it exists; if it is a link, remove the link."""
        try:
            with self._folder_of(key) as (folder, name):
                os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            pass
        # Remove parent folders that are empty now; _publish handles a folder that vanishes meanwhile.
        while "/" in key:
            key = key.rpartition("/")[0]
            try:
                with self._folder_of(key) as (folder, name):
                    os.rmdir(name, dir_fd=folder)
            except OSError:
                return

    def move(self, key: str, new_key: str) -> None:
        """Rename the object."""
        with self._folder_of(key) as (folder, name):
            self._publish(folder, name, new_key, _replace)

    def local_path(self, key: str) -> Path | None:
        """Return the path of the object as a local file; `size` tells whether it exists."""
        return self.root / key

    def _walk(self, folder: str) -> Iterator[str]:
        """Yield the keys in a folder; raise if a part cannot be listed, since the list decides what is deleted."""
        try:
            entries = list(os.scandir(self.root / folder))
        except FileNotFoundError:
            return  # removed since its parent was listed
        for entry in entries:
            key = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                if key != TEMPORARY_FOLDER:
                    yield from self._walk(key)
            elif entry.is_dir():
                raise self._link_for_folder(key)
            elif not entry.name.startswith(TEMPORARY_PREFIX):
                yield key

    @contextmanager
    def _folder(self, folder: str, *, make: bool = False) -> Iterator[int]:
        """Yield a descriptor of a folder of the store, opened without following links below the store's root."""
        if make:
            self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root, _FOLDER_FLAGS)
        try:
            passed: list[str] = []
            for name in folder.split("/") if folder else ():
                passed.append(name)
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(name, dir_fd=descriptor)
                try:
                    inner = os.open(name, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=descriptor)
                except OSError as error:
                    if error.errno in (errno.ENOTDIR, errno.ELOOP) and (self.root / "/".join(passed)).is_symlink():
                        raise self._link_for_folder("/".join(passed)) from error
                    raise
                os.close(descriptor)
                descriptor = inner
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _folder_of(self, key: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """Yield a descriptor of the folder that contains an object, and the object's name there."""
        parent, _, name = key.rpartition("/")
        with self._folder(parent, make=make) as folder:
            yield folder, name

    def _stat(self, key: str) -> os.stat_result | None:
        try:
            with self._folder_of(key) as (folder, name):
                return os.stat(name, dir_fd=folder, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _open(self, key: str) -> int:
        """Open a regular file for reading; the caller closes the descriptor."""
        with self._folder_of(key) as (folder, name):
            try:
                descriptor = os.open(name, _READ_FLAGS, dir_fd=folder)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                raise DamagedObject(
                    f"{key} in the store {self.root} is a symbolic link, which a store never follows; remove it, or "
                    "put the file itself there"
                ) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DamagedObject(f"{key} in the store {self.root} is no regular file; remove it")
        return descriptor

    @contextmanager
    def _private_file(self) -> Iterator[tuple[int, str]]:
        """Yield a descriptor of the folder of unfinished files and a new name there; remove that file at the end."""
        with self._folder(TEMPORARY_FOLDER, make=True) as folder:
            name = temporary_name()
            try:
                yield folder, name
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)

    def _write(self, folder: int, name: str, data: bytes) -> None:
        with open(os.open(name, _WRITE_FLAGS, 0o600, dir_fd=folder), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, _FILE_MODE, dir_fd=folder)

    def _publish(self, folder: int, name: str, key: str, operation: Callable[[int, str, int, str], None]) -> bool:
        for attempt in range(_LINK_ATTEMPTS):
            try:
                with self._folder_of(key, make=True) as (final_folder, final_name):
                    operation(folder, name, final_folder, final_name)
                    os.fsync(final_folder)
                    return True
            except FileExistsError:
                return False
            except FileNotFoundError:
                # Another process has removed the empty folder between mkdir and link.
                if attempt == _LINK_ATTEMPTS - 1 or not _exists(folder, name):
                    raise
        raise AssertionError("unreachable")

    def _link_for_folder(self, folder: str) -> StoreError:
        return StoreError(
            f"{folder} in the store {self.root} is a symbolic link, which a store never follows; remove it, or put the "
            "folder itself there (a bind mount does)"
        )


def _link(folder: int, name: str, final_folder: int, final_name: str) -> None:
    os.link(name, final_name, src_dir_fd=folder, dst_dir_fd=final_folder, follow_symlinks=False)


def _replace(folder: int, name: str, final_folder: int, final_name: str) -> None:
    os.replace(name, final_name, src_dir_fd=folder, dst_dir_fd=final_folder)


def _exists(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
