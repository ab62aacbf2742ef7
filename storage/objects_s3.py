"""Objects in an S3 bucket, through s3fs. Credentials and endpoint come from the standard AWS variables and files."""

import os
import random
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from storage.errors import StoreError
from storage.object_info import ObjectInfo

_CONFLICT_ATTEMPTS = 8
_FIRST_BACKOFF_S = 0.05
_DEFAULT_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "config_kwargs": {"connect_timeout": 10, "retries": {"max_attempts": 3, "mode": "standard"}},
}


class S3Backend:
    """Keys lie under one prefix of one bucket; a put is visible whole or not at all, by S3's own promise."""

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

    def check_access(self) -> None:
        """Raise StoreError unless the bucket answers."""
        try:
            self._fs.call_s3("head_bucket", Bucket=self._bucket)
        except Exception as error:
            raise StoreError(
                f"cannot open the store s3://{self._base} at {self.endpoint}: {one_line(error)}; {_remedy(error)}"
            ) from error

    def probe_conditional_create(self) -> None:
        """Raise StoreError unless the second of two create-only puts is refused."""
        key = f"probes/{uuid.uuid4().hex}"
        try:
            first = self.create(key, b"first")
            second = self.create(key, b"second")
            holds = first and not second and self.read(key) == b"first"
        except Exception as error:
            raise StoreError(
                f"create-only puts fail at {self.endpoint} (s3://{self._base}): {one_line(error)}; "
                "allow writing there, or use an S3 service with If-None-Match"
            ) from error
        finally:
            self.delete(key)
        if not holds:
            raise StoreError(
                f"{self.endpoint} (s3://{self._base}) overwrites in spite of If-None-Match, so two writers could lose "
                "results; use an S3 service with conditional writes, or a local store"
            )

    def create(self, key: str, data: bytes) -> bool:
        """Create the object; False when it exists, be it by an earlier try of this very call."""
        for attempt in range(_CONFLICT_ATTEMPTS):
            try:
                self._fs.pipe_file(self._path(key), data, mode="create")
                return True
            except FileExistsError:
                return False
            except OSError as error:
                code, status = _s3_error(error)
                if code == "PreconditionFailed" or status == 412:
                    return False
                if status != 409 or attempt == _CONFLICT_ATTEMPTS - 1:
                    raise
            # 409: another conditional put is under way. Wait a little and ask again who won.
            time.sleep(_FIRST_BACKOFF_S * 2**attempt * (1 + random.random()))
        raise AssertionError("unreachable")

    def put(self, key: str, data: bytes) -> None:
        """Create or replace the object."""
        self._fs.pipe_file(self._path(key), data)

    def put_file(self, key: str, local_path: Path, sha256: str | None) -> None:
        """Create the object from a file, or replace it; the caller checks that the file held still."""
        self._fs.put_file(str(local_path), self._path(key))

    def get_file(self, key: str, local_path: Path) -> None:
        """Copy the object to a local file."""
        self._fs.get_file(self._path(key), str(local_path))

    def read(self, key: str) -> bytes:
        """Return the object's bytes; FileNotFoundError when it is missing."""
        return cast(bytes, self._fs.cat_file(self._path(key)))

    def open(self, key: str) -> BinaryIO:
        """Open the object for reading; FileNotFoundError when it is missing."""
        return cast(BinaryIO, self._fs.open(self._path(key), "rb", block_size=8 << 20))

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, None when it is missing."""
        try:
            info = self._fs.info(self._path(key), refresh=True)
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def touch(self, key: str) -> None:
        """Do nothing: an object of a bucket is as old as its last write."""

    def list(self, prefix: str) -> list[str]:
        """Return the keys that begin with `prefix`, in no order."""
        return [item.key for item in self.details(prefix)]

    def details(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose keys begin with `prefix`, in no order."""
        found = self._fs.find(self._base, prefix=prefix, detail=True)
        for path, info in found.items():
            if info["type"] == "file":
                yield ObjectInfo(path[len(self._base) + 1 :], int(info["size"]), info["LastModified"].timestamp())

    def unfinished(self) -> Iterator[ObjectInfo]:
        """Yield nothing: a bucket shows no object before it is complete."""
        return iter(())

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        self._fs.rm_file(self._path(key))

    def move(self, key: str, new_key: str) -> None:
        """Give the object another key."""
        self._fs.cp_file(self._path(key), self._path(new_key))
        self._fs.rm_file(self._path(key))

    def local_path(self, key: str) -> Path | None:
        """Return None: objects in a bucket are no local files."""
        return None

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}"

    @property
    def _fs(self) -> Any:
        # A forked child must not use its parent's connections.
        if self._filesystem_pid != os.getpid():
            self._filesystem = fsspec.filesystem("s3", **self._options)
            self._filesystem_pid = os.getpid()
        return self._filesystem


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, with its type where the message alone says little."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def is_transport_error(error: BaseException) -> bool:
    """Say whether an exception comes from the S3 client rather than from a mistake in the calling code."""
    return type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp")


def _s3_error(error: BaseException) -> tuple[str, int]:
    """Return S3's error code and the HTTP status behind an exception of s3fs ('' and 0 when there is none)."""
    response = getattr(error.__cause__, "response", None) or {}
    code = response.get("Error", {}).get("Code", "")
    return code, int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _remedy(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "create the bucket or correct its name"
    if isinstance(error, PermissionError) or "credential" in str(error).lower():
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile) that may read and write the bucket"
    return "check AWS_ENDPOINT_URL and the network"
