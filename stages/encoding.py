"""The image encoder as workers hold it: batches of pixels in, codes out; views are made here, on the encoder's device.

Shapes: b images of a batch, H W pixels, N books, D depth, h w code grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.image_tokenizer import ImageTokenizer
from models.transforms import ViewsConfig, normalise, random_view
from stages.image_data import ORIGINAL
from stages.loading import load_tokenizer
from stages.training import autocast, mix_seed
from storage.store import Store

Codes = npt.NDArray[np.int64]

CPU_CHUNK = 8
"""Images that a CPU encodes at a time, blank ones included, whatever the batch size: other numbers take other kernels,
which round a code otherwise now and then. Faster than the batches that suit a GPU."""


@dataclass(frozen=True)
class Batch:
    """Images that are encoded together."""

    pixels: npt.NDArray[np.uint8]
    """[b, 3, H, W]"""
    keys: list[str]
    """Of the images, b of them."""
    views: list[str]
    """Which view of each image is meant, `original` for the image itself."""

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class EncoderFactory:
    """What travels to a process that encodes; calling it there loads the encoder."""

    store: Store
    tokenizer_digest: str
    views: ViewsConfig
    precision: str
    on_gpu: bool
    num_threads: int
    seed: int

    def __call__(self) -> Encoder:
        return Encoder(self)


class Encoder:
    """A tokenizer on its device.

    Attributes:
        tokenizer: in eval mode.
        device: where it encodes.
    """

    def __init__(self, job: EncoderFactory) -> None:
        self._job = job
        self.device = torch.device("cuda" if job.on_gpu else "cpu")
        torch.set_num_threads(job.num_threads)
        self.tokenizer: ImageTokenizer = load_tokenizer(job.store, job.tokenizer_digest).to(self.device)
        if self.tokenizer.teacher is not None:
            self.tokenizer.teacher.to(self.device)

    @torch.no_grad()
    def encode(self, batch: Batch, slots: list[int]) -> Codes:
        """Codes `[len(slots), N, D, h, w]` of the images in these places of a batch.

        The other places are blank, but there: some kernels round differently for another batch size, and an image must
        not change its codes because one beside it was taken out.
        """
        pixels = batch.pixels
        if len(slots) < len(batch):
            pixels = np.zeros_like(batch.pixels)
            pixels[slots] = batch.pixels[slots]
        images = normalise(torch.from_numpy(pixels).to(self.device))
        if any(view != ORIGINAL for view in batch.views):
            pairs = enumerate(zip(batch.keys, batch.views, strict=True))
            images = torch.stack([self._shown(images[at], key, view) for at, (key, view) in pairs])
        with autocast(self.device, self._job.precision):
            codes = self._codes(images)
        found: Codes = codes[slots].cpu().numpy()
        return found

    def _codes(self, images: Tensor) -> Tensor:
        """Codes `[b, N, D, h, w]` of images `[b, 3, H, W]`."""
        if self.device.type != "cpu":
            return self.tokenizer.encode(images)
        blank = images.new_zeros(-len(images) % CPU_CHUNK, *images.shape[1:])
        chunks = torch.cat([images, blank]).split(CPU_CHUNK)
        return torch.cat([self.tokenizer.encode(chunk) for chunk in chunks])[: len(images)]

    def _shown(self, image: Tensor, key: str, view: str) -> Tensor:
        """A view of an image `[3, H, W]`; which one follows from seed, view and key alone."""
        if view == ORIGINAL:
            return image
        generator = torch.Generator().manual_seed(mix_seed(self._job.seed, view, key))
        return random_view(image, self._job.views, generator)
