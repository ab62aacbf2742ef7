"""Images of a `download` artifact as tensors, in an order that depends on the artifact alone."""

from __future__ import annotations

import copy
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.ranks import num_ranks
from models.transforms import RandomCrop, TransformConfig, load_image, to_tensor
from stages.artifacts.rows import CODE_TABLE_COLUMNS, OK, SPLIT, VIEW, split_of
from stages.artifacts.shards import METADATA, images_file, shard_of
from stages.runtime.progress import tracked
from storage.image_shards import ImageSample
from storage.manifest import Manifest
from storage.store import Store
from storage.tables import read_table

_CACHE_BYTES = 2 << 30
"""Decoded images are cached in memory if all of them fit into this size, which the processes of a training share; the
images of larger sets are decoded at every use."""


@dataclass(frozen=True)
class _Place:
    shard: Path
    offset: int
    size: int


class ImageSource:
    """Random access to the usable images of a download by index.

    Attributes:
        keys: key of each image.
        captions: caption of each image.
        columns: extra columns of the metadata (concept, category, style, ...), with one value per image.
    """

    def __init__(
        self, store: Store, download: Manifest, transform: TransformConfig, *, split: str | None = None
    ) -> None:
        """
        Args:
            store: the store with the download.
            download: manifest of kind `image_shards`.
            transform: transform of images to squares.
            split: only rows whose `split` column has this value are used; without that column all rows are train.

        Raises:
            ValueError: no row is left.
        """
        self.transform = transform
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.columns: dict[str, list[str]] = {}
        self._places: list[_Place] = []
        tables = download.files_under(METADATA)
        for entry in tracked(iter(tables), len(tables), "reading image shards", delay=5):
            table = read_table(store.fetch(entry))
            shard = store.fetch(download.file(images_file(shard_of(entry))))
            offsets = _image_offsets(shard)
            for row in table.to_pylist():
                if row["status"] == OK and split in (None, split_of(row.get(SPLIT))):
                    self._add(row, _Place(shard, *offsets[row["key"]]), table.column_names[10:])
        if not self.keys:
            raise ValueError(
                f"the download has no usable image in split {split!r}; check its metadata tables with "
                f"`musevl artifacts show {download.digest[:12]}`, and the `split` column of the URL list"
            )
        decoded_bytes = len(self.keys) * 3 * transform.image_size**2
        self._cache: dict[int, Tensor] | None = {} if decoded_bytes <= _CACHE_BYTES // num_ranks() else None

    def __len__(self) -> int:
        return len(self.keys)

    def only(self, positions: list[int]) -> ImageSource:
        """Return a source with some of these images, in the given order; decoded images are not shared."""
        chosen = copy.copy(self)
        chosen.keys = [self.keys[position] for position in positions]
        chosen.captions = [self.captions[position] for position in positions]
        chosen._places = [self._places[position] for position in positions]
        chosen.columns = {name: [values[position] for position in positions] for name, values in self.columns.items()}
        chosen._cache = None if self._cache is None else {}
        return chosen

    def row(self, index: int) -> dict[str, str]:
        """Return the text columns of an image, with its caption as `text`."""
        return {name: values[index] for name, values in self.columns.items()} | {"text": self.captions[index]}

    def raw(self, index: int) -> bytes:
        """Return the encoded image as downloaded."""
        place = self._places[index]
        with place.shard.open("rb") as file:
            file.seek(place.offset)
            return file.read(place.size)

    def pixels(self, indices: list[int], crops: Sequence[RandomCrop | None] = ()) -> Tensor:
        """Return uint8 `[len(indices), 3, H, W]`, cropped if there are crops, one per image."""
        chosen = crops or [None] * len(indices)
        return torch.stack([self._one(index, crop) for index, crop in zip(indices, chosen, strict=True)])

    def _one(self, index: int, crop: RandomCrop | None) -> Tensor:
        if self._cache is None or crop is not None:
            return self._decode(index, crop)
        if index not in self._cache:
            self._cache[index] = self._decode(index)
        return self._cache[index]

    def _decode(self, index: int, crop: RandomCrop | None = None) -> Tensor:
        return to_tensor([load_image(self.raw(index), self.transform, crop=crop)])[0]

    def _add(self, row: dict[str, Any], place: _Place, extra: list[str]) -> None:
        self.keys.append(row["key"])
        self.captions.append(row["caption"] or "")
        self._places.append(place)
        for name in extra:
            self.columns.setdefault(name, []).append(row[name] or "")


class BatchReader:
    """Reads batches of images; threads decode the next batch while the caller processes the current one.

    Args:
        source: the images.
        rows_of: returns the indices of a batch's images by its number.
        num_batches: number of batches; nothing after them is decoded.
        num_threads: number of images decoded at a time.
        crops_of: returns the crops of a batch's images by its number; none by default.
    """

    def __init__(
        self,
        source: ImageSource,
        rows_of: Callable[[int], list[int]],
        num_batches: int,
        num_threads: int,
        crops_of: Callable[[int], Sequence[RandomCrop | None]] | None = None,
    ) -> None:
        self._source, self._rows_of, self._num_batches = source, rows_of, num_batches
        self._crops_of = crops_of
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._begun: dict[int, list[Future[Tensor]]] = {}

    def __enter__(self) -> BatchReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def pixels(self, batch: int) -> Tensor:
        """Return a batch as uint8 `[rows, 3, H, W]`, in the order of its indices."""
        self._begin(batch)
        if batch + 1 < self._num_batches:
            self._begin(batch + 1)
        return torch.cat([future.result() for future in self._begun.pop(batch)])

    def _begin(self, batch: int) -> None:
        if batch in self._begun:
            return
        rows = self._rows_of(batch)
        crops = self._crops_of(batch) if self._crops_of else [None] * len(rows)
        pairs = zip(rows, crops, strict=True)
        self._begun[batch] = [self._pool.submit(self._source.pixels, [row], [crop]) for row, crop in pairs]


def table_columns(sample: ImageSample, view: str) -> dict[str, str | None]:
    """Return the text columns of a code table's row for an image and view."""
    extra = {name: str(value) for name, value in sample.json.items() if name not in ("url", *CODE_TABLE_COLUMNS)}
    return {"text": sample.text, VIEW: view, **extra}


def _image_offsets(shard: Path) -> dict[str, tuple[int, int]]:
    """Return the byte offset and size of the image of each key in a WebDataset tar."""
    offsets = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            stem, _, extension = member.name.rpartition(".")
            if extension not in ("txt", "json"):
                offsets[stem] = (member.offset_data, member.size)
    return offsets
