"""Atomic writes of local files: they are written under a temporary name and then renamed."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.digests import CHUNK_BYTES, sha256_file
from storage.errors import StoreError
from storage.manifest import FileEntry

TEMPORARY_PREFIX = ".musevl-tmp-"


def temporary_name() -> str:
    """Return a new temporary file name, which all listings of the store ignore."""
    return TEMPORARY_PREFIX + uuid.uuid4().hex


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; its file is renamed to `path` when the block ends without an exception.

    The file is fsynced before the rename. If the block raises, the temporary file (or folder) is removed and `path` is
    untouched.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    private = final.parent / temporary_name()
    try:
        yield private
        fsync_path(private)
        os.replace(private, final)
        fsync_path(final.parent)
    finally:
        remove_quietly(private)


class CheckedFiles:
    """Files whose checksum this process has verified, which is done once as long as size and modification time stay."""

    def __init__(self) -> None:
        self._states: dict[str, tuple[int, int]] = {}

    def right(self, path: Path, entry: FileEntry) -> bool:
        """Return whether a file has the size and sha256 of `entry`; raise FileNotFoundError if it does not exist."""
        stat = path.stat()
        state = (stat.st_size, stat.st_mtime_ns)
        if self._states.get(entry.sha256) == state:
            return True
        if stat.st_size != entry.size or sha256_file(path) != entry.sha256:
            return False
        self._states[entry.sha256] = state
        return True


def copy_and_hash(source: str | Path | int, target: str | Path | int) -> str:
    """Copy a local file in chunks, fsync the copy and return the sha256 of the copied bytes.

    Source and target are paths or open descriptors; descriptors are closed.
    """
    sha256 = hashlib.sha256()
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            sha256.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return sha256.hexdigest()


def refuse_links(folder: Path, path: str, what: str) -> None:
    """Raise StoreError if a folder on the path from `folder` to `folder/path` is a symbolic link.

    Args:
        folder: the base folder; it may be a link itself, which is its owner's choice.
        path: relative POSIX path of a file below `folder`.
        what: name of the base folder in the message.
    """
    for parent in reversed(Path(path).parents[:-1]):
        if (folder / parent).is_symlink():
            raise StoreError(
                f"{folder / parent} is a symbolic link, which nothing in {what} is written through; remove it, or name "
                "another folder"
            )


def fsync_path(path: str | Path) -> None:
    """Flush a file or a folder to disk with fsync."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_quietly(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
