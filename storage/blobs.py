"""Blobs: files stored under the sha256 of their bytes, which is checked when they are read."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

from storage.cache import Cache
from storage.digests import CHUNK_BYTES, is_sha256, sha256_bytes, sha256_file
from storage.errors import DamagedObject, ObjectMissing
from storage.files import atomic_path, copy_and_hash
from storage.manifest import FileEntry
from storage.objects.object_store import ObjectStore

logger = logging.getLogger(__name__)


def blob_key(sha256: str) -> str:
    """Return the key of a blob: `cas/sha256/ab/abcdef...`."""
    if not is_sha256(sha256):
        raise ValueError(f"{sha256!r} is no sha256; give 64 lower-case hexadecimal digits")
    return f"cas/sha256/{sha256[:2]}/{sha256}"


class Blobs:
    """Reads and writes blobs of one object store.

    Args:
        objects: the store that holds the blobs.
        cache: local cache of downloaded blobs; a local store does not use it.
    """

    def __init__(self, objects: ObjectStore, cache: Cache) -> None:
        self._objects = objects
        self._cache = cache

    def put_file(self, local_path: str | Path, path: str) -> FileEntry:
        """Store a complete local file under the name `path`; raise DamagedObject if it changes meanwhile."""
        source = Path(local_path)
        before = source.stat()
        entry = FileEntry(path=path, size=before.st_size, sha256=sha256_file(source))
        key = blob_key(entry.sha256)
        if self._is_stored(entry):
            return entry
        self._objects.put_file(key, source, sha256=entry.sha256)
        after = source.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            if self._sha256_of(key) != entry.sha256:
                self._objects.delete(key)
            raise DamagedObject(f"{source} changed while it was stored; write it completely, then store it")
        return entry

    def put_bytes(self, data: bytes, path: str) -> FileEntry:
        """Store bytes under the name `path`."""
        entry = FileEntry(path=path, size=len(data), sha256=sha256_bytes(data))
        if not self._is_stored(entry):
            self._objects.put(blob_key(entry.sha256), data)
        return entry

    def read_bytes(self, entry: FileEntry) -> bytes:
        """Return a blob's bytes; raise ObjectMissing or DamagedObject if they do not match `entry`."""
        data = self._objects.read(blob_key(entry.sha256))
        if len(data) != entry.size or sha256_bytes(data) != entry.sha256:
            raise self._damaged(entry)
        return data

    def fetch(self, entry: FileEntry) -> Path:
        """Return a local, read-only file with the blob's checked bytes; it must not be changed.

        Keep a reference to the returned path object while the file is in use: the cache of an S3 store keeps the file
        as long as that object exists.

        Raises:
            ObjectMissing, DamagedObject: the blob does not exist, or does not match `entry`.
        """
        key = blob_key(entry.sha256)
        own = self._objects.local_path(key)
        if own is None:
            return self._cache.fetch(key, entry, lambda path: self._download(entry, path))
        if self._objects.size(key) is None:
            raise ObjectMissing(f"cannot fetch {entry.path!r}: {key} is not in the store {self._objects.uri}")
        if not self._cache.checked.right(own, entry):
            raise self._damaged(entry)
        return own

    def copy_to(self, entry: FileEntry, target: Path) -> None:
        """Copy a blob to the file `target`, which is created by an atomic rename after its checksum is verified."""
        source = self.fetch(entry)
        with atomic_path(target) as private:
            if copy_and_hash(source, private) != entry.sha256:
                raise self._damaged(entry)

    def missing(self, entries: Iterable[FileEntry]) -> list[FileEntry]:
        """Return the entries whose blob does not exist or has another size."""
        listed = list(entries)
        sizes = self._objects.map(lambda entry: self._objects.size(blob_key(entry.sha256)), listed)
        return [entry for entry, size in zip(listed, sizes, strict=True) if size != entry.size]

    def problem(self, entry: FileEntry) -> str | None:
        """Verify a blob's checksum; return None if it matches, else what is wrong with it."""
        key = blob_key(entry.sha256)
        size = self._objects.size(key)
        if size is None and self._objects.is_remote:
            return "missing"
        if size is not None and size != entry.size:
            return f"damaged: {size} bytes instead of {entry.size}"
        try:  # also if a local store has no regular file of that name: a link counts as damage
            found = self._sha256_of(key)
        except ObjectMissing:
            return "missing"
        except DamagedObject as error:
            return f"damaged: {error}"
        return None if found == entry.sha256 else f"damaged: its bytes have the sha256 {found}"

    def _is_stored(self, entry: FileEntry) -> bool:
        """Return whether an intact blob exists, and update its modification time for the garbage collection.

        Its bytes are read, so that a damaged blob is stored again while the correct bytes are at hand.
        """
        key = blob_key(entry.sha256)
        if (problem := self.problem(entry)) is None:
            return self._objects.touch(key)
        if problem != "missing":
            logger.warning("%s (%s) in the store was %s; it is stored again", entry.path, key, problem)
        return False

    def _sha256_of(self, key: str) -> str:
        sha256 = hashlib.sha256()
        with self._objects.open(key) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                sha256.update(chunk)
        return sha256.hexdigest()

    def _download(self, entry: FileEntry, path: Path) -> None:
        self._objects.get_file(blob_key(entry.sha256), path)
        if not self._cache.checked.right(path, entry):
            raise self._damaged(entry)

    def _damaged(self, entry: FileEntry) -> DamagedObject:
        return DamagedObject(
            f"the bytes of {entry.path!r} ({blob_key(entry.sha256)}) in the store {self._objects.uri} are not those "
            "that were written; run `musevl artifacts verify` to set them aside, then run the stage again"
        )
