"""Source of a folder of images, with captions in a list or in a text file next to each image."""

from __future__ import annotations

import errno
import logging
import posixpath
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

import pyarrow as pa

from models.config import Config
from stages.download.sources.images import is_image_name
from stages.download.sources.known_lists import images_named
from stages.download.sources.lists import RowList, Sought
from stages.download.sources.source import (
    MISSING,
    NO_CAPTION,
    PLACE,
    REFUSED,
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
from stages.download.sources.text import TEXT_SUFFIXES, clean, decode, fold, pair_folded, split_suffix, strings
from stages.protocol import RuntimeStr
from storage.input_files import InputFiles, is_clutter

logger = logging.getLogger(__name__)

_LIST = "download.files.captions"
_NO_SUCH_NAME = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


class FolderFiles(Config):
    """A folder of images with captions."""

    kind: Literal["folder"]
    """Selects this layout."""
    path: RuntimeStr
    """The folder, local or s3://. Names and contents of its images enter the digest, not its path."""
    captions: RuntimeStr = ""
    """A CSV, TSV, JSON, JSONL or Parquet list, in one file or several, with a row for each image; '' if each image has
    a text file: KEY.txt (or .text, .caption, .cap) next to KEY.jpg."""
    file_column: str = "file_name"
    """Column of `captions` with the images' paths within the folder."""

    def open(self, options: SourceOptions) -> ImageFolder:
        """Open the source of the folder's images."""
        return ImageFolder(self, options)


class ImageFolder:
    """Source with one row per image of a folder, in the order of the list or of the images' names.

    Args:
        config: paths of the folder and the list.
        options: the caption column, how lists are read, and the size limit of an image.
    """

    def __init__(self, config: FolderFiles, options: SourceOptions) -> None:
        self._config, self._caption_column = config, options.caption_column
        self._images = FolderImages(config.path, "download.files.path", options.max_bytes)
        self._list = None
        if config.captions:
            self._list = RowList(config.captions, "list", _LIST, tsv_quotes=options.tsv_quotes)
        self.what = self._list.what if self._list else f"folder {config.path}"

    def content(self) -> dict[str, str]:
        if self._list is None:
            pairs = self._pairs()
            names = [name for image, text in pairs.items() for name in (image, text) if name]
            return {"files": self._images.files.digest(list(map(clean, names)))}
        digest, column = self._list.digest(), self._config.file_column
        names = images_named(self._list.files, self._list.names(), ["folder", column, digest], self._file_names)
        return {"captions": digest, "files": self._images.digest(names)}

    def rows(self, columns: Sequence[str]) -> pa.Table:
        return self._paired_rows(columns) if self._list is None else self._listed_rows(self._list, columns)

    def fetch(self, rows: list[Row], scratch: Path) -> Iterator[tuple[int, Fetched]]:
        for position, found in placed(rows, "the row"):
            if isinstance(found, Failure):
                yield position, found
            else:
                yield position, self._images.read(found[0])

    def _file_names(self) -> list[str]:
        assert self._list is not None, "asked for where there is a list alone"
        names: list[str] = self._list.read(self._sought, [])[self._config.file_column].to_pylist()
        return names

    @property
    def _sought(self) -> Sought:
        return Sought(self._config.file_column, "set download.files.file_column to the one with the images' paths")

    def _listed_rows(self, listed: RowList, columns: Sequence[str]) -> pa.Table:
        table = listed.read(self._sought, columns)
        names = self._images.resolve(table[self._config.file_column].to_pylist())
        self._images.say_unlisted(names, self.what)
        places = [place(name) if name else "" for name in names]
        return pa.table({name: table[name] for name in columns} | {URL: strings(names), PLACE: strings(places)})

    def _paired_rows(self, columns: Sequence[str]) -> pa.Table:
        own = find_columns(self.what, columns, [self._caption_column])
        files, pairs = self._images.files, self._pairs()
        texts = [text for text in pairs.values() if text]
        if not texts:
            found = f"{len(pairs)} images and no .txt next to them" if pairs else "no images"
            raise ValueError(
                f"{self.what} holds {found}; put KEY.txt next to KEY.jpg, or set {_LIST} to a list of captions"
            )
        used = {*pairs, *texts}
        for clutter, kind in (
            (False, "are neither images nor texts beside one"),
            (True, "are hidden or a system's own"),
        ):
            left_out = [clean(name) for name in files.names() if name not in used and is_clutter(name) == clutter]
            say_left_out(logger, self.what, left_out, f"files that {kind}")
        contents = files.read_all(texts)
        captions = [decode(next(contents)).strip() if text else "" for text in pairs.values()]
        places = [_place_of(image, has_text=bool(text)) for image, text in pairs.items()]
        return pa.table({name: strings(captions) for name in own} | {URL: strings(list(pairs)), PLACE: strings(places)})

    def _pairs(self) -> dict[str, str]:
        """Return the text file of each image, in the order of the images' names; '' if it has none.

        A file with an unknown suffix next to a text that belongs to no image is taken for its image; decoding will
        tell.
        """
        names = [name for name in self._images.files.names() if not is_clutter(name)]
        texts: dict[str, str] = {}  # text files by name without suffix
        for suffix in TEXT_SUFFIXES:
            for name in names:
                stem, own = split_suffix(name)
                if own == suffix:
                    texts.setdefault(stem, name)
        images = [name for name in names if is_image_name(name)]
        stems = {image: split_suffix(image)[0] for image in images}
        pairs = {image: texts.get(image) or texts.get(stems[image], "") for image in images}  # a.jpg.txt, a.txt
        for named in ({image: image for image in images}, stems):
            taken = set(pairs.values())
            free = {text: stem for stem, text in texts.items() if text not in taken}
            unpaired = {image: name for image, name in named.items() if not pairs[image]}
            pairs |= pair_folded(unpaired, free)
        taken = set(pairs.values())
        known = {*pairs.values(), *texts.values(), *images}
        for name in names:
            text = texts.get(name) or texts.get(split_suffix(name)[0], "")
            if text and name not in known and text not in taken:
                pairs[name] = text
                taken.add(text)
        return dict(sorted(pairs.items()))


class FolderImages:
    """Reads images that a list names by their paths within a folder.

    Args:
        path: path of the folder.
        what: name of the folder in messages.
        max_bytes: size limit of an image; of a larger one only one byte more is read.
    """

    def __init__(self, path: str, what: str, max_bytes: int) -> None:
        self.what = f"folder {path}"
        self.files = InputFiles(path, what)
        self._max_bytes = max_bytes

    def resolve(self, names: Sequence[str]) -> list[str]:
        """Return the files that the names of a list refer to, in the same order.

        A path that exists literally is that file. Otherwise it is the only file whose path is equal except for
        backslashes, surrounding spaces, upper case or the Unicode form of accents. A path that refers to no file is
        returned unchanged.
        """
        return [self._resolve(name) if name else name for name in names]

    def digest(self, names: Sequence[str]) -> str:
        """Return a digest of the names and contents of a list's images; unreadable ones count as absent."""
        return self.files.digest(sorted({posixpath.normpath(name) for name in self.resolve(names) if name}))

    def say_unlisted(self, names: Sequence[str], what: str) -> None:
        """Log how many images of the folder a list does not name.

        Args:
            names: the list's images, as returned by `resolve`.
            what: name of the list in messages.
        """
        listed = set(names)
        others = [name for name in self.files.names() if name not in listed and is_image_name(name)]
        others = [clean(name) for name in others if not is_clutter(name)]
        say_left_out(logger, self.what, others, f"images that {what} does not name")

    def _resolve(self, name: str) -> str:
        path = name.strip()
        if path.startswith(f"{self.files.folder}/"):
            path = path[len(self.files.folder) + 1 :]
        for spelled in (name, path, path.replace("\\", "/")):
            normal = posixpath.normpath(spelled)
            if normal in self.files:
                return normal
        folded = self._folded.get(fold(normal), [])
        return folded[0] if len(folded) == 1 else name

    @cached_property
    def _folded(self) -> dict[str, list[str]]:
        """The files by their folded names; computed when a name does not exist literally."""
        folded: dict[str, list[str]] = {}
        for name in self.files.names():
            folded.setdefault(fold(name), []).append(name)
        return folded

    def read(self, name: str) -> Fetched:
        """Read the bytes of an image."""
        if _leads_outside(name):
            return Failure(REFUSED, "the image's path leads outside the folder")
        try:
            return self.files.read(posixpath.normpath(name), self._max_bytes + 1)
        except FileNotFoundError:
            return Failure(MISSING, "there is no such file")
        except OSError as error:
            if error.errno not in _NO_SUCH_NAME:
                raise  # the folder's service fails or the credentials have expired, which is not the row's fault
            return Failure(MISSING, error.strerror or type(error).__name__)
        except ValueError:  # the path contains a NUL
            return Failure(MISSING, "the image's path is not one")


def _place_of(name: str, *, has_text: bool) -> str:
    if clean(name) != name:  # as from a ZIP of an old Windows; tables and digests cannot hold such names
        return no_place(MISSING, "the file's name is not UTF-8")
    return place(name) if has_text else no_place(NO_CAPTION, "no text beside the image")


def _leads_outside(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts
