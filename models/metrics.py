"""What is measured, as functions of tensors. Shape legend: B batch, H W pixels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from models.ranks import sum_over_ranks
from models.torchvision_compat import make_torchvision_importable


class CodebookStatistics(NamedTuple):
    """How a codebook is used."""

    usage: float
    """Fraction of the codes that occur at all."""
    perplexity: float
    """Exponential of the entropy of the code distribution: the number of equally used codes it is worth."""


class Interval(NamedTuple):
    """A proportion and its 95% confidence limits."""

    value: float
    low: float
    high: float


def psnr(pixels: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image pair in dB, over RGB in 0..255.

    Args:
        pixels: uint8 `[B, 3, H, W]`.
        references: uint8, same shape.

    Returns:
        `[B]` float32. The papers report the mean over images, which one image drawn exactly would make infinite; equal
        images therefore count as if one channel of one pixel were wrong by one level (89 dB at 64 px).
    """
    error = (pixels.float() - references.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(255.0**2 / error.clamp_min(1 / pixels[0].numel()))


def ssim(pixels: Tensor, references: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Structural similarity of each image pair (Wang et al. 2004; Gaussian window of 11, sigma 1.5).

    Args:
        pixels: uint8 `[B, 3, H, W]`; scaled to [0, 1] here.
        references: uint8, same shape.
        data_range: 1.0 is right for [0, 1]; LlamaGen and TokenFlow report with 2.0, which inflates the value.

    Returns:
        `[B]` float32.
    """
    make_torchvision_importable()
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(
        pixels.float() / 255, references.float() / 255, data_range=data_range, reduction="none"
    )
    assert isinstance(values, Tensor), "one value an image with reduction='none'"
    return values.flatten()


def codebook_statistics(codes: Tensor, codebook_size: int) -> CodebookStatistics:
    """Usage and perplexity of integer codes of any shape; in a run of several processes, of the codes of all ranks."""
    counts = sum_over_ranks(torch.bincount(codes.flatten(), minlength=codebook_size).double())
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * shares.log()).sum()
    return CodebookStatistics(float((counts > 0).double().mean()), float(entropy.exp()))


def book_statistics(
    codes: Tensor, names: tuple[str, ...], codebook_sizes: tuple[int, ...]
) -> dict[str, CodebookStatistics]:
    """Usage and perplexity of each book, and of each of its depths where it has several.

    Args:
        codes: `[B, N, D, h, w]` int64.
        names: of the books.
        codebook_sizes: of the books.

    Returns:
        By `""` for an only book, else by `_NAME`; the depths by `_NAME_depth1` and so on.
    """
    found = {}
    for number, (name, size) in enumerate(zip(names, codebook_sizes, strict=True)):
        label = f"_{name}" if len(names) > 1 else ""
        found[label] = codebook_statistics(codes[:, number], size)
        depths = codes.shape[2]
        for depth in range(depths if depths > 1 else 0):
            found[f"{label}_depth{depth + 1}"] = codebook_statistics(codes[:, number, depth], size)
    return found


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> Interval:
    """A proportion with Wilson's score interval (1927), which stays honest near 0 and 1 and for few trials.

    Raises:
        ValueError: no trials.
    """
    if trials <= 0:
        raise ValueError("a proportion needs at least one trial")
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def mean_interval(values: Tensor, z: float = 1.959964) -> Interval:
    """Mean of `[B]` values with a normal 95% interval."""
    mean = float(values.double().mean())
    half = z * float(values.double().std(unbiased=True)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Interval(mean, mean - half, mean + half)
