"""Input files outside the store, local or on S3, and the digests of their content.

An input is identified by its bytes, never by its path. Since reading terabytes at every cache look-up would take too
long, the sha256 of a file is remembered with a stamp of its file system (size and modification time, or the ETag of an
object); a file whose stamp is unchanged is not read again, as in the index of git.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import re
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.utils import glob_translate

from storage.cache import default_cache_dir
from storage.digests import CHUNK_BYTES, digest_of

_MAGIC = "*?["
_FRESH_SECONDS = 2.0
"""The digest of a file that changed so recently is not remembered: it may change again without a new stamp."""
_CLUTTER = ("thumbs.db", "ehthumbs.db", "desktop.ini")
_READ_TOGETHER = 16
_BATCH = 256
"""Number of files whose bytes are held in memory at a time."""


class InputFiles:
    """One file, the files of a folder, or those that a pattern such as `s3://bucket/train-*.tar` matches.

    A path that exists is taken literally, and so is each existing folder at the start of a pattern: `[`, `*` and `?`
    form a pattern only if nothing of that name exists.

    Args:
        path: a local path, or a URL with a protocol.
        what: name of the input in messages, for example `download.files.path`.

    Raises:
        ValueError: the protocol is unknown or its package is missing.
    """

    def __init__(self, path: str, what: str) -> None:
        self._what, self._path = what, path
        try:
            # fsspec would read `a::b` as a chain of protocols
            local = "::" in path and "://" not in path
            self._fs, root = (fsspec.filesystem("file"), _absolute(path)) if local else url_to_fs(path)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{what}={path!r} cannot be opened: {error}; give a local path or s3://...") from error
        self._root = root.rstrip("/") or root
        self._listed: dict[str, str | None] | None = None
        self._found: _Found | None = None

    def again(self) -> InputFiles:
        """Return a new object for the same path, which lists the files again."""
        return InputFiles(self._path, self._what)

    @property
    def folder(self) -> str:
        """The folder that names are relative to: without a protocol, and absolute if it is local."""
        return self._locate().folder

    def names(self) -> list[str]:
        """Return the sorted paths of the files, relative to the folder (or to the fixed part of the pattern).

        Raises:
            ValueError: there are no files.
        """
        return sorted(self._stamps())

    def one(self, expected: str) -> str:
        """Return the name of the only file.

        Raises:
            ValueError: there are several or none; the message says what was `expected`.
        """
        if (pattern := self._locate().pattern) and not set(pattern) & set(_MAGIC):
            raise ValueError(f"cannot read {self._what}={self._path!r}: there is no such file; give {expected}")
        if len(names := self.names()) != 1:
            raise ValueError(f"cannot read {self._what}={self._path!r}: it is {len(names)} files; give {expected}")
        return names[0]

    def __contains__(self, name: str) -> bool:
        return name in self._stamps()

    def open(self, name: str) -> Any:
        """Open a file as a binary, seekable stream."""
        return self._fs.open(self._full(name), "rb")

    def read(self, name: str, max_bytes: int = -1) -> bytes:
        """Return the bytes of one file, or the first `max_bytes` of them.

        Raises:
            OSError: it cannot be read.
        """
        with self.open(name) as file:
            return bytes(file.read(max_bytes))

    def read_all(self, names: Sequence[str]) -> Iterator[bytes]:
        """Yield the bytes of small files in this order; many are read at a time, which matters for object stores."""
        # fsspec's `cat` would read a name with a bracket as a pattern
        with ThreadPoolExecutor(_READ_TOGETHER) as pool:
            for start in range(0, len(names), _BATCH):
                yield from pool.map(self.read, names[start : start + _BATCH])

    def digest(self, names: Sequence[str] | None = None) -> str:
        """Return one digest of the names and contents of these files (default: all); a missing file counts as None.

        Raises:
            OSError: a file cannot be read.
        """
        chosen = self.names() if names is None else names
        return digest_of([list(pair) for pair in zip(chosen, self.sha256s(chosen), strict=True)])

    def sha256s(self, names: Sequence[str]) -> list[str | None]:
        """Return the sha256 of each of these files; None for a file that does not exist.

        Raises:
            OSError: a file cannot be read.
        """
        stamps = self._stamps()
        with _remembered() as memory:
            return [self._sha256(name, stamps[name], memory) if name in stamps else None for name in names]

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
        return f"{self.folder}/{name}"

    def _locate(self) -> _Found:
        """Determine whether the path is a file, a folder or a pattern, by what exists."""
        if self._found is None:
            self._fs.invalidate_cache()  # fsspec otherwise keeps listings of S3 for the life of the process
            parts = self._root.split("/")
            if (kind := self._kind()) is not None:
                is_folder = kind == "directory"
                self._found = _Found(self._root if is_folder else "/".join(parts[:-1]), is_folder=is_folder)
            else:
                fixed = next((index for index, part in enumerate(parts) if set(part) & set(_MAGIC)), len(parts) - 1)
                while fixed < len(parts) - 1 and self._fs.isdir("/".join(parts[: fixed + 1])):
                    fixed += 1
                self._found = _Found("/".join(parts[:fixed]), pattern="/".join(parts[fixed:]))
        return self._found

    def _kind(self) -> str | None:
        """Return the type of the entry at the literal path, or None if there is none."""
        try:
            return str(self._fs.info(self._root)["type"])
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _stamps(self) -> dict[str, str | None]:
        """Return the stamp of every file by name; None if the file system gives nothing that shows a change."""
        if self._listed is None:
            try:
                folder, found = self.folder, self._find()
            except OSError as error:
                raise ValueError(f"{self._what}={self._path!r} cannot be listed: {error}; check the path") from error
            if not found:
                braces = "; write * in place of {0..9}" if "{" in self._path else ""
                raise ValueError(
                    f"{self._what}={self._path!r} matches no file; give a file, a folder or a pattern such as "
                    f"'data/part-*', local or s3://{braces}"
                )
            self._listed = {path[len(folder) + 1 :]: _stamp(info) for path, info in found.items()}
        return self._listed

    def _find(self) -> dict[str, dict[str, Any]]:
        at = self._locate()
        if not at.pattern and not at.is_folder:
            found = {self._root: self._fs.info(self._root)}
        elif at.pattern and not set(at.pattern) & set(_MAGIC):
            found = {}
        else:
            depth = None if "**" in at.pattern or not at.pattern else at.pattern.count("/") + 1
            found = self._fs.find(at.folder, maxdepth=depth, detail=True)
            if at.pattern:  # fsspec's `glob` would read brackets in the folder's name as a pattern too
                matches = re.compile(glob_translate(at.pattern)).match
                found = {path: info for path, info in found.items() if matches(path[len(at.folder) + 1 :])}
        found = {path: self._followed(path, info) for path, info in found.items() if not path.endswith("/")}
        return {path: info for path, info in found.items() if info["type"] == "file"}

    def _followed(self, path: str, info: dict[str, Any]) -> dict[str, Any]:
        """Return the entry of a link's target, since a listing describes the link itself."""
        if not info.get("islink"):
            return info
        target: dict[str, Any] = self._fs.info(path)
        if target["type"] == "directory":
            raise ValueError(
                f"{self._what}={self._path!r} holds the link {path} to a folder, which is not followed; name that "
                "folder, or put its files there"
            )
        if target["type"] != "file":
            raise ValueError(
                f"{self._what}={self._path!r} holds the link {path}, which leads to no file; repair or remove it"
            )
        return target


