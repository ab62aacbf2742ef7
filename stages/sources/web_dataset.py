"""WebDataset tars: members KEY.jpg, KEY.txt, KEY.json ... of one sample follow each other."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from models.config import Config
from stages.sources.images import is_image_name
from stages.sources.source import PLACE, URL, Failure, Fetched, Row, check_columns, place, placed, strings
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
        for name in self._tars():
            for key, sample in self._samples(name):
                seen |= dict.fromkeys(sample["fields"])
                for field, values in kept.items():
                    values.append(sample["fields"].get(field))
                urls.append(f"{name}/{sample['image'] or key}")
                places.append(place(name, *sample["at"]) if sample["image"] else "")
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

    def _samples(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Key and contents of each sample of one tar, without the image's bytes."""
        key, sample = "", self._empty()
        try:
            with self._files.open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for own_key, extension, member in sample_members(tar):
                    if key and own_key != key:
                        yield key, sample
                        sample = self._empty()
                    key = own_key
                    self._add(sample, member, extension.lower(), tar)
        except (tarfile.TarError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.what}: {name} is not readable as tar: {error}; make or fetch it again") from error
        if key:
            yield key, sample

    @staticmethod
    def _empty() -> dict[str, Any]:
        return {"image": "", "at": (0, 0), "fields": {}}

    def _add(self, sample: dict[str, Any], member: tarfile.TarInfo, extension: str, tar: tarfile.TarFile) -> None:
        if is_image_name(extension):
            if not sample["image"]:  # of several images the first one is the sample's
                sample["image"], sample["at"] = member.name, (member.offset_data, member.size)
            return
        if extension not in ("txt", "json"):
            return
        reader = tar.extractfile(member)
        assert reader is not None, "regular members have data"
        data = reader.read()
        if len(data) != member.size:
            raise tarfile.ReadError(f"{member.name} ends early")
        if extension == "txt":
            sample["fields"].setdefault(self._caption_column, data.decode("utf-8"))
            return
        value = json.loads(data)
        if not isinstance(value, dict):
            raise tarfile.ReadError(f"{member.name} is no JSON object")
        sample["fields"] |= value
