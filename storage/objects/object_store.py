"""Named byte strings in a folder or a bucket, with the one promise that the store is built on: create-only writes."""

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
from storage.objects.s3_retries import is_transport_error, one_line

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_REMOTE_THREADS = 16


class ObjectStore:
    """Objects by key under one URI.

    Args:
        uri: a local path, `file:///path`, or `s3://bucket/prefix`.
        options: for S3, passed to `s3fs.S3FileSystem`, for example `endpoint_url`; credentials and endpoint come
            from the standard AWS variables otherwise. A local folder takes none.

    Raises:
        ValueError: an unknown kind of URI. Nothing is read or written before the first call of a method.
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
        """Whether objects lie behind a network, so that they must be downloaded and calls should overlap."""
        return self._backend.is_remote

    @property
    def endpoint(self) -> str:
        """What serves the objects: the S3 endpoint, or 'local'."""
        return self._backend.endpoint if isinstance(self._backend, S3Backend) else "local"

    def check_exists(self) -> None:
        """Raise StoreError, on one line, unless there is a folder, or something under the prefix; writes nothing."""
        self._backend.check_exists()

    def check_access(self) -> None:
        """Raise StoreError, on one line, unless the folder can be written to or the bucket answers."""
        self._backend.check_access()

    def check_writes(self) -> None:
        """Raise StoreError, on one line, unless objects can be written, and by one writer alone where that is asked.

        A bucket keeps a note that this was probed through an endpoint; it is written anew each time.
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
        """Raise StoreError unless create-only writes hold; writes and removes one small object."""
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
            True if this call created it, False if it was there. An object that this very call created, though the
            service's answer was lost, counts as created.
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
        """Store a local file; an object of that key is replaced.

        Args:
            key: relative POSIX path.
            local_path: a complete file.
            sha256: of the file; where given, a local store refuses to publish a copy that differs.
        """
        _check_key(key)
        with self._explained("store", key):
            self._backend.put_file(key, Path(local_path), sha256)

    def get_file(self, key: str, local_path: str | Path) -> None:
        """Copy an object to a local file (not atomically); raises as `read` does."""
        _check_key(key)
        with self._explained("read", key):
            self._backend.get_file(key, Path(local_path))

    def read(self, key: str) -> bytes:
        """Return an object's bytes.

        Raises:
            ObjectMissing: it is not there.
            DamagedObject: in its place is a symbolic link, or something else that is no file.
        """
        _check_key(key)
        with self._explained("read", key):
            return self._backend.read(key)

    @contextmanager
    def open(self, key: str) -> Iterator[BinaryIO]:
        """Open an object for reading in pieces; raises as `read` does."""
        _check_key(key)
        with self._explained("read", key), self._backend.open(key) as stream:
            yield stream

    def size(self, key: str) -> int | None:
        """Return an object's size in bytes, None when it is not there or no file."""
        _check_key(key)
        with self._explained("look at", key):
            return self._backend.size(key)

    def touch(self, key: str) -> bool:
        """Make an object as young as if it were written now; False where it is gone and must be written again."""
        _check_key(key)
        with self._explained("renew", key):
            return self._backend.touch(key)

    def modified(self, key: str) -> float | None:
        """Return when an object was written, in seconds since the epoch, None when it is not there."""
        _check_key(key)
        with self._explained("look at", key):
            return self._backend.modified(key)

    def list(self, prefix: str) -> list[str]:
        """Return the keys that begin with `prefix`, sorted; unfinished files never appear.

        Nor do names that no object can have (unprintable, with a backslash): such a file is not the store's.

        Raises:
            StoreError: a part of the list cannot be read; never a list that is too short.
        """
        _check_prefix(prefix)
        with self._explained("list", prefix or "."):
            return sorted(key for key in self._backend.list(prefix) if _is_plain(key))

    def details(self, prefix: str) -> builtins.list[ObjectInfo]:
        """Return the objects whose keys begin with `prefix`, sorted, with size and age."""
        _check_prefix(prefix)
        with self._explained("list", prefix or "."):
            return sorted(filter(_is_own, self._backend.details(prefix)), key=lambda item: item.key)

    def unfinished(self) -> builtins.list[ObjectInfo]:
        """Return the files that a writer left behind half-way, or is still at; a bucket has none."""
        with self._explained("list", TEMPORARY_FOLDER):
            return sorted(filter(_is_own, self._backend.unfinished()), key=lambda item: item.key)

    def delete_any(self, key: str) -> None:
        """Remove an object, or an unfinished file, if it is there."""
        check_relative_path(key)
        with self._explained("delete", key):
            self._backend.delete(key)

    def delete(self, key: str) -> None:
        """Remove an object if it is there."""
        _check_key(key)
        with self._explained("delete", key):
            self._backend.delete(key)

    def delete_prefix(self, prefix: str) -> None:
        """Remove every object whose key begins with `prefix`, which must not be empty."""
        if not prefix:
            raise ValueError("delete_prefix('') would remove the whole store; name what to remove")
        self.map(self.delete, self.list(prefix))

    def move(self, key: str, new_key: str) -> None:
        """Give an object another key; ObjectMissing when it is not there."""
        _check_key(key)
        _check_key(new_key)
        with self._explained("move", key):
            self._backend.move(key, new_key)

    def local_path(self, key: str) -> Path | None:
        """Return an object's own local file, None for a bucket."""
        _check_key(key)
        return self._backend.local_path(key)

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> builtins.list[_Result]:
        """Apply `function` to each item, in threads where each call waits for a network; results in order."""
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
                f"cannot {verb} {key!r} in the store {self.uri}: {one_line(error)}; "
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
