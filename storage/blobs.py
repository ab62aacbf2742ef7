"""Blobs: files stored under the sha256 of their bytes, and read back only if they still have it."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from storage.digests import CHUNK_BYTES, is_sha256, sha256_bytes, sha256_file
from storage.errors import DamagedObject, ObjectMissing
from storage.files import atomic_path, copy_and_hash
from storage.manifest import FileEntry
from storage.objects import ObjectStore


def blob_key(sha256: str) -> str:
    """Return the key of a blob: `cas/sha256/ab/abcdef...`."""
    if not is_sha256(sha256):
        raise ValueError(f"{sha256!r} is no sha256; give 64 lower-case hexadecimal digits")
    return f"cas/sha256/{sha256[:2]}/{sha256}"


def default_cache_dir() -> Path:
    """Return the folder for downloaded blobs: MUSEVL_CACHE, or `musevl` in the user's cache folder."""
    if named := os.environ.get("MUSEVL_CACHE"):
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "musevl"


class Blobs:
    """Reads and writes blobs of one object store.

    Args:
        objects: where the blobs are.
        cache_dir: local folder that downloaded blobs are kept in; a local store needs none.
    """

    def __init__(self, objects: ObjectStore, cache_dir: Path) -> None:
        self._objects = objects
        self._cache_dir = cache_dir
        # Blobs whose bytes this process has checked, by size and time of change: large ones are hashed once.
        self._checked: dict[str, tuple[int, int]] = {}

    def put_file(self, local_path: str | Path, path: str) -> FileEntry:
        """Store a complete local file; DamagedObject when it changes meanwhile."""
        source = Path(local_path)
        before = source.stat()
        entry = FileEntry(path=path, size=before.st_size, sha256=sha256_file(source))
        key = blob_key(entry.sha256)
        self._objects.put_file(key, source, sha256=entry.sha256)
        after = source.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            if self._sha256_of(key) != entry.sha256:
                self._objects.delete(key)
            raise DamagedObject(f"{source} changed while it was stored; write it completely, then store it")
        return entry

    def put_bytes(self, data: bytes, path: str) -> FileEntry:
        """Store bytes."""
        entry = FileEntry(path=path, size=len(data), sha256=sha256_bytes(data))
        key = blob_key(entry.sha256)
        if self._objects.size(key) != entry.size or self._objects.read(key) != data:
            self._objects.put(key, data)
        return entry

    def read_bytes(self, entry: FileEntry) -> bytes:
        """Return a blob's bytes; ObjectMissing or DamagedObject when they are not what `entry` says."""
        data = self._objects.read(blob_key(entry.sha256))
        if len(data) != entry.size or sha256_bytes(data) != entry.sha256:
            raise self._damaged(entry)
        return data

    def fetch(self, entry: FileEntry) -> Path:
        """Return a local, checked, read-only file with the blob's bytes; it must not be changed.

        Raises:
            ObjectMissing, DamagedObject: the blob is not there, or is not what `entry` says.
        """
        key = blob_key(entry.sha256)
        own = self._objects.local_path(key)
        if own is None:
            return self._download(entry)
        if not own.is_file():
            raise ObjectMissing(f"cannot fetch {entry.path!r}: {key} is not in the store {self._objects.uri}")
        stat = own.stat()
        state = (stat.st_size, stat.st_mtime_ns)
        if self._checked.get(entry.sha256) != state:
            if stat.st_size != entry.size or sha256_file(own) != entry.sha256:
                raise self._damaged(entry)
            self._checked[entry.sha256] = state
        return own

    def copy_to(self, entry: FileEntry, target: Path) -> None:
        """Copy a blob to the file `target`, which appears only if its bytes are right."""
        source = self.fetch(entry)
        with atomic_path(target) as private:
            if copy_and_hash(source, private) != entry.sha256:
                raise self._damaged(entry)

    def present(self, entries: Iterable[FileEntry]) -> bool:
        """Say whether all blobs are there with their sizes."""
        return not self.missing(entries)

    def missing(self, entries: Iterable[FileEntry]) -> list[FileEntry]:
        """Return the entries whose blob is absent or has another size."""
        listed = list(entries)
        sizes = self._objects.map(lambda entry: self._objects.size(blob_key(entry.sha256)), listed)
        return [entry for entry, size in zip(listed, sizes, strict=True) if size != entry.size]

    def problem(self, entry: FileEntry) -> str | None:
        """Re-hash a blob; return None when it is right, else what is wrong with it."""
        key = blob_key(entry.sha256)
        size = self._objects.size(key)
        if size is None:
            return "missing"
        if size != entry.size:
            return f"damaged: {size} bytes instead of {entry.size}"
        found = self._sha256_of(key)
        return None if found == entry.sha256 else f"damaged: its bytes have the sha256 {found}"

    def _sha256_of(self, key: str) -> str:
        sha256 = hashlib.sha256()
        with self._objects.open(key) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                sha256.update(chunk)
        return sha256.hexdigest()

    def _download(self, entry: FileEntry) -> Path:
        target = self._cache_dir / blob_key(entry.sha256)
        if target.is_file() and target.stat().st_size == entry.size:
            return target
        with atomic_path(target) as private:
            self._objects.get_file(blob_key(entry.sha256), private)
            if private.stat().st_size != entry.size or sha256_file(private) != entry.sha256:
                raise self._damaged(entry)
            os.chmod(private, 0o444)
        return target

    def _damaged(self, entry: FileEntry) -> DamagedObject:
        return DamagedObject(
            f"the bytes of {entry.path!r} ({blob_key(entry.sha256)}) in the store {self._objects.uri} are not those "
            "that were written; run `musevl artifacts verify` to set them aside, then run the stage again"
        )
