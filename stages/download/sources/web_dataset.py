"""Source of WebDataset tars, in which the members KEY.jpg, KEY.txt, KEY.json ... form one sample."""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from models.config import Config
from stages.download.sources.source import (
    NO_CAPTION,
    PLACE,
    URL,
    Failure,
    Fetched,
    Row,
    SourceOptions,
    find_columns,
    no_place,
    place,
    placed,
    say_left_out,
)
from stages.download.sources.tar_samples import TarReader, TarSample
from stages.download.sources.text import strings
from stages.protocol import RuntimeStr
from storage.input_files import COMPRESSION_ERRORS, InputFiles, decompressed, is_clutter

logger = logging.getLogger(__name__)

_WHAT = "download.files.path"
_SUFFIXES = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


class WebDatasetFiles(Config):
    """Tars in the WebDataset layout."""

    kind: Literal["webdataset"]
    """Selects this layout."""
    path: RuntimeStr
    """A tar, a folder of tars or a pattern such as `s3://bucket/train-*.tar`. Names and contents enter the digest, not
    the folder's path. Columns are the fields of the samples' .json; the caption is the .txt (or .text, .caption, .cap),
    unless the .json has one."""

    def open(self, options: SourceOptions) -> WebDataset:
        """Open the source of the tars' samples."""
        return WebDataset(self, options)


class WebDataset:
    """Source with the samples of WebDataset tars, in the order of the tars' names.

    Args:
        config: path of the tars.
        options: the caption column and the size limit of an image.
    """

    def __init__(self, config: WebDatasetFiles, options: SourceOptions) -> None:
        self._max_bytes, self._caption_column = options.max_bytes, options.caption_column
        self.what = f"WebDataset {config.path}"
        self._files = InputFiles(config.path, _WHAT)

    def content(self) -> dict[str, str]:
        return {"files": self._files.digest(self._tars())}

    def rows(self, columns: Sequence[str]) -> pa.Table:
        tars, reader = self._tars(), TarReader(list(dict.fromkeys([self._caption_column, *columns])))
        others = sorted(set(self._files.names()) - set(tars))
        say_left_out(logger, self.what, others, "files that are no tars")
        urls: list[str] = []
        places: list[str] = []
        kept: dict[str, list[Any]] = {name: [] for name in columns}
        said = False
        for tar in tars:
            samples, compressed = self._samples(tar, reader)
            for sample in samples:
                fields = (sample.fields or {}) | {self._caption_column: sample.caption(self._caption_column)}
                said = said or bool(sample.texts)
                for wanted, values in kept.items():
                    values.append(fields.get(wanted))
                urls.append(f"{tar}/{sample.image.name if sample.image else sample.stem}")
                places.append(_place_of(sample, tar, compressed))
        kind = "members that are neither an image nor its text"
        say_left_out(logger, self.what, reader.left_out, kind, reader.num_left_out)
        seen = dict.fromkeys([self._caption_column] if said else []) | reader.seen
        if reader.problem and not seen:
            raise ValueError(
                f"{self.what} has no .json that can be read: {reader.problem}; write one object per sample"
            )
        if urls:
            find_columns(self.what, columns, list(seen))
        return pa.table(
            {name: strings(values) for name, values in kept.items()} | {URL: strings(urls), PLACE: strings(places)}
        )

    def fetch(self, rows: list[Row], scratch: Path) -> Iterator[tuple[int, Fetched]]:
        wanted: dict[tuple[str, bool], list[tuple[int, int, int]]] = {}
        for position, found in placed(rows, "the sample"):
            if isinstance(found, Failure):
                yield position, found
            else:
                tar, compressed, offset, size = found
                wanted.setdefault((tar, compressed), []).append((offset, size, position))
        for (tar, compressed), members in wanted.items():
            with self._files.open(tar) as file:
                data = decompressed(file) if compressed else file
                for offset, size, position in sorted(members):  # a compressed tar is read from its start, once
                    data.seek(offset)
                    yield position, bytes(data.read(min(size, self._max_bytes + 1)))

    def _tars(self) -> list[str]:
        names = self._files.names()
        tars = [name for name in names if name.lower().endswith(_SUFFIXES) and not is_clutter(name)]
        if not tars:
            raise ValueError(f"{self.what} holds no .tar, but {names[0]!r}; correct the path")
        return tars

    def _samples(self, tar: str, reader: TarReader) -> tuple[list[TarSample], bool]:
        """Return the samples of one tar, without the images' bytes, and whether the tar is compressed."""
        try:
            with self._files.open(tar) as file:
                data = decompressed(file)
                if not data.seekable():
                    raise tarfile.ReadError("it is compressed with Zstandard: unpack it")
                return reader.samples(data, tar), data is not file
        except (tarfile.TarError, OSError, ValueError, *COMPRESSION_ERRORS) as error:
            raise ValueError(f"{self.what}: {tar} is not readable as tar: {error}; make or fetch it again") from error


def _place_of(sample: TarSample, tar: str, compressed: bool) -> str:
    if sample.image is None:
        return ""
    if sample.problem or not sample.has_text:
        return no_place(NO_CAPTION, sample.problem or "no text beside the image")
    return place(tar, compressed, sample.image.offset, sample.image.size)
