"""Batches of images that threads decode ahead."""

from __future__ import annotations

import threading
from typing import cast

import pytest
import torch
from torch import Tensor

from models.transforms import CropConfig, RandomCrop
from stages.artifacts.images import BatchReader, ImageSource


class Source:
    """Image n is a pixel of value n; remembers what was decoded, and can refuse an image."""

    def __init__(self, broken: int | None = None) -> None:
        self.decoded: list[int] = []
        self.crops: list[tuple[int, RandomCrop | None]] = []
        self.broken, self.lock = broken, threading.Lock()

    def pixels(self, rows: list[int], crops: list[RandomCrop | None]) -> Tensor:
        with self.lock:
            self.decoded += rows
            self.crops += zip(rows, crops, strict=True)
        if self.broken in rows:
            raise OSError(f"image {self.broken} cannot be decoded")
        return torch.tensor(rows, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)


def reader(source: Source) -> BatchReader:
    batches = [[3, 1, 2], [0, 4, 3], [5, 5, 1]]
    return BatchReader(cast(ImageSource, source), batches.__getitem__, len(batches), num_threads=4)


def test_batches_come_in_order_and_one_is_decoded_ahead() -> None:
    source = Source()
    with reader(source) as batches:
        assert batches.pixels(0)[:, 0, 0, 0].tolist() == [3, 1, 2]
        assert batches.pixels(1)[:, 0, 0, 0].tolist() == [0, 4, 3]
        assert batches.pixels(2)[:, 0, 0, 0].tolist() == [5, 5, 1]
    assert sorted(source.decoded) == [0, 1, 1, 2, 3, 3, 4, 5, 5], "each once, and none after the last batch"


def test_each_image_of_a_batch_has_its_own_crop() -> None:
    source = Source()
    crops = [RandomCrop(CropConfig(kind="square"), seed) for seed in range(3)]
    batches = BatchReader(cast(ImageSource, source), lambda _: [7, 7, 2], 1, num_threads=2, crops_of=lambda _: crops)
    with batches:
        batches.pixels(0)
    assert sorted(source.crops, key=str) == sorted(zip([7, 7, 2], crops, strict=True), key=str)


def test_a_run_that_begins_in_the_middle_decodes_nothing_before() -> None:
    source = Source()
    with reader(source) as batches:
        assert batches.pixels(2)[:, 0, 0, 0].tolist() == [5, 5, 1]
    assert sorted(source.decoded) == [1, 5, 5]


def test_an_image_that_cannot_be_decoded_is_an_error_of_its_own_batch() -> None:
    with reader(Source(broken=4)) as batches:
        batches.pixels(0)
        with pytest.raises(OSError, match="image 4"):
            batches.pixels(1)
