"""Metrics of the images that a tokenizer reconstructs, measured by tokenizer training and by evaluation.

Shape legend: B batch, R rows, N books, D depth, h w code grid, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.metrics.frechet import frechet_distance
from models.metrics.measures import IMAGE_PAIR_METRICS, book_statistics, code_bits
from models.tokenizers.image_tokenizer import ImageTokenizer, semantic_cosine
from models.transforms import TransformConfig, normalise, to_pixels
from stages.metrics.measuring import FeatureSpace, Perceptual, SetDistance, ZeroShot, ZeroShotClasses
from stages.metrics.rows import RowMaker
from stages.runtime.devices import autocast
from storage.tables import CEILING

ORIGINAL_FEATURES, DRAWN_FEATURES = "original_features", "reconstruction_features"
"""Columns of features, from which a Fréchet distance is computed."""
RANK, TEACHER_RANK = "class_rank", "teacher_class_rank"
"""Columns of the number of classes nearer to an image than its own, by its codes and by the teacher."""
_SETTINGS: Mapping[str, dict[str, Any]] = {
    "lpips": {"library": "lpips", "network": "VGG16, v0.1", "input": "[-1, 1]"},
    "perceptual": {"rule": "distance of backbone features; a stand-in for LPIPS that does not compare with it"},
    "semantic_cosine": {"rule": "decoded from codes against the teacher's features"},
}
"""Settings of the means over the images that need more than `IMAGE_PAIR_METRICS` do: codes, teacher or weights."""


class Reconstructions(NamedTuple):
    """Reconstructed images and their measurements."""

    drawn: Tensor
    """uint8 `[B, 3, H, W]` on the CPU."""
    columns: dict[str, Tensor]
    """Numbers `[B]` and features `[B, F]` of each image, on the CPU, without those that the tokenizer or the teacher
    does not support."""


@dataclass(frozen=True)
class ReconstructionMeasures:
    """The networks that reconstructions are measured with."""

    perceptual: Perceptual | None
    space: FeatureSpace | None
    """Feature space of the Fréchet distance; None if there is neither a teacher nor Inception."""
    zero_shot: ZeroShot | None
    """The zero-shot classification; None without a teacher that has a text tower."""
    device: torch.device
    """Device of the tokenizer and the teacher."""
    precision: str
    """Autocast type: `bf16` or `fp32`."""

    @property
    def distance(self) -> SetDistance | None:
        """The Fréchet distance of the features."""
        return None if self.space is None else self.space.distance

    @property
    def classes(self) -> ZeroShotClasses | None:
        """The classes of the ranks."""
        return None if self.zero_shot is None else self.zero_shot.among

    @torch.no_grad()
    def measure(self, tokenizer: ImageTokenizer, rows: list[int], pixels: Tensor, codes: Tensor) -> Reconstructions:
        """Decode codes, and compare the images and features that they decode to with the originals.

        Args:
            tokenizer: The tokenizer, in eval mode.
            rows: The rows of the images in the split that `zero_shot` was made for.
            pixels: The images, uint8 `[B, 3, H, W]`.
            codes: Their codes, `[B, N, D, h, w]` int64.
        """
        codes, images = codes.to(self.device), normalise(pixels).to(self.device)
        with autocast(self.device, self.precision):
            drawn = to_pixels(tokenizer.decode(codes)).cpu()
            cosine = _semantic_cosine(tokenizer, images, codes)
        found: dict[str, Tensor | None] = {
            name: metric.measure(drawn, pixels) for name, metric in IMAGE_PAIR_METRICS.items()
        }
        found["semantic_cosine"] = cosine
        if self.perceptual is not None:
            found[self.perceptual.metric] = self.perceptual.measure(drawn, pixels, self.device)
        if self.zero_shot is not None:
            found[RANK] = self.zero_shot.code_ranks(rows, tokenizer, codes)
            found[TEACHER_RANK] = self.zero_shot.teacher_ranks(rows, images)
        if self.space is not None:
            found |= {ORIGINAL_FEATURES: self.space.describe(pixels), DRAWN_FEATURES: self.space.describe(drawn)}
        return Reconstructions(drawn, {name: value for name, value in found.items() if value is not None})


def _semantic_cosine(tokenizer: ImageTokenizer, images: Tensor, codes: Tensor) -> Tensor | None:
    """Return the cosine of the decoded and the teacher's features, `[B]`; None without a semantic branch."""
    target = tokenizer.target_features(images)
    if target is None:
        return None
    return semantic_cosine(tokenizer.semantic_features(codes), target).cpu()


