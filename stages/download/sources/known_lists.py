"""The images that a list names, remembered, so that a look-up reads no list again.

They stand in the user's cache folder under the list's digest, which `InputFiles` knows from a listing alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from storage.cache import default_cache_dir
from storage.digests import digest_of
from storage.files import atomic_path
from storage.input_files import InputFiles
from storage.records import parse_record, record_bytes


def images_named(
    files: InputFiles, names: Sequence[str], how: Sequence[str], read: Callable[[], list[str]]
) -> list[str]:
    """Paths, within the image folder, of the images that a list names; it is read when that is not known.

    Args:
        files: hold the list.
        names: of its files.
        how: what decides, beside names and bytes, which images are found in it: the layout, a column.
        read: reads them from the list.

    Raises:
        ValueError: as `read` does.
    """
    digest = files.digest(names)
    file = Path(default_cache_dir()) / "lists" / f"{digest_of([digest, *how])}.json"
    if (remembered := _remembered(file)) is not None:
        return remembered
    images = read()
    if files.again().digest(names) == digest:  # else it changed under our hands, and the digest is of what it was
        with atomic_path(file) as private:
            private.write_bytes(record_bytes({"images": images}))
    return images


def _remembered(file: Path) -> list[str] | None:
    try:
        return list(parse_record(file.read_bytes())["images"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        # Never seen, or damaged, which its checksum shows: reading the list mends both
        return None
