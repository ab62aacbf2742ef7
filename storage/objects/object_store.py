"""The object store interface over a folder or a bucket; the store relies on its atomic create-only writes."""

import builtins
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from storage.digests import canonical_json, digest_of
from storage.errors import ObjectMissing, StoreError
from storage.manifest import check_relative_path
from storage.objects.info import ObjectInfo
from storage.objects.local import TEMPORARY_FOLDER, LocalBackend
from storage.objects.s3 import S3Backend, not_writable
from storage.objects.s3_retries import described, is_transport_error

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_REMOTE_THREADS = 16


class ObjectStore:
    """Reads and writes objects by key under one URI.

    Args:
        uri: a local path, `file:///path`, or `s3://bucket/prefix`.
        options: for S3, passed to `s3fs.S3FileSystem`, for example `endpoint_url`; by default credentials and endpoint
            come from the standard AWS variables. A local folder takes no options.

    Raises:
        ValueError: the kind of URI is not supported. Nothing is read or written before the first method call.
    """

    def __init__(self, uri: str, **options: Any) -> None:
        self._backend: LocalBackend | S3Backend
        if uri.startswith("s3://"):
            bucket, _, prefix = uri.removeprefix("s3://").strip("/").partition("/")
            if not bucket:
                raise ValueError(f"store URI {uri!r} names no bucket; write s3://bucket/prefix")
            if prefix:
                check_relative_path(prefix)
            self._backend = S3Backend(bucket, prefix, options)
            self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
            return
        path = uri.removeprefix("file://")
        if "://" in path or not path:
            raise ValueError(
                f"store URI {uri!r} is not supported; give a local path, file:///path or s3://bucket/prefix"
            )
        if options:
            raise ValueError(f"store URI {uri!r} is a local folder, which takes no options; remove {sorted(options)}")
        root = Path(path).expanduser().absolute()
        self._backend = LocalBackend(root)
        self.uri = str(root)

    @property
    def is_remote(self) -> bool:
        """Whether objects are accessed over a network, so that they have to be downloaded and calls should overlap."""
        return self._backend.is_remote

    @property
    def endpoint(self) -> str:
        """The S3 endpoint that serves the objects, or 'local'."""
        return self._backend.endpoint if isinstance(self._backend, S3Backend) else "local"

    def check_exists(self) -> None:
        """Raise StoreError unless the folder exists, or an object under the prefix; writes nothing."""
        self._backend.check_exists()

    def check_access(self) -> None:
        """Raise StoreError unless the folder is writable or the bucket answers."""
        self._backend.check_access()

    def check_writes(self) -> None:
        """Raise StoreError unless objects can be written, and create-only writes are exclusive.

        In a bucket, a small object records for each endpoint that this was probed; it is rewritten each time.
        """
        self.check_access()
        if not self.is_remote:
            return
        key = f"probes/held-{digest_of(self.endpoint)[:16]}.json"
        if self.size(key) is None:
            self.probe_conditional_create()
        with self._explained("write", key):
            try:
                self._backend.put(key, canonical_json({"conditional_create": True}))
            except PermissionError as error:
                raise not_writable(self.uri, error) from error

    def probe_conditional_create(self) -> None:
        """Raise StoreError unless create-only writes are exclusive; writes and removes one small object."""
        if isinstance(self._backend, S3Backend):
            self._backend.probe_conditional_create()
        else:
            self._backend.check_access()

    def create(self, key: str, data: bytes) -> bool:
        """Create an object in one atomic step.

        Args:
            key: relative POSIX path.
            data: at least one byte.

        Returns:
            True if this call created it, False if it existed. It also returns True if this call created the object but
            the service's answer was lost.
        """
        if not data:
            raise ValueError(f"cannot create {key!r} without bytes; conditional puts need at least one")
        _check_key(key)
        with self._explained("create", key):
            return self._backend.create(key, data)

    def put(self, key: str, data: bytes) -> None:
        """Create or replace an object in one atomic step."""
        _check_key(key)
        with self._explained("write", key):
            self._backend.put(key, data)

    def put_file(self, key: str, local_path: str | Path, *, sha256: str | None = None) -> None:
        """Store a local file; an object with that key is replaced.

        Args:
            key: relative POSIX path.
            local_path: a complete file.
            sha256: checksum of the file; if given, a local store refuses to publish a copy that differs.
        """
        _check_key(key)
        with self._explained("store", key):
            self._backend.put_file(key, Path(local_path), sha256)

    def get_file(self, key: str, local_path: str | Path) -> None:
        """Copy an object to a local file (not atomically); raises the same as `read`."""
        _check_key(key)
        with self._explained("read", key):
            self._backend.get_file(key, Path(local_path))

    def read(self, key: str) -> bytes:
        """Return an object's bytes.

        Raises:
            ObjectMissing: there is no such object.
            DamagedObject: it is a symbolic link or something else that is no regular file.
        """
        _check_key(key)
        with self._explained("read", key):
            return self._backend.read(key)

    @contextmanager
    def open(self, key: str) -> Iterator[BinaryIO]:
        """Open an object for reading in chunks; raises the same as `read`."""
        _check_key(key)
        with self._explained("read", key), self._backend.open(key) as stream:
            yield stream

    def size(self, key: str) -> int | None:
        """Return an object's size in bytes, or None if it is missing or no regular file."""
        _check_key(key)
        with self._explained("look at", key):
            return self._backend.size(key)

    def touch(self, key: str) -> bool:
        """Set an object's modification time to now; return False if it is missing and must be written again."""
        _check_key(key)
        with self._explained("renew", key):
            return self._backend.touch(key)

    def modified(self, key: str) -> float | None:
        """Return an object's modification time in seconds since the epoch, or None if it is missing."""
        _check_key(key)
        with self._explained("look at", key):
            return self._backend.modified(key)

    def list(self, prefix: str) -> list[str]:
        """Return the keys that begin with `prefix`, sorted, without unfinished files.

        Names that no object can have (unprintable, with a backslash) are left out too, since the store has not written
        them.

        Raises:
            StoreError: a part of the list cannot be read; an incomplete list is never returned.
        """
        _check_prefix(prefix)
        with self._explained("list", prefix or "."):
            return sorted(key for key in self._backend.list(prefix) if _is_plain(key))

    def details(self, prefix: str) -> builtins.list[ObjectInfo]:
        """Return the objects whose keys begin with `prefix`, sorted by key, with size and modification time."""
        _check_prefix(prefix)
        with self._explained("list", prefix or "."):
            return sorted(filter(_is_own, self._backend.details(prefix)), key=lambda item: item.key)

    def unfinished(self) -> builtins.list[ObjectInfo]:
        """Return the unfinished files that a writer has left behind or is still writing; a bucket has none."""
        with self._explained("list", TEMPORARY_FOLDER):
            return sorted(filter(_is_own, self._backend.unfinished()), key=lambda item: item.key)

    def delete_any(self, key: str) -> None:
        """Remove an object or an unfinished file if it exists."""
        check_relative_path(key)
        with self._explained("delete", key):
            self._backend.delete(key)

    def delete(self, key: str) -> None:
        """Remove an object if it exists."""
        _check_key(key)
        with self._explained("delete", key):
            self._backend.delete(key)

    def delete_prefix(self, prefix: str) -> None:
        """Remove every object whose key begins with `prefix`, which must not be empty."""
        if not prefix:
            raise ValueError("delete_prefix('') would remove the whole store; name what to remove")
        self.map(self.delete, self.list(prefix))

    def move(self, key: str, new_key: str) -> None:
        """Rename an object; raise ObjectMissing if it does not exist."""
        _check_key(key)
        _check_key(new_key)
        with self._explained("move", key):
            self._backend.move(key, new_key)

    def local_path(self, key: str) -> Path | None:
        """Return the local file of an object, or None for a bucket."""
        _check_key(key)
        return self._backend.local_path(key)

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> builtins.list[_Result]:
        """Apply `function` to each item, in threads if the store is remote; results are in the order of the items."""
        if not self.is_remote:
            return [function(item) for item in items]
        with ThreadPoolExecutor(_REMOTE_THREADS) as pool:
            return list(pool.map(function, items))

    @contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError as error:
            raise ObjectMissing(f"cannot {verb} {key!r}: it is not in the store {self.uri}") from error
        except Exception as error:
            if not isinstance(error, OSError) and not is_transport_error(error):
                raise
            raise StoreError(
                f"cannot {verb} {key!r} in the store {self.uri}: {described(error)}; "
                "check free space, permissions and the network"
            ) from error


def _is_own(item: ObjectInfo) -> bool:
    return _is_plain(item.key)


def _is_plain(key: str) -> bool:
    try:
        check_relative_path(key)
    except ValueError:
        return False
    return True


def _check_prefix(prefix: str) -> None:
    folder = prefix.rpartition("/")[0]
    if folder:
        check_relative_path(folder)


def _check_key(key: str) -> None:
    check_relative_path(key)
    if key.split("/")[0] == TEMPORARY_FOLDER:
        raise ValueError(f"key {key!r} lies in {TEMPORARY_FOLDER}/, which is for unfinished files; use another name")
