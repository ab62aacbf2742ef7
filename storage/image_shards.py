"""Image shards: deterministic tar files in the WebDataset layout (KEY.webp, KEY.txt, KEY.json)."""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.digests import canonical_json
from storage.files import atomic_path
from storage.manifest import check_relative_path

_TEXT_EXTENSION = "txt"
_JSON_EXTENSION = "json"


@dataclass(frozen=True)
class ImageSample:
    """One image with its caption and metadata."""

    key: str
    """Name of the sample: a relative POSIX path without dots (WebDataset cuts names at the first one) or white
    space."""
    image: bytes
    """The encoded image, as stored."""
    extension: str
    """File extension of the image in lower case without a dot: `webp`, `png`, `jpg`."""
    text: str
    """The caption; '' if there is none."""
    json: dict[str, Any]
    """Other metadata of the sample."""


def write_image_shard(path: str | Path, samples: Iterable[ImageSample]) -> int:
    """Write samples to one tar file in the given order, without times or owners, by an atomic rename.

    Returns:
        The number of samples written.

    Raises:
        ValueError: WebDataset would misread a key or an extension, or a key occurs twice.
    """
    seen: set[str] = set()
    with atomic_path(path) as private, tarfile.open(private, "w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            _check(sample, seen)
            seen.add(sample.key)
            _add(tar, f"{sample.key}.{sample.extension}", sample.image)
            _add(tar, f"{sample.key}.{_TEXT_EXTENSION}", sample.text.encode("utf-8"))
            _add(tar, f"{sample.key}.{_JSON_EXTENSION}", canonical_json(sample.json))
    return len(seen)


def read_image_shard(path: str | Path) -> Iterator[ImageSample]:
    """Yield the samples of a shard in order.

    Args:
        path: a tar whose members of one sample follow each other; text and json may be absent.

    Raises:
        ValueError: the file is not a complete tar, or a sample has no image or several.
    """
    key, members = "", dict[str, bytes]()
    _check_end(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for own_key, extension, member in _sample_members(tar):
                if members and own_key != key:
                    yield _sample(path, key, members)
                    members = {}
                key = own_key
                reader = tar.extractfile(member)
                assert reader is not None, "regular members have data"
                data = reader.read()
                if len(data) != member.size:
                    raise tarfile.ReadError(f"{member.name} ends early")
                members[extension] = data
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a complete tar file: {error}; make or fetch it again") from error
    if members:
        yield _sample(path, key, members)


def _sample_members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield the files of a shard in order: key of the sample, extension without a dot, member."""
    for member in tar:
        folder, slash, name = member.name.rpartition("/")
        if member.isfile() and not name.startswith("."):  # macOS adds a `._NAME` for each file
            stem, _, extension = name.partition(".")
            yield folder + slash + stem, extension, member


def _sample(path: str | Path, key: str, members: dict[str, bytes]) -> ImageSample:
    images = [extension for extension in members if extension not in (_TEXT_EXTENSION, _JSON_EXTENSION)]
    if len(images) != 1:
        raise ValueError(f"{path}: sample {key!r} has the members {sorted(members)}; it needs exactly one image")
    return ImageSample(
        key=key,
        image=members[images[0]],
        extension=images[0],
        text=members.get(_TEXT_EXTENSION, b"").decode("utf-8"),
        json=json.loads(members.get(_JSON_EXTENSION, b"{}")),
    )


def _check_end(path: str | Path) -> None:
    # tarfile does not notice truncation between two members, but a complete tar ends with two zero blocks.
    data_end = 2 * tarfile.BLOCKSIZE
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, io.SEEK_END) - data_end))
        if file.read() != bytes(data_end):
            raise ValueError(f"{path} is not a complete tar file: its end is missing; make or fetch it again")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # A new TarInfo has time 0, owner 0 and mode 0o644, which do not depend on the machine.
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _check(sample: ImageSample, seen: set[str]) -> None:
    check_relative_path(sample.key)
    if "." in sample.key or any(character.isspace() for character in sample.key):
        raise ValueError(
            f"sample key {sample.key!r} has a dot or white space, which WebDataset misreads; replace it by '_'"
        )
    if sample.key in seen:
        raise ValueError(f"sample key {sample.key!r} occurs twice in one shard; give each sample its own key")
    extension = sample.extension
    if not extension.isascii() or not extension.isalnum() or extension != extension.lower():
        raise ValueError(f"sample {sample.key!r}: extension {extension!r} is not one; write it like 'webp'")
    if extension in (_TEXT_EXTENSION, _JSON_EXTENSION):
        raise ValueError(
            f"sample {sample.key!r}: {extension!r} is kept for the caption or the facts; name the image's format"
        )
