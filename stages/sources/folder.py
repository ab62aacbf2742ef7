"""A folder of images with captions in a list, or each in a .txt beside its image."""

from __future__ import annotations

import errno
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

import pyarrow as pa

from models.config import Config
from stages.sources.images import is_image_name
from stages.sources.known_lists import look_up_list
from stages.sources.lists import EXPECTED, TextTable, parse_list, read_list
from stages.sources.source import (
    MISSING,
    NO_CAPTION,
    PLACE,
    REFUSED,
    URL,
    Failure,
    Fetched,
    Row,
    check_columns,
    no_place,
    place,
    placed,
)
from stages.sources.text import clean, decode, strings
from stages.stage import RuntimeStr
from storage.input_files import InputFiles

_LIST = "download.files.captions"
_NO_SUCH_NAME = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


class FolderFiles(Config):
    """A folder of images."""

    kind: Literal["folder"]
    """Which layout the files have."""
    path: RuntimeStr
    """The folder, local or s3://; names and contents of its images count, not the place."""
    captions: RuntimeStr = ""
    """A CSV, TSV, JSONL or Parquet file with a row for each image; '' where each image has a .txt beside it."""
    file_column: str = "file_name"
    """Column of `captions` with the image's path within the folder."""


class ImageFolder:
    """The images of a folder: in the order of the list, or of their names.

    Args:
        config: where they are.
        caption_column: name of the caption's column.
        max_bytes: of an image; of larger ones no more is read.
    """

    def __init__(self, config: FolderFiles, caption_column: str, max_bytes: int) -> None:
        self.what = f"list {config.captions}" if config.captions else f"folder {config.path}"
        self._config, self._caption_column = config, caption_column
        self._images = FolderImages(config.path, "download.files.path", max_bytes)

    def content(self) -> dict[str, str]:
        captions = self._config.captions
        if not captions:
            return {"files": self._images.files.digest(self._paired_names())}
        known = look_up_list(captions, _LIST, EXPECTED, ["folder", self._config.file_column], self._names_in)
        return {"captions": known.sha256, "files": self._images.digest(known.images)}

    def rows(self, columns: Sequence[str]) -> pa.Table:
        if not self._config.captions:
            check_columns(self.what, columns, [self._caption_column])
            return self._paired_rows()
        table = read_list(self._config.captions, "list", _LIST)
        names = self._file_names(table)
        check_columns(self.what, columns, table.column_names)
        places = [place(name) if name else "" for name in names]
        return pa.table({name: table[name] for name in columns} | {URL: strings(names), PLACE: strings(places)})

    def fetch(self, rows: list[Row], scratch: Path) -> Iterator[tuple[int, Fetched]]:
        for position, found in placed(rows, "the row"):
            if isinstance(found, Failure):
                yield position, found
            else:
                yield position, self._images.read(found[0])

    def _names_in(self, data: bytes) -> list[str]:
        return self._file_names(parse_list(data, self._config.captions, "list"))

    def _file_names(self, table: TextTable) -> list[str]:
        if self._config.file_column not in table.column_names:
            raise ValueError(
                f"{self.what} has no column {self._config.file_column!r}; it has {', '.join(table.column_names)}: set "
                f"download.files.file_column to the one with the images' paths"
            )
        names: list[str] = table[self._config.file_column].to_pylist()
        return names

    def _paired_rows(self) -> pa.Table:
        files = self._images.files
        images = [name for name in files.names() if is_image_name(name)]
        texts = {name: text for name in images if (text := _text_name(name)) in files}
        if not texts:
            found = f"{len(images)} images and no .txt beside them" if images else "no images"
            raise ValueError(
                f"{self.what} holds {found}; put KEY.txt beside KEY.jpg, or set {_LIST} to a list of captions"
            )
        read = dict(zip(texts, files.read_all(list(texts.values())), strict=True))
        captions = [decode(read.get(name, b"")).strip() for name in images]
        places = [_place_of(name, name in texts) for name in images]
        columns = {URL: images, PLACE: places, self._caption_column: captions}
        return pa.table({name: strings(values) for name, values in columns.items()})

    def _paired_names(self) -> list[str]:
        files = self._images.files
        images = [name for name in files.names() if is_image_name(name)]
        return [clean(each) for name in images for each in (name, _text_name(name))]


class FolderImages:
    """Images that a list names by their path within a folder.

    Args:
        path: of the folder.
        what: how messages name it.
        max_bytes: no more than one byte beyond is read of an image.
    """

    def __init__(self, path: str, what: str, max_bytes: int) -> None:
        self.files = InputFiles(path, what)
        self._max_bytes = max_bytes

    def digest(self, names: Sequence[str | None]) -> str:
        """Of the names and contents of these images; a name that cannot be read counts as absent."""
        return self.files.digest(sorted({posixpath.normpath(str(name)) for name in names if name}))

    def read(self, name: str) -> Fetched:
        """The bytes of an image."""
        if _leads_outside(name):
            return Failure(REFUSED, "the image's path leads outside the folder")
        try:
            return self.files.read(posixpath.normpath(name), self._max_bytes + 1)
        except FileNotFoundError:
            return Failure(MISSING, "there is no such file")
        except OSError as error:
            if error.errno not in _NO_SUCH_NAME:
                raise  # the folder's service is in trouble, or the session over: no fault of the row
            return Failure(MISSING, error.strerror or type(error).__name__)
        except ValueError:  # a NUL within it
            return Failure(MISSING, "the image's path is not one")


def _place_of(name: str, has_text: bool) -> str:
    if clean(name) != name:  # as in a ZIP from an old Windows; no table of ours, and no digest, can hold it
        return no_place(MISSING, "the file's name is not UTF-8")
    return place(name) if has_text else no_place(NO_CAPTION, "no .txt beside the image")


def _leads_outside(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts


def _text_name(image: str) -> str:
    return f"{image.rpartition('.')[0]}.txt"
