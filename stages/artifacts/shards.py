"""Names of the files that `download` and `tokenize` artifacts have for each shard."""

from __future__ import annotations

from pathlib import PurePosixPath

from storage.manifest import FileEntry, Manifest

IMAGES, METADATA, CODES, LEFT_OUT = "images", "metadata", "codes", "left_out"
"""Folders of an artifact with one file a shard."""


def images_file(shard: str) -> str:
    """Return the name of a shard's WebDataset tar."""
    return f"{IMAGES}/{shard}.tar"


def metadata_file(shard: str) -> str:
    """Return the name of the table with a row for every input of a shard."""
    return f"{METADATA}/{shard}.parquet"


def codes_file(shard: str) -> str:
    """Return the name of a shard's part of the code table."""
    return f"{CODES}/{shard}.parquet"


def left_out_file(shard: str) -> str:
    """Return the name of the table of a shard's images that have no codes."""
    return f"{LEFT_OUT}/{shard}.parquet"


def shard_of(entry: FileEntry) -> str:
    """Return the shard that a file belongs to."""
    return PurePosixPath(entry.path).stem


def shards_of(download: Manifest) -> list[str]:
    """Return the names of the shards of a `download` artifact, in order."""
    return [shard_of(entry) for entry in download.files_under(IMAGES)]