def held_out_rows(kind: str, split: str, transform: TransformConfig) -> RowMaker:
    """Return the common part of the rows of a tokenizer's reconstructions.

    Args:
        kind: The tokenizer's kind.
        split: The name of the split of the images.
        transform: The transform of the images.
    """
    settings = {"crop": transform.resize, "image_size": transform.image_size, "format": "PNG"}
    return RowMaker(kind, "reconstruction", split, settings)


def reconstruction_rows(
    make: RowMaker, columns: Mapping[str, Tensor], distance: SetDistance | None, classes: ZeroShotClasses | None
) -> list[dict[str, Any]]:
    """Return the metric rows of measured images.

    Args:
        make: The common part from `held_out_rows`.
        columns: The columns of `Reconstructions`, for all images.
        distance: The Fréchet distance of the features; None if there are no features.
        classes: The classes of the ranks; None if there are no ranks.
    """
    means = {**{name: metric.settings for name, metric in IMAGE_PAIR_METRICS.items()}, **_SETTINGS}
    found = [make.mean(name, columns[name].tolist(), **settings) for name, settings in means.items() if name in columns]
    if distance is not None and len(columns[DRAWN_FEATURES]) > 1:  # one image has no spread
        value = frechet_distance(columns[DRAWN_FEATURES], columns[ORIGINAL_FEATURES])
        reference = {"reference": "the held-out images as the tokenizer sees them"}
        found.append(
            make.number(distance.metric, value, len(columns[DRAWN_FEATURES]), **distance.settings, **reference)
        )
    return found + ([] if classes is None else _zero_shot_rows(make, columns, classes))


def _zero_shot_rows(make: RowMaker, columns: Mapping[str, Tensor], classes: ZeroShotClasses) -> list[dict[str, Any]]:
    """Return accuracies by the codes and, as a ceiling, by the teacher's embeddings; none without the former."""
    if RANK not in columns:
        return []
    own = RowMaker(make.model, "zero_shot", make.split, make.settings)
    return [
        rows.share("zero_shot_accuracy", (columns[column] < first).tolist(), f"top{first}", **classes.settings(first))
        for first in (1, 5)
        if first < classes.count
        for rows, column in ((own, RANK), (own.of("teacher", CEILING), TEACHER_RANK))
    ]


def codebook_rows(
    make: RowMaker, codes: Tensor, names: tuple[str, ...], sizes: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Return the metric rows of codebook usage.

    Args:
        make: The common part from `held_out_rows`.
        codes: The codes of all held-out images, `[R, N, D, h, w]` int64.
        names: The names of the books.
        sizes: The number of codes of each book.
    """
    books = book_statistics(codes, names, sizes)
    count, size_of = len(codes), dict(zip(names, sizes, strict=True))
    rule: dict[str, Any] = {"rule": "over the whole held-out split"}
    found = []
    if len(names) > 1:
        least = min(names, key=lambda name: books[name].usage)
        about = rule | {"codebook_size": size_of[least], "book": "the least used"}
        found.append(make.number("codebook_usage", books[least].usage, count, **about))
    found.append(make.number("bits_per_image", code_bits(tuple(codes.shape[1:]), sizes), count))
    for book, (usage, perplexity) in books.items():
        about = rule | {"codebook_size": size_of.get(book.partition(".")[0], sizes[0])}
        found.append(make.number("codebook_usage", usage, count, book, **about))
        found.append(make.number("codebook_perplexity", perplexity, count, book, **about))
    return found
