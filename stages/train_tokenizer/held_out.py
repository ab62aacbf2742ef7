"""Metrics of a trained tokenizer on the held-out images, which are the metrics of its artifact.

Shape legend: B batch, N books, D depth, h w code grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.metrics.frechet import frechet_distance
from models.metrics.measures import SSIM_WANG, book_statistics, psnr, ssim
from models.ranks import gather_objects, num_ranks, rank
from models.tokenizers.image_tokenizer import ImageTokenizer, semantic_cosine
from models.transforms import normalise, to_pixels
from stages.artifacts.images import ImageSource
from stages.metrics.measuring import FeatureSpace, Perceptual, ZeroShot
from stages.runtime.devices import autocast
from stages.runtime.progress import tracked

_BATCH = 32
_MEANS = ("psnr", "ssim", "lpips", "perceptual", "semantic_cosine")


class HeldOutResult(NamedTuple):
    """The metrics and their settings."""

    metrics: dict[str, float]
    settings: dict[str, Any]
    """What should be reported with the metrics: split, images, classes, and the feature space of the Fréchet
    distance."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out images and the measurement of a tokenizer on them."""

    source: ImageSource
    split: str
    """Name of the split of the images."""
    space: FeatureSpace | None
    """Feature space of the Fréchet distance; None if there is neither a teacher nor Inception."""
    task: ZeroShot | None
    """The zero-shot classification; None without a teacher that has a text tower."""
    perceptual: Perceptual | None
    """The perceptual distance; None if training has none."""
    device: torch.device
    """Device of the tokenizer and the teacher."""
    precision: str
    """Autocast type: `bf16` or `fp32`."""

    @torch.no_grad()
    def measure(self, tokenizer: ImageTokenizer) -> HeldOutResult:
        """Measure distances of image pairs and of both sets, codebook usage, semantic cosine and zero-shot accuracy."""
        parts: dict[str, list[Tensor]] = {}
        own = self._own_batches()
        measured = [self._batch(tokenizer, rows) for rows in tracked(iter(own), len(own), "held-out images, batches")]
        for batches in gather_objects(measured):
            for batch in batches:
                for name, value in batch.items():
                    parts.setdefault(name, []).append(value)
        found = {name: torch.cat(values) for name, values in parts.items()}
        settings: dict[str, Any] = {"split": self.split, "num_images": len(self.source), "ssim": SSIM_WANG.settings}
        metrics: dict[str, float] = {name: float(found[name].mean()) for name in _MEANS if name in found}
        for name, use in book_statistics(found["codes"], tokenizer.book_names, tokenizer.codebook_sizes).items():
            metrics[f"codebook_usage{name}"], metrics[f"codebook_perplexity{name}"] = use
        if self.task is not None:
            settings["zero_shot"] = self.task.settings
            for name in ("zero_shot", "zero_shot_teacher"):
                if name in found:
                    metrics[f"{name}_top1"] = float((found[name] == 0).double().mean())
        if self.space is not None and len(self.source) > 1:  # one image has no covariance
            distance = self.space.distance
            metrics[distance.metric] = frechet_distance(found["reconstructions"], found["originals"])
            size = self.source.transform.image_size
            settings[distance.metric] = distance.settings | {"image_size": size, "format": "PNG"}
        return HeldOutResult(metrics, settings)

    def _own_batches(self) -> list[list[int]]:
        """Return this rank's batches of the images, in order."""
        every = list(range(len(self.source)))
        batches = [every[start : start + _BATCH] for start in range(0, len(every), _BATCH)]
        each = -(-len(batches) // num_ranks())
        return batches[rank() * each : (rank() + 1) * each]

    def _batch(self, tokenizer: ImageTokenizer, rows: list[int]) -> dict[str, Tensor]:
        """Compute for each row what is averaged or compared later; the tensors are on the CPU."""
        pixels = self.source.pixels(rows)
        images = normalise(pixels.to(self.device))
        with autocast(self.device, self.precision):
            output = tokenizer(images)
        by_codes = None if self.task is None else self.task.code_ranks(rows, tokenizer, output.codes)
        drawn = to_pixels(output.reconstruction).cpu()
        found = {
            "psnr": psnr(drawn, pixels),
            "ssim": ssim(drawn, pixels),
            "codes": output.codes.cpu(),
        }
        if self.space is not None:
            found |= {"originals": self.space.describe(pixels), "reconstructions": self.space.describe(drawn)}
        if output.semantic_prediction is not None and output.semantic_target is not None:
            cosine = semantic_cosine(output.semantic_prediction, output.semantic_target)
            found["semantic_cosine"] = cosine.cpu().expand(len(rows))
        if self.perceptual is not None:
            found[self.perceptual.metric] = self.perceptual.measure(drawn, pixels, self.device)
        if by_codes is not None:
            found["zero_shot"] = by_codes
        if self.task is not None:
            found["zero_shot_teacher"] = self.task.teacher_ranks(rows, images)
        return found
