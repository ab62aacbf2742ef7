"""The image encoder as workers hold it: batches of pixels in, codes out; views are made here, on the encoder's device.

It also scores how well images fit their captions, where that is asked for.

Shapes: b images of a batch, H W pixels, N books, D depth, h w code grid.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.tokenizers.image_tokenizer import ImageTokenizer
from models.transforms import ViewsConfig, normalise, random_view
from stages.artifacts.models import load_teacher, load_tokenizer
from stages.artifacts.rows import ORIGINAL
from stages.runtime.devices import autocast
from stages.runtime.seeds import mix_seed
from stages.tokenize.caption_match import CaptionMatch
from storage.store import Store

Pixels = npt.NDArray[np.uint8]
CodeArray = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]

CPU_CHUNK = 8
"""Images that one CPU thread encodes at a time, blank ones included, whatever the batch size: other numbers take other
kernels, which round a code otherwise now and then. Faster than the batches that suit a GPU."""


@dataclass(frozen=True)
class ImageBatch:
    """Images that are encoded together."""

    pixels: Pixels
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
    scorer_digest: str | None
    """Of the teacher that scores captions; None where none are scored."""
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
        self._caption_match = None if job.scorer_digest is None else self._scorer(job.scorer_digest)

    def encode(self, batch: ImageBatch, slots: list[int]) -> CodeArray:
        """Codes `[len(slots), N, D, h, w]` of the images in these places of a batch.

        The other places are blank, but there: some kernels round differently for another batch size, and an image must
        not change its codes because one beside it was taken out.
        """
        codes: CodeArray = self._in_chunks(self._codes, _only(batch.pixels, slots), batch.keys, batch.views)[
            slots
        ].numpy()
        return codes

    def scores(self, pixels: Pixels, captions: list[str], slots: list[int]) -> Scores:
        """How well those images `[b, 3, H, W]` fit their captions that are in these places: `[len(slots)]`, -1 to 1.

        As with `encode`, the other places are there and blank.
        """
        assert self._caption_match is not None, "it was made without a teacher that scores captions"
        wanted = set(slots)
        texts = [caption if slot in wanted else "" for slot, caption in enumerate(captions)]
        scores: Scores = self._in_chunks(self._caption_match.scores, _only(pixels, slots), texts)[slots].numpy()
        return scores

    def _scorer(self, digest: str) -> CaptionMatch:
        """With the teacher that the tokenizer brings, where it has one."""
        teacher = self.tokenizer.teacher
        if teacher is None:
            teacher = load_teacher(self._job.store, self._job.store.load(digest))
        return CaptionMatch(teacher, self.device)

    def _in_chunks(self, work: Callable[..., Tensor], pixels: Pixels, *columns: list[str]) -> Tensor:
        """What `work` gives for a batch, on the CPU: on a GPU at once, else by threads of CPU_CHUNK images each.

        The last chunk is filled up with more of its last image, whose results are dropped.
        """
        if self._threads is None:
            return work(pixels, *columns).cpu()
        count = len(pixels)
        waiting = []
        for start in range(0, count, CPU_CHUNK):
            chunk = [min(at, count - 1) for at in range(start, start + CPU_CHUNK)]
            waiting.append(
                self._threads.submit(work, pixels[chunk], *([column[at] for at in chunk] for column in columns))
            )
        return torch.cat([future.result() for future in waiting])[:count]

    @torch.no_grad()
    def _codes(self, pixels: Pixels, keys: list[str], views: list[str]) -> Tensor:
        """Codes `[b, N, D, h, w]` of views of images `[b, 3, H, W]` that are encoded at once.

        `no_grad` and autocast hold for one thread, so they are entered here, in that of the caller.
        """
        images = normalise(torch.from_numpy(pixels).to(self.device))
        if any(view != ORIGINAL for view in views):
            pairs = enumerate(zip(keys, views, strict=True))
            images = torch.stack([self._shown(images[at], key, view) for at, (key, view) in pairs])
        # Each memory layout has kernels of its own, which round differently: the faster one, with or without views
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self._job.precision):
            return self.tokenizer.encode(images)

    def _shown(self, image: Tensor, key: str, view: str) -> Tensor:
        """A view of an image `[3, H, W]`; which one follows from seed, view and key alone."""
        if view == ORIGINAL:
            return image
        generator = torch.Generator().manual_seed(mix_seed(self._job.seed, view, key))
        return random_view(image, self._job.views, generator)


def _only(pixels: Pixels, slots: list[int]) -> Pixels:
    """The images in these places; the others are blank."""
    if len(slots) == len(pixels):
        return pixels
    blanked = np.zeros_like(pixels)
    blanked[slots] = pixels[slots]
    return blanked
