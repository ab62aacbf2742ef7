"""Image, codebook and proportion metrics as functions of tensors. Shape legend: B batch, H W pixels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from models.ranks import sum_over_ranks


class CodebookStatistics(NamedTuple):
    """Usage statistics of a codebook."""

    usage: float
    """Fraction of the codes that occur at least once."""
    perplexity: float
    """Exponential of the entropy of the code distribution: the number of equally frequent codes with that entropy."""


class Interval(NamedTuple):
    """A value, such as a proportion or a mean, and its 95% confidence limits."""

    value: float
    low: float
    high: float


def psnr(pixels: Tensor, references: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each image pair in dB, over RGB in 0..255.

    Args:
        pixels: uint8 `[B, 3, H, W]`.
        references: uint8, same shape.

    Returns:
        `[B]` float32. The papers report the mean over images, which a single perfect reconstruction would make
        infinite, so equal images count as if one channel of one pixel were wrong by one level (89 dB at 64 px).
    """
    error = (pixels.float() - references.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(255.0**2 / error.clamp_min(1 / pixels[0].numel()))


class SsimRule(NamedTuple):
    """One of the variants of SSIM that published numbers come from, each of which is a call of scikit-image's function.

    Windows that extend over the border are left out, as in Wang et al. 2004 and in scikit-image.
    """

    window: Literal["gaussian", "uniform"]
    """`gaussian`: sigma 1.5, 11 pixels (Wang et al. 2004); `uniform`: all pixels of the window have the same weight."""
    size: int
    """Side of the window in pixels."""
    data_range: float
    """Assumed range of values, which sets the two stabilising constants; the images are in [0, 1]."""
    sample_covariance: bool
    """Whether variances divide by N - 1 instead of N."""

    def line(self) -> list[float]:
        """Return the weights of the window along one axis; they sum to 1."""
        half = self.size // 2
        raw = [1.0 if self.window == "uniform" else math.exp(-((at - half) ** 2) / 4.5) for at in range(self.size)]
        return [weight / sum(raw) for weight in raw]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that should be reported with the number."""
        window = "11x11 Gaussian, sigma 1.5" if self.window == "gaussian" else f"{self.size}x{self.size} uniform"
        return {
            "window": window,
            "border": f"left out: windows inside the image alone, {self.size // 2} pixels from its edge",
            "data_range": self.data_range,
            "covariance": "sample (N - 1)" if self.sample_covariance else "population (N)",
            "channels": "mean over RGB",
        }


SSIM_WANG = SsimRule("gaussian", 11, 1.0, sample_covariance=False)
"""Wang et al. 2004, and scikit-image with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`."""
SSIM_LLAMAGEN = SsimRule("uniform", 7, 2.0, sample_covariance=True)
"""What LlamaGen's and TokenFlow's scripts report: scikit-image's defaults, but with the range of [-1, 1] on images in
[0, 1], which inflates the number."""


def _windowed(values: Tensor, line: list[float]) -> Tensor:
    """Average `[B, 3, H, W]` with weights `line` along both axes; `[B, 3, H - len(line) + 1, W - len(line) + 1]`."""
    for axis in (2, 3):
        length = values.shape[axis] - len(line) + 1
        total = line[0] * values.narrow(axis, 0, length)
        for start, weight in enumerate(line[1:], 1):
            total.add_(values.narrow(axis, start, length), alpha=weight)
        values = total
    return values


def ssim(pixels: Tensor, references: Tensor, rule: SsimRule = SSIM_WANG) -> Tensor:
    """Compute the structural similarity of each image pair (Wang et al. 2004, equation 13), mean over windows and RGB.

    Args:
        pixels: uint8 `[B, 3, H, W]`; scaled to [0, 1] here.
        references: uint8, same shape.
        rule: the window, the range and the kind of variance.

    Returns:
        `[B]` float32, equal to scikit-image's values.

    Raises:
        ValueError: the images are smaller than the window.
    """
    if min(pixels.shape[-2:]) < rule.size:
        height, width = pixels.shape[-2:]
        raise ValueError(f"SSIM's window of {rule.size} pixels does not fit into images of {height} x {width} pixels")
    # float64, because a variance is the small difference of two means of squares
    x, y = pixels.double() / 255, references.double() / 255
    windowed = functools.partial(_windowed, line=rule.line())
    mean_x, mean_y = windowed(x), windowed(y)
    unbiased = rule.size**2 / (rule.size**2 - 1) if rule.sample_covariance else 1.0
    var_x = unbiased * (windowed(x * x) - mean_x.square())
    var_y = unbiased * (windowed(y * y) - mean_y.square())
    covariance = unbiased * (windowed(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * rule.data_range) ** 2, (0.03 * rule.data_range) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similar / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))).mean((1, 2, 3)).float()


class ImagePairMetric(NamedTuple):
    """A metric of each pair of a reconstruction and its original."""

    measure: Callable[[Tensor, Tensor], Tensor]
    """Two uint8 `[B, 3, H, W]` -> `[B]`."""
    settings: dict[str, Any]
    """What should be reported with the metric."""


IMAGE_PAIR_METRICS: Mapping[str, ImagePairMetric] = {
    "psnr": ImagePairMetric(psnr, {"rule": "mean of per-image dB"}),
    "ssim": ImagePairMetric(ssim, SSIM_WANG.settings),
    "ssim_llamagen": ImagePairMetric(
        functools.partial(ssim, rule=SSIM_LLAMAGEN),
        SSIM_LLAMAGEN.settings | {"rule": "LlamaGen's and TokenFlow's; their range inflates it"},
    ),
}
"""Metrics that need nothing but the two images, by name; each is measured for every held-out image."""


def codebook_statistics(codes: Tensor, codebook_size: int) -> CodebookStatistics:
    """Compute usage and perplexity of integer codes of any shape; with several ranks, of the codes of all ranks."""
    return statistics_of_counts(sum_over_ranks(torch.bincount(codes.flatten(), minlength=codebook_size).double()))


def statistics_of_counts(counts: Tensor) -> CodebookStatistics:
    """Compute usage and perplexity from the number of times that each code occurs, `[K]`; both are 0 if none does."""
    if not counts.any():
        return CodebookStatistics(0.0, 0.0)
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * shares.log()).sum()
    return CodebookStatistics(float((counts > 0).double().mean()), float(entropy.exp()))


def book_statistics(
    codes: Tensor, names: tuple[str, ...], codebook_sizes: tuple[int, ...]
) -> dict[str, CodebookStatistics]:
    """Compute usage and perplexity of each book, and of each of its depths if it has several.

    Args:
        codes: `[B, N, D, h, w]` int64.
        names: the names of the books.
        codebook_sizes: the number of codes of each book.

    Returns:
        Statistics by `""` for a single book, else by its name; those of depths by `NAME.depth1` and so on, or by
        `depth1` for a single book.
    """
    found = {}
    for number, (name, size) in enumerate(zip(names, codebook_sizes, strict=True)):
        label = name if len(names) > 1 else ""
        found[label] = codebook_statistics(codes[:, number], size)
        depths = codes.shape[2]
        for depth in range(depths if depths > 1 else 0):
            found[f"{label}.depth{depth + 1}".removeprefix(".")] = codebook_statistics(codes[:, number, depth], size)
    return found


def code_bits(code_shape: tuple[int, ...], codebook_sizes: tuple[int, ...]) -> float:
    """Return the most information that the codes of one image can hold, in bits: the sum of log2 of the codebook sizes.

    Args:
        code_shape: `(N, D, h, w)`.
        codebook_sizes: the number of codes of each of the N books.
    """
    return math.prod(code_shape[1:]) * sum(math.log2(size) for size in codebook_sizes)


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> Interval:
    """Return a proportion with Wilson's score interval (1927), which is accurate near 0 and 1 and for few trials.

    Raises:
        ValueError: there are no trials.
    """
    if trials <= 0:
        raise ValueError("a proportion needs at least one trial")
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def mean_interval(values: Tensor, z: float = 1.959964) -> Interval:
    """Return the mean of `[B]` values with its 95% interval under a normal approximation."""
    mean = float(values.double().mean())
    half = z * float(values.double().std(unbiased=True)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Interval(mean, mean - half, mean + half)
