"""WebDataset tars: members KEY.jpg, KEY.txt, KEY.json ... of one sample follow each other."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from models.config import Config
from stages.sources.images import is_image_name
from stages.sources.source import (
    NO_CAPTION,
    PLACE,
    URL,
    Failure,
    Fetched,
    Row,
    check_columns,
    no_place,
    place,
    placed,
)
from stages.sources.text import decode, load_json, strings
from stages.stage import RuntimeStr
from storage.image_shards import sample_members
from storage.input_files import InputFiles

_WHAT = "download.files.path"


class WebDatasetFiles(Config):
    """Tars in the WebDataset layout."""

    kind: Literal["webdataset"]
    """Which layout the files have."""
    path: RuntimeStr
    """A tar, a folder of tars or a pattern such as `s3://bucket/train-*.tar`; names and contents count, not the place.
    Columns are the fields of a sample's .json; its .txt is the caption unless the .json has one."""


class WebDataset:
    """The samples of WebDataset tars, in the order of their names.

    Args:
        config: where they are.
        caption_column: name of the caption's column.
        max_bytes: of an image; of larger ones no more is read.
    """

    def __init__(self, config: WebDatasetFiles, caption_column: str, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.what = f"WebDataset {config.path}"
        self._files = InputFiles(config.path, _WHAT)
        self._caption_column = caption_column

    def content(self) -> dict[str, str]:
        return {"files": self._files.digest(self._tars())}

    def rows(self, columns: Sequence[str]) -> pa.Table:
        urls: list[str] = []
        places: list[str] = []
        kept: dict[str, list[Any]] = {name: [] for name in columns}
        seen: dict[str, None] = {}
        problem = ""
        for name in self._tars():
            for sample in self._samples(name):
                seen |= dict.fromkeys(sample.fields)
                problem = problem or sample.problem
                for wanted, values in kept.items():
                    values.append(sample.fields.get(wanted))
                urls.append(f"{name}/{sample.image or sample.key}")
                places.append(sample.place(name))
        if problem and not seen:
            raise ValueError(f"{self.what} has no .json that can be read: {problem}; write one object a sample")
        if urls:
            check_columns(self.what, columns, list(seen))
        return pa.table(
            {name: strings(values) for name, values in kept.items()} | {URL: strings(urls), PLACE: strings(places)}
        )

    def fetch(self, rows: list[Row], scratch: Path) -> Iterator[tuple[int, Fetched]]:
        wanted: dict[str, list[tuple[int, int, int]]] = {}
        for position, found in placed(rows, "the sample"):
            if isinstance(found, Failure):
                yield position, found
            else:
                tar, offset, size = found
                wanted.setdefault(tar, []).append((position, offset, size))
        for tar, members in wanted.items():
            with self._files.open(tar) as file:
                for position, offset, size in members:
                    file.seek(offset)
                    yield position, bytes(file.read(min(size, self._max_bytes + 1)))

    def _tars(self) -> list[str]:
        names = self._files.names()
        tars = [name for name in names if name.endswith(".tar")]
        if not tars:
            raise ValueError(f"{self.what} holds no .tar, but {names[0]!r}; unpack compressed tars, or mend the path")
        return tars

    def _samples(self, name: str) -> Iterator[_Sample]:
        """The samples of one tar, without the images' bytes."""
        sample = None
        try:
            with self._files.open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for key, extension, member in sample_members(tar):
                    if sample is None or key != sample.key:
                        if sample is not None:
                            yield sample
                        sample = _Sample(key)
                    self._add(sample, name, member, extension.lower(), tar)
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"{self.what}: {name} is not readable as tar: {error}; make or fetch it again") from error
        if sample is not None:
            yield sample

    def _add(self, sample: _Sample, name: str, member: tarfile.TarInfo, extension: str, tar: tarfile.TarFile) -> None:
        if is_image_name(extension):
            if not sample.image:  # of several images the first one is the sample's
                sample.image, sample.offset, sample.size = member.name, member.offset_data, member.size
            return
        if extension not in ("txt", "json"):
            return
        reader = tar.extractfile(member)
        assert reader is not None, "regular members have data"
        data = reader.read()
        if len(data) != member.size:
            raise tarfile.ReadError(f"{member.name} ends early")
        if extension == "txt":
            sample.fields.setdefault(self._caption_column, decode(data))
            return
        try:
            value = load_json(data)
        except ValueError as error:
            sample.problem = f"{name}: {member.name} is not JSON: {error}"
            return
        if isinstance(value, dict):
            sample.fields |= value
        else:
            sample.problem = f"{name}: {member.name} is no JSON object, but {str(value)[:40]!r}"


@dataclass
class _Sample:
    """What the members of one key say."""

    key: str
    image: str = ""
    """Name of its member; '' where there is none."""
    offset: int = 0
    """Of the image's bytes in the tar."""
    size: int = 0
    """Of the image, bytes."""
    fields: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    """What is wrong with the .json: the caption, and what is held out, may stand there, so the row cannot be used."""

    def place(self, tar: str) -> str:
        """Its `PLACE`."""
        if not self.image:
            return ""
        if self.problem:
            return no_place(NO_CAPTION, "the .json beside the image is no JSON object")
        return place(tar, self.offset, self.size)
