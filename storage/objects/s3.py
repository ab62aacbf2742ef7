"""Objects in an S3 bucket, through s3fs. Credentials and endpoint come from the standard AWS variables and files."""

import io
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec

from storage.errors import StoreError
from storage.objects.info import ObjectInfo
from storage.objects.s3_retries import QUICK_ATTEMPTS, described, s3_error, steadily

_READ_BYTES = 8 << 20
_WRITER = "musevl-writer"
"""Metadata key of a created object: the identifier of the call that created it."""
_DEFAULT_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 30,
        "retries": {"total_max_attempts": 1, "mode": "standard"},  # `steadily` retries
    },
}

_Result = TypeVar("_Result")


class S3Backend:
    """Backend whose keys are under one prefix of a bucket. S3 guarantees that puts are atomic."""

    is_remote = True

    def __init__(self, bucket: str, prefix: str, options: dict[str, Any]) -> None:
        self._bucket = bucket
        self._base = f"{bucket}/{prefix}".rstrip("/")
        self._options = _DEFAULT_OPTIONS | options
        self._filesystem: Any = None
        self._filesystem_pid = -1

    @property
    def endpoint(self) -> str:
        """The endpoint in use, for messages."""
        named = self._options.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL_S3")
        return named or os.environ.get("AWS_ENDPOINT_URL") or "the default AWS endpoint"

    def check_exists(self) -> None:
        """Raise StoreError unless the bucket answers and has an object under the prefix."""
        prefix = self._path("").removeprefix(f"{self._bucket}/")
        found = self._opened("list_objects_v2", Prefix=prefix, MaxKeys=1)
        if not found.get("KeyCount"):
            raise StoreError(
                f"there is no store in s3://{self._base} at {self.endpoint}: nothing is there; name another with "
                "--store or MUSEVL_STORE, or make one with `musevl run`"
            )

    def check_access(self) -> None:
        """Raise StoreError unless the bucket answers."""
        self._opened("head_bucket")

    def _opened(self, method: str, **arguments: Any) -> Any:
        """Call a method of the bucket for the first time, and explain a failure."""
        try:
            return self._steadily(
                "open", "", lambda: self._fs.call_s3(method, Bucket=self._bucket, **arguments), QUICK_ATTEMPTS
            )
        except Exception as error:
            raise StoreError(
                f"cannot open the store s3://{self._base} at {self.endpoint}: {described(error)}; {_remedy(error)}"
            ) from error

    def probe_conditional_create(self) -> None:
        """Raise StoreError unless the second of two create-only puts is refused."""
        key = f"probes/{uuid.uuid4().hex}"
        try:
            first = self.create(key, b"first")
            second = self.create(key, b"second")
            holds = first and not second and self.read(key) == b"first"
            self.delete(key)
        except Exception as error:
            with suppress(Exception):  # the first error is reported
                self.delete(key)
            if isinstance(error, PermissionError):
                raise not_writable(f"s3://{self._base}", error) from error
            raise StoreError(
                f"create-only puts fail at {self.endpoint} (s3://{self._base}): {described(error)}; "
                "allow writing and deleting there, or use an S3 service with If-None-Match"
            ) from error
        if not holds:
            raise StoreError(
                f"{self.endpoint} (s3://{self._base}) overwrites in spite of If-None-Match, so two writers could lose "
                "results; use an S3 service with conditional writes, or a local store"
            )

    def create(self, key: str, data: bytes) -> bool:
        """Create the object; return False if it exists already.

        A put whose answer is lost may have succeeded, and its retry then finds the object. Therefore each call writes a
        unique identifier into the object's metadata, by which it recognises its own object.
        """
        writer = uuid.uuid4().hex

        def put() -> bool:
            try:
                self._fs.pipe_file(self._path(key), data, mode="create", Metadata={_WRITER: writer})
                return True
            except FileExistsError:
                return False
            except OSError as error:
                code, status = s3_error(error)
                if code == "PreconditionFailed" or status == 412:
                    return False
                if status == 409:  # another conditional put is in progress: retry later to see which one succeeded
                    raise ConnectionError(described(error)) from error
                raise

        return self._steadily("create", key, put) or self._writer_of(key) == writer

    def put(self, key: str, data: bytes) -> None:
        """Create or replace the object."""
        self._steadily("put", key, lambda: self._fs.pipe_file(self._path(key), data))

    def put_file(self, key: str, local_path: Path, sha256: str | None) -> None:
        """Create or replace the object with the content of a file; the caller checks that the file did not change."""

        def put() -> None:
            try:
                self._fs.put_file(str(local_path), self._path(key))
            except FileNotFoundError as error:
                # The answer that completes a multipart upload was lost, and s3fs aborted the completed upload
                if s3_error(error)[0] == "NoSuchUpload":
                    raise ConnectionError(described(error)) from error
                raise

        self._steadily("put", key, put)

    def get_file(self, key: str, local_path: Path) -> None:
        """Copy the object to a local file."""
        self._steadily("get", key, lambda: self._fs.get_file(self._path(key), str(local_path)))

    def read(self, key: str) -> bytes:
        """Return the object's bytes; raise FileNotFoundError if it is missing."""
        return self._steadily("get", key, lambda: cast(bytes, self._fs.cat_file(self._path(key))))

    def open(self, key: str) -> BinaryIO:
        """Open the object for reading; raise FileNotFoundError if it is missing."""
        size = self.size(key)
        if size is None:
            raise FileNotFoundError(key)
        return cast(BinaryIO, io.BufferedReader(_RangeReader(self, key, size), _READ_BYTES))

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Return the object's bytes from `start` (inclusive) to `end` (exclusive)."""
        return self._steadily("get", key, lambda: cast(bytes, self._fs.cat_file(self._path(key), start=start, end=end)))

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, or None if it is missing."""
        try:
            info = self._steadily("head", key, lambda: self._fs.info(self._path(key), refresh=True))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def touch(self, key: str) -> bool:
        """Set the object's modification time to now by copying it onto itself; return False if it is missing."""
        path = self._path(key)
        try:
            # S3 refuses a copy that changes nothing; "REPLACE" makes it change the metadata.
            self._steadily("copy", key, lambda: self._fs.cp_file(path, path, MetadataDirective="REPLACE"))
        except FileNotFoundError:
            return False
        return True

    def modified(self, key: str) -> float | None:
        """Return the object's modification time in seconds since the epoch, or None if it is missing."""
        try:
            info = self._steadily("head", key, lambda: self._fs.info(self._path(key), refresh=True))
        except FileNotFoundError:
            return None
        return float(info["LastModified"].timestamp()) if info["type"] == "file" else None

    def list(self, prefix: str) -> list[str]:
        """Return the keys that begin with `prefix`, in any order."""
        return [item.key for item in self.details(prefix)]

    def details(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose keys begin with `prefix`, in any order."""
        found = self._steadily("list", prefix, lambda: self._fs.find(self._base, prefix=prefix, detail=True))
        for path, info in found.items():
            if info["type"] == "file":
                yield ObjectInfo(path[len(self._base) + 1 :], int(info["size"]), info["LastModified"].timestamp())

    def unfinished(self) -> Iterator[ObjectInfo]:
        """Yield nothing, since a bucket shows only complete objects."""
        return iter(())

    def delete(self, key: str) -> None:
        """Remove the object if it exists."""
        self._steadily("delete", key, lambda: self._fs.rm_file(self._path(key)))

    def move(self, key: str, new_key: str) -> None:
        """Rename the object."""
        self._steadily("copy", key, lambda: self._fs.cp_file(self._path(key), self._path(new_key)))
        self.delete(key)

    def local_path(self, key: str) -> Path | None:
        """Return None, since objects in a bucket are not local files."""
        return None

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}"

    def _writer_of(self, key: str) -> str | None:
        """Return the identifier of the `create` call that made the object, or None if there is none."""
        key_in_bucket = self._path(key).removeprefix(f"{self._bucket}/")
        try:
            head = self._steadily(
                "head", key, lambda: self._fs.call_s3("head_object", Bucket=self._bucket, Key=key_in_bucket)
            )
        except FileNotFoundError:
            return None
        found: str | None = head.get("Metadata", {}).get(_WRITER)
        return found

    def _steadily(self, verb: str, key: str, call: Callable[[], _Result], attempts: int | None = None) -> _Result:
        return steadily(f"{verb} {self._path(key)}", call, attempts=attempts)

    @property
    def _fs(self) -> Any:
        # A forked child must not use its parent's connections.
        if self._filesystem_pid != os.getpid():
            self._filesystem = fsspec.filesystem("s3", **self._options)
            self._filesystem.retries = 1  # `steadily` retries
            self._filesystem_pid = os.getpid()
        return self._filesystem


class _RangeReader(io.RawIOBase):
    """Reads an object by range requests, with retries of each."""

    def __init__(self, backend: S3Backend, key: str, size: int) -> None:
        self._backend, self._key, self._size, self._position = backend, key, size, 0

    def readable(self) -> bool:
        return True

    def readall(self) -> bytes:
        """Read the rest in one request; the inherited method would request 8 KiB at a time."""
        data = self._backend.read_range(self._key, self._position, self._size) if self._position < self._size else b""
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        data = self._backend.read_range(self._key, self._position, end) if end > self._position else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def not_writable(uri: str, error: PermissionError) -> StoreError:
    """Return the error for credentials that may not write to a bucket."""
    return StoreError(
        f"cannot write to the store {uri}: {described(error)}; use credentials that may write and delete there (what "
        "only reads, such as `musevl artifacts ls`, works with these)"
    )


def _remedy(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "create the bucket or correct its name"
    if isinstance(error, PermissionError) or "credential" in str(error).lower():
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile) that may read and write the bucket"
    return "check AWS_ENDPOINT_URL and the network"
