"""Cache of the images that a list names, so that a look-up of the action key does not parse the list again.

The names are stored in the user's cache folder under the list's digest, which `InputFiles` knows from a listing.
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
    """Return the paths, within the image folder, of the images that a list names; parse the list if it is not cached.

    Args:
        files: the input files that hold the list.
        names: the names of the list's files.
        how: what else determines the images, besides names and bytes: the layout, a column.
        read: parses the list and returns the paths.

    Raises:
        ValueError: raised by `read`.
    """
    digest = files.digest(names)
    file = Path(default_cache_dir()) / "lists" / f"{digest_of([digest, *how])}.json"
    if (remembered := _remembered(file)) is not None:
        return remembered
    images = read()
    if files.again().digest(names) == digest:  # otherwise the list changed while it was read
        with atomic_path(file) as private:
            private.write_bytes(record_bytes({"images": images}))
    return images


def _remembered(file: Path) -> list[str] | None:
    try:
        return list(parse_record(file.read_bytes())["images"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        # Not cached, or damaged according to its checksum: the list is parsed again
        return None
