"""The encoder of a worker: it encodes batches of pixels as codes, and generates the views on the encoder's device.

It also scores how well images match their captions, if that is asked for.

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
"""Number of images that one CPU thread encodes at a time, blank ones included, whatever the batch size: another number
may select other kernels, which sometimes round a code differently. It is faster than batches that suit a GPU."""


@dataclass(frozen=True)
class ImageBatch:
    """A batch of images to encode."""

    pixels: Pixels
    """uint8 `[b, 3, H, W]` pixels."""
    keys: list[str]
    """Keys of the b images."""
    views: list[str]
    """Name of the view to encode for each image; `original` is the image itself."""

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class EncoderFactory:
    """Picklable description of an encoder; calling it in the worker process loads the encoder."""

    store: Store
    tokenizer_digest: str
    scorer_digest: str | None
    """Digest of the teacher that scores captions; None if none are scored."""
    views: ViewsConfig
    precision: str
    on_gpu: bool
    num_threads: int
    seed: int

    def __call__(self) -> Encoder:
        return Encoder(self)


class Encoder:
    """A tokenizer on its device.

    On a CPU, each thread encodes CPU_CHUNK images by itself. That is faster than threads that share each convolution
    and wait for each other, and no code depends on the number of threads.

    Attributes:
        tokenizer: the tokenizer, in eval mode.
        device: device on which it encodes.
    """

    def __init__(self, job: EncoderFactory) -> None:
        self._job = job
        self.device = torch.device("cuda" if job.on_gpu else "cpu")
        self._threads: ThreadPoolExecutor | None = None
        if not job.on_gpu:
            self._threads = ThreadPoolExecutor(job.num_threads, thread_name_prefix="encode")
            torch.set_num_threads(1)  # for each of the pool's threads
        self.tokenizer: ImageTokenizer = load_tokenizer(job.store, job.tokenizer_digest).to(self.device)
        if self.tokenizer.teacher is not None:
            self.tokenizer.teacher.to(self.device)
        self._caption_match = None if job.scorer_digest is None else self._scorer(job.scorer_digest)

    def encode(self, batch: ImageBatch, slots: list[int]) -> CodeArray:
        """Return the codes `[len(slots), N, D, h, w]` of the images at some positions of a batch.

        The images at other positions are replaced by blank ones: some kernels round differently for another batch size,
        and the codes of an image must not change because another one was left out.
        """
        codes: CodeArray = self._in_chunks(self._codes, _only(batch.pixels, slots), batch.keys, batch.views)[
            slots
        ].numpy()
        return codes

    def scores(self, pixels: Pixels, captions: list[str], slots: list[int]) -> Scores:
        """Score the images `[b, 3, H, W]` at some positions against their captions; `[len(slots)]`, -1 to 1.

        As in `encode`, the images at other positions are replaced by blank ones.
        """
        assert self._caption_match is not None, "it was made without a teacher that scores captions"
        wanted = set(slots)
        texts = [caption if slot in wanted else "" for slot, caption in enumerate(captions)]
        scores: Scores = self._in_chunks(self._caption_match.scores, _only(pixels, slots), texts)[slots].numpy()
        return scores

    def _scorer(self, digest: str) -> CaptionMatch:
        """Build the scorer, with the tokenizer's own teacher if it has one."""
        teacher = self.tokenizer.teacher
        if teacher is None:
            teacher = load_teacher(self._job.store, self._job.store.load(digest))
        return CaptionMatch(teacher, self.device)

    def _in_chunks(self, work: Callable[..., Tensor], pixels: Pixels, *columns: list[str]) -> Tensor:
        """Apply `work` to a batch, at once on a GPU, else in threads by CPU_CHUNK images; returns a CPU tensor.

        The last chunk is filled up with copies of its last image, whose results are dropped.
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
        """Encode views of images `[b, 3, H, W]` at once; `[b, N, D, h, w]`.

        `no_grad` and autocast apply to one thread, so they are entered here, in the calling thread.
        """
        images = normalise(torch.from_numpy(pixels).to(self.device))
        if any(view != ORIGINAL for view in views):
            pairs = enumerate(zip(keys, views, strict=True))
            images = torch.stack([self._shown(images[at], key, view) for at, (key, view) in pairs])
        # Kernels of different memory layouts round differently: always use the faster one, with or without views
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self._job.precision):
            return self.tokenizer.encode(images)

    def _shown(self, image: Tensor, key: str, view: str) -> Tensor:
        """Return a view of an image `[3, H, W]`, determined by seed, view and key."""
        if view == ORIGINAL:
            return image
        generator = torch.Generator().manual_seed(mix_seed(self._job.seed, view, key))
        return random_view(image, self._job.views, generator)


def _only(pixels: Pixels, slots: list[int]) -> Pixels:
    """Keep the images at these positions, and replace the others by blank ones."""
    if len(slots) == len(pixels):
        return pixels
    blanked = np.zeros_like(pixels)
    blanked[slots] = pixels[slots]
    return blanked