@dataclass(frozen=True)
class _Found:
    """The folder, and the pattern in it if any, that a path stands for."""

    folder: str
    """The folder that names are relative to."""
    is_folder: bool = False
    pattern: str = ""
    """Pattern of names within the folder; '' if the path itself exists."""


def read_input(path: str, what: str, expected: str) -> bytes:
    """Return the bytes of one file outside the store.

    Raises:
        ValueError: it cannot be read; the message says `what` and what was `expected`.
    """
    try:
        files = InputFiles(path, what)
        return files.read(files.one(expected))
    except OSError as error:
        raise ValueError(f"cannot read {what}={path!r}: {error}; give {expected}") from error


def is_clutter(name: str) -> bool:
    """Return whether a file was created by an operating system or a program rather than the user.

    Examples are `._NAME` and `__MACOSX/` of macOS, `.DS_Store`, `Thumbs.db`, and hidden files and folders.
    """
    parts = name.split("/")
    return any(part.startswith(".") or part == "__MACOSX" for part in parts) or parts[-1].lower() in _CLUTTER


def decompressed(file: Any) -> Any:
    """Return a binary file decompressed, by a compression that is recognised by its first bytes and not its name.

    Raises:
        ValueError: the kind of compression is not supported.
    """
    start = file.read(_LONGEST_MARK)
    file.seek(0)
    for mark, opener in _COMPRESSIONS.items():
        if start.startswith(mark):
            return opener(file)
    if start.startswith(b"PK\x03\x04"):
        raise ValueError("it is a ZIP; unpack it")
    return file


_COMPRESSIONS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(file, "zstd"),
}
_LONGEST_MARK = max(map(len, _COMPRESSIONS))
COMPRESSION_ERRORS = (EOFError, zlib.error, lzma.LZMAError)
"""Exceptions besides OSError that are raised while a damaged compressed file is read."""


def _absolute(path: str) -> str:
    return str(fsspec.filesystem("file")._strip_protocol(path))


def _stamp(info: dict[str, Any]) -> str | None:
    if info.get("ETag"):
        return f"{info.get('size')} {info['ETag']}"
    if "mtime" in info and time.time() - float(info["mtime"]) > _FRESH_SECONDS:
        return f"{info['size']} {info['mtime']!r} {info.get('ino')}"
    return None


@contextmanager
def _remembered() -> Iterator[sqlite3.Connection]:
    """Open the database of known digests in the user's cache folder; it can be removed at the cost of hashing again."""
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
