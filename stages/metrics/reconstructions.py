"""What a tokenizer's codes of held-out images measure, for its training and for evaluation alike.

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
"""Columns that end in a Fréchet distance."""
RANK, TEACHER_RANK = "class_rank", "teacher_class_rank"
"""Columns of how many classes lie nearer to an image than its own, by its codes and by the teacher."""
_MEANS: Mapping[str, dict[str, Any]] = {
    **{name: metric.settings for name, metric in IMAGE_PAIR_METRICS.items()},
    "lpips": {"library": "lpips", "network": "VGG16, v0.1", "input": "[-1, 1]"},
    "perceptual": {"rule": "distance of backbone features; a stand-in for LPIPS that does not compare with it"},
    "semantic_cosine": {"rule": "decoded from codes against the teacher's features"},
}
"""Metrics that are means over the images, and what belongs beside each."""


class Reconstructions(NamedTuple):
    """What codes draw, and what is measured of it."""

    drawn: Tensor
    """uint8 `[B, 3, H, W]` on the CPU."""
    columns: dict[str, Tensor]
    """For each image a number, `[B]`, or its features, `[B, F]`; on the CPU. Those that the tokenizer or the teacher
    cannot give are left out."""


@dataclass(frozen=True)
class ReconstructionMeasures:
    """What is measured with."""

    perceptual: Perceptual | None
    space: FeatureSpace | None
    """Where sets of images are compared; None where there is neither a teacher nor Inception."""
    zero_shot: ZeroShot | None
    """None without a teacher that has a text tower."""
    device: torch.device
    """Where tokenizer and teacher are."""
    precision: str
    """Autocast type."""

    @property
    def distance(self) -> SetDistance | None:
        """What the features end in."""
        return None if self.space is None else self.space.distance

    @property
    def classes(self) -> ZeroShotClasses | None:
        """What the ranks are among."""
        return None if self.zero_shot is None else self.zero_shot.among

    @torch.no_grad()
    def measure(self, tokenizer: ImageTokenizer, rows: list[int], pixels: Tensor, codes: Tensor) -> Reconstructions:
        """Decode codes, and compare what they draw and say with the images.

        Args:
            tokenizer: in eval mode.
            rows: of the split that `zero_shot` is of.
            pixels: the images, uint8 `[B, 3, H, W]`.
            codes: of them, `[B, N, D, h, w]` int64.
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
    """Cosine of each image's decoded features and the teacher's, `[B]`; None without a semantic branch."""
    target = tokenizer.target_features(images)
    if target is None:
        return None
    return semantic_cosine(tokenizer.semantic_features(codes), target).cpu()


def held_out_rows(kind: str, split: str, transform: TransformConfig) -> RowMaker:
    """What all rows of a tokenizer's reconstructions have in common.

    Args:
        kind: of the tokenizer.
        split: name of the images.
        transform: how they were shaped.
    """
    settings = {"crop": transform.resize, "image_size": transform.image_size, "format": "PNG"}
    return RowMaker(kind, "reconstruction", split, settings)


def reconstruction_rows(
    make: RowMaker, columns: Mapping[str, Tensor], distance: SetDistance | None, classes: ZeroShotClasses | None
) -> list[dict[str, Any]]:
    """The metric rows of measured images.

    Args:
        make: as `held_out_rows` gives it.
        columns: as in `Reconstructions`, of all images.
        distance: that the features end in; None where there are none.
        classes: that the ranks are among; None where there are none.
    """
    found = [make.mean(name, columns[name].tolist(), **note) for name, note in _MEANS.items() if name in columns]
    if distance is not None and len(columns[DRAWN_FEATURES]) > 1:  # one image has no spread
        value = frechet_distance(columns[DRAWN_FEATURES], columns[ORIGINAL_FEATURES])
        reference = {"reference": "the held-out images as the tokenizer sees them"}
        found.append(
            make.number(distance.metric, value, len(columns[DRAWN_FEATURES]), **distance.settings, **reference)
        )
    return found + ([] if classes is None else _zero_shot_rows(make, columns, classes))


def _zero_shot_rows(make: RowMaker, columns: Mapping[str, Tensor], classes: ZeroShotClasses) -> list[dict[str, Any]]:
    """Accuracy by what the codes say and, as the ceiling, by the teacher's own embeddings; none without the former."""
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
    """The metric rows of how codebooks are used.

    Args:
        make: as `held_out_rows` gives it.
        codes: of all held-out images, `[R, N, D, h, w]` int64.
        names: of the books.
        sizes: of the books.
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
