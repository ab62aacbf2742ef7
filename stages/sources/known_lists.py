"""What decides a list's identity, remembered, so that looking again reads no list: its sha256 and the images it names.

It stands in the user's cache folder under the list's digest, which `InputFiles` knows from a listing alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from storage.cache import default_cache_dir
from storage.digests import digest_of, sha256_bytes
from storage.files import atomic_path
from storage.input_files import InputFiles, read_input


@dataclass(frozen=True)
class KnownList:
    """What a look-up asks of a list."""

    sha256: str
    """Of its bytes: a list that was renamed is the same one."""
    images: list[str]
    """Paths within the image folder."""


def look_up_list(
    path: str, field: str, expected: str, how: Sequence[str], images: Callable[[bytes], list[str]]
) -> KnownList:
    """What is known of a list; it is read when nothing is.

    Args:
        path: local or s3://.
        field: the config's field that names it, for example `download.files.captions`.
        expected: what it could be, for messages.
        how: what decides, beside its name and bytes, which images are found in it: the layout, a column.
        images: finds them in the list's bytes.

    Raises:
        ValueError: the list cannot be read; or as `images` does.
    """
    digest = _digest(path, field, expected)
    file = Path(default_cache_dir()) / "lists" / f"{digest_of([digest, *how])}.json"
    if remembered := _remembered(file):
        return remembered
    data = read_input(path, field, expected)
    known = KnownList(sha256_bytes(data), images(data))
    if _digest(path, field, expected) == digest:  # else it changed under our hands, and the digest is of what it was
        with atomic_path(file) as private:
            private.write_text(json.dumps(asdict(known)), encoding="utf-8")
    return known


def _remembered(file: Path) -> KnownList | None:
    try:
        return KnownList(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # never seen, or damaged: reading the list mends both
        return None


def _digest(path: str, field: str, expected: str) -> str:
    """Of one file, by name and bytes."""
    files = InputFiles(path, field)
    if len(names := files.names()) != 1:
        raise ValueError(f"{field}={path!r} is {len(names)} files; give {expected}")
    return files.digest()
