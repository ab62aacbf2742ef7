"""Files outside the store, local or on S3: found, read, and known by their content.

An input counts by its bytes, never by where it lies. Reading terabytes at every look-up would be no way to find that
out, so the sha256 of a file is remembered beside what its file system says of it (size and time of change, or the ETag
of an object); a file whose stamp is the same is not read again, as git does with its index.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from storage.cache import default_cache_dir
from storage.digests import CHUNK_BYTES, digest_of

_MAGIC = "*?["
_FRESH_SECONDS = 2.0
"""A file that changed so recently may change again within the clock's resolution: its digest is not remembered."""
_READ_TOGETHER = 16
_BATCH = 256
"""Files whose bytes are held at a time."""


class InputFiles:
    """One file, the files of a folder, or those that a pattern such as `s3://bucket/train-*.tar` matches.

    Args:
        path: local or with a protocol.
        what: how messages name it, for example `download.files.path`.

    Raises:
        ValueError: the protocol is unknown or its package is missing.
    """

    def __init__(self, path: str, what: str) -> None:
        self._what, self._path = what, path
        try:
            self._fs, root = url_to_fs(path)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{what}={path!r} cannot be opened: {error}; give a local path or s3://...") from error
        self._root = root.rstrip("/")
        self._listed: dict[str, str | None] | None = None
        self._base: str | None = None

    def names(self) -> list[str]:
        """Paths of the files below the folder (or the fixed part of the pattern), sorted.

        Raises:
            ValueError: there are none.
        """
        return sorted(self._stamps())

    def __contains__(self, name: str) -> bool:
        return name in self._stamps()

    def open(self, name: str) -> Any:
        """A binary, seekable file."""
        return self._fs.open(self._full(name), "rb")

    def read(self, name: str, max_bytes: int = -1) -> bytes:
        """The bytes of one file, or the first `max_bytes` of them.

        Raises:
            OSError: it cannot be read.
        """
        with self.open(name) as file:
            return bytes(file.read(max_bytes))

    def read_all(self, names: Sequence[str]) -> Iterator[bytes]:
        """The bytes of small files in this order; object stores are asked for many at a time."""
        # not fsspec's `cat`, which takes a name with a bracket for a pattern
        with ThreadPoolExecutor(_READ_TOGETHER) as pool:
            for start in range(0, len(names), _BATCH):
                yield from pool.map(self.read, names[start : start + _BATCH])

    def digest(self, names: Sequence[str] | None = None) -> str:
        """One digest of names and contents of these files (default: all); a file that is not there counts as absent.

        Raises:
            OSError: a file cannot be read.
        """
        stamps = self._stamps()
        with _remembered() as memory:
            return digest_of(
                [[name, self._sha256(name, stamps[name], memory) if name in stamps else None] for name in
                 (self.names() if names is None else names)]
            )  # fmt: skip

    def _sha256(self, name: str, stamp: str | None, memory: sqlite3.Connection) -> str:
        path = f"{self._fs.unstrip_protocol(self._full(name))}"
        found = memory.execute("SELECT sha256 FROM digests WHERE path = ? AND stamp = ?", (path, stamp)).fetchone()
        if found is not None:
            return str(found[0])
        sha256 = hashlib.sha256()
        with self.open(name) as file:
            while chunk := file.read(CHUNK_BYTES):
                sha256.update(chunk)
        digest = sha256.hexdigest()
        if stamp is not None:
            memory.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", (path, stamp, digest))
        return digest

    def _full(self, name: str) -> str:
        return f"{self._folder()}/{name}"

    def _folder(self) -> str:
        if self._base is None:
            parts = self._root.split("/")
            magic = next((index for index, part in enumerate(parts) if set(part) & set(_MAGIC)), None)
            if magic is not None:
                self._base = "/".join(parts[:magic])
            else:
                self._base = self._root if self._fs.isdir(self._root) else "/".join(parts[:-1])
        return self._base

    def _stamps(self) -> dict[str, str | None]:
        """Stamp of every file by name; None where the file system says nothing by which to know a change."""
        if self._listed is None:
            self._fs.invalidate_cache()  # listings of S3 are remembered for the life of the process
            try:
                folder, found = self._folder(), self._find()
            except OSError as error:
                raise ValueError(f"{self._what}={self._path!r} cannot be listed: {error}; check the path") from error
            if not found:
                raise ValueError(
                    f"{self._what}={self._path!r} matches no file; give a file, a folder or a pattern such as "
                    f"'data/*.tar', local or s3://"
                )
            self._listed = {path[len(folder) + 1 :]: _stamp(info) for path, info in found.items()}
        return self._listed

    def _find(self) -> dict[str, dict[str, Any]]:
        if set(self._root) & set(_MAGIC):
            found = self._fs.glob(self._root, detail=True)
        elif self._folder() == self._root:
            found = self._fs.find(self._root, detail=True)
        else:
            found = {self._root: self._fs.info(self._root)} if self._fs.exists(self._root) else {}
        found = {path: self._followed(path, info) for path, info in found.items()}
        return {path: info for path, info in found.items() if info["type"] == "file"}

    def _followed(self, path: str, info: dict[str, Any]) -> dict[str, Any]:
        """What a symbolic link leads to: a listing describes the link, a question by name its target."""
        if not info.get("islink"):
            return info
        target: dict[str, Any] = self._fs.info(path)
        if target["type"] == "directory":
            raise ValueError(
                f"{self._what}={self._path!r} holds the link {path} to a folder, which is not followed; name that "
                "folder, or put its files there"
            )
        if target["type"] != "file":
            raise ValueError(f"{self._what}={self._path!r} holds the link {path}, which leads to no file; mend it")
        return target


def read_input(path: str, what: str, expected: str) -> bytes:
    """The bytes of one file outside the store.

    Raises:
        ValueError: it cannot be read; the message says `what` and what was `expected`.
    """
    try:
        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"cannot read {what}={path!r}: {error}; give {expected}") from error


def _stamp(info: dict[str, Any]) -> str | None:
    if info.get("ETag"):
        return f"{info['size']} {info['ETag']}"
    if "mtime" in info and time.time() - float(info["mtime"]) > _FRESH_SECONDS:
        return f"{info['size']} {info['mtime']!r} {info.get('ino')}"
    return None


@contextmanager
def _remembered() -> Iterator[sqlite3.Connection]:
    """The digests that were worked out before, in the user's cache folder; removing the file costs only time."""
    path = Path(default_cache_dir()) / "input-digests.sqlite"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        memory = sqlite3.connect(path, timeout=60, isolation_level=None)
        try:
            memory.execute(
                "CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, stamp TEXT, sha256 TEXT NOT NULL)"
            )
            yield memory
        finally:
            memory.close()
    except sqlite3.Error as error:
        raise ValueError(f"cannot use {path}: {error}; remove it, or set MUSEVL_CACHE to another folder") from error
