"""The image encoder as workers hold it: batches of pixels in, codes out; views are made here, on the encoder's device.

Shapes: b images of a batch, H W pixels, N books, D depth, h w code grid.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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
"""Images that one CPU thread encodes at a time, blank ones included, whatever the batch size: other numbers take other
kernels, which round a code otherwise now and then. Faster than the batches that suit a GPU."""


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

    On a CPU, threads encode CPU_CHUNK images each, side by side: faster than threads that share one convolution and
    wait for each other, and no code depends on how many there are.

    Attributes:
        tokenizer: in eval mode.
        device: where it encodes.
    """

    def __init__(self, job: EncoderFactory) -> None:
        self._job = job
        self.device = torch.device("cuda" if job.on_gpu else "cpu")
        self._threads: ThreadPoolExecutor | None = None
        if not job.on_gpu:
            self._threads = ThreadPoolExecutor(job.num_threads, thread_name_prefix="encode")
            torch.set_num_threads(1)  # in each of them
        self.tokenizer: ImageTokenizer = load_tokenizer(job.store, job.tokenizer_digest).to(self.device)
        if self.tokenizer.teacher is not None:
            self.tokenizer.teacher.to(self.device)

    def encode(self, batch: Batch, slots: list[int]) -> Codes:
        """Codes `[len(slots), N, D, h, w]` of the images in these places of a batch.

        The other places are blank, but there: some kernels round differently for another batch size, and an image must
        not change its codes because one beside it was taken out.
        """
        pixels = batch.pixels
        if len(slots) < len(batch):
            pixels = np.zeros_like(batch.pixels)
            pixels[slots] = batch.pixels[slots]
        if self._threads is None:
            codes = self._codes(pixels, batch.keys, batch.views)
        else:
            parts = [slice(start, start + CPU_CHUNK) for start in range(0, len(batch), CPU_CHUNK)]
            waiting = [self._threads.submit(self._codes, pixels[at], batch.keys[at], batch.views[at]) for at in parts]
            codes = torch.cat([future.result() for future in waiting])
        found: Codes = codes[slots].cpu().numpy()
        return found

    @torch.no_grad()
    def _codes(self, pixels: npt.NDArray[np.uint8], keys: list[str], views: list[str]) -> Tensor:
        """Codes `[b, N, D, h, w]` of views of images `[b, 3, H, W]` that are encoded at once.

        `no_grad` and autocast hold for one thread, so they are entered here, in that of the caller.
        """
        images = normalise(torch.from_numpy(pixels).to(self.device))
        if any(view != ORIGINAL for view in views):
            pairs = enumerate(zip(keys, views, strict=True))
            images = torch.stack([self._shown(images[at], key, view) for at, (key, view) in pairs])
        if self.device.type == "cpu":
            images = torch.cat([images, images.new_zeros(CPU_CHUNK - len(images), *images.shape[1:])])
        with autocast(self.device, self._job.precision):
            return self.tokenizer.encode(images)[: len(pixels)]

    def _shown(self, image: Tensor, key: str, view: str) -> Tensor:
        """A view of an image `[3, H, W]`; which one follows from seed, view and key alone."""
        if view == ORIGINAL:
            return image
        generator = torch.Generator().manual_seed(mix_seed(self._job.seed, view, key))
        return random_view(image, self._job.views, generator)
