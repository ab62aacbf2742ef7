"""The image transform of training, tokenization and evaluation; it is stored with the tokenizer's artifact."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from models.config import Config, Fraction, InOrder, PositiveFraction
from models.images import Limits, decode_image

_Level = Annotated[int, Field(ge=0, le=255)]
_Zoom = Annotated[float, Field(ge=0.01, le=100)]


class TransformConfig(Config):
    """How an image is turned into the square that the tokenizer sees."""

    image_size: PositiveInt = 256
    """Side of the square in pixels."""
    resize: Literal["shortest_crop", "squash", "pad"] = "shortest_crop"
    """`shortest_crop`: resize the shortest side to `image_size` and crop the centre; `squash`: ignore the aspect ratio;
    `pad`: resize the longest side to `image_size` and fill the rest with `background`."""
    background: tuple[_Level, _Level, _Level] = (255, 255, 255)
    """Colour of padding and under transparent pixels, RGB 0..255."""


class CropConfig(Config):
    """Random crops of training images; evaluation and tokenization always use the deterministic transform."""

    kind: Literal["none", "square", "area"] = "none"
    """`none`: training images are transformed as in evaluation; `square`: a square at a random position whose side is a
    random fraction of the shortest side (LlamaGen); `area`: a random fraction of the area with a random aspect ratio,
    squashed to the square (torchvision's RandomResizedCrop, as in DualToken's released code)."""
    smallest: PositiveFraction = 0.8
    """Smallest fraction of the side or of the area."""
    largest: PositiveFraction = 1.0
    """Largest fraction of the side or of the area."""

    @model_validator(mode="after")
    def _ordered(self) -> CropConfig:
        if self.smallest > self.largest:
            raise ValueError(f"smallest={self.smallest} is larger than largest={self.largest}; exchange them")
        return self


@dataclass(frozen=True)
class RandomCrop:
    """One random crop, determined by its seed."""

    config: CropConfig
    seed: int

    def box(self, width: int, height: int, image_size: int) -> tuple[float, float, float, float]:
        """Return the part of an image that is kept: left, top, right and bottom in pixels.

        Args:
            width: width of the image in pixels.
            height: height of the image in pixels.
            image_size: side of the square that it is resized to; `square` samples among the integer sizes to which the
                shortest side may be resized.
        """
        numbers = random.Random(self.seed)
        if self.config.kind == "square":
            sizes = [math.ceil(image_size / part) for part in (self.config.largest, self.config.smallest)]
            side = min(width, height) * image_size / numbers.randint(*sizes)
            return _at(side, side, width, height, numbers)
        for _ in range(10):  # torchvision tries as often
            area = width * height * numbers.uniform(self.config.smallest, self.config.largest)
            ratio = math.exp(numbers.uniform(-_LOG_ASPECT, _LOG_ASPECT))
            kept = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if kept[0] <= width and kept[1] <= height:
                return _at(*kept, width, height, numbers)
        # no shape of that size fits: take the centre, in the allowed shape that is nearest to the image's own
        kept = min(width, height * _ASPECT), min(height, width * _ASPECT)
        left, top = (width - kept[0]) / 2, (height - kept[1]) / 2
        return left, top, left + kept[0], top + kept[1]


_ASPECT = 4 / 3
"""Largest ratio of width to height of a crop of kind `area`; the smallest is its inverse."""
_LOG_ASPECT = math.log(_ASPECT)


def _at(
    kept_width: float, kept_height: float, width: int, height: int, numbers: random.Random
) -> tuple[float, float, float, float]:
    """Return a box of that size at a random position within an image."""
    left, top = numbers.uniform(0, width - kept_width), numbers.uniform(0, height - kept_height)
    return left, top, min(left + kept_width, width), min(top + kept_height, height)


class ViewsConfig(Config):
    """Augmented views of an image: random shifts, zooms, rotations, stretches and mirroring."""

    count: NonNegativeInt = 0
    """Number of views of each training image in addition to the image itself."""
    flip: bool = True
    """Whether half of the views are mirrored."""
    zoom: Annotated[tuple[_Zoom, _Zoom], InOrder] = (0.8, 1.1)
    """Smallest and largest scale of the content; 1 is its original size."""
    shift: Fraction = 0.1
    """Largest shift of the content in each direction, as a fraction of the image's side."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 9.0
    """Largest rotation of the content in each direction, in degrees."""
    stretch: Fraction = 0.1
    """Standard deviation of the logarithm of width over height."""


def load_image(
    data: bytes, config: TransformConfig, limits: Limits | None = None, crop: RandomCrop | None = None
) -> Image.Image:
    """Decode one image and transform it to the square.

    Args:
        data: an encoded image in one of `IMAGE_FORMATS`.
        config: target size and resize mode.
        limits: limits on its size; by default only Pillow's own limit on pixels applies.
        crop: a random crop, used instead of the resize mode.

    Returns:
        RGB image of `image_size` x `image_size` pixels, as a browser shows it: sRGB, upright, transparency flattened.

    Raises:
        UnusableImage: the data is too large, no image, in an unsupported format, or damaged; an OSError.
    """
    return shape_image(decode_image(data, limits, config.background).rgb, config, crop)


def shape_image(image: Image.Image, config: TransformConfig, crop: RandomCrop | None = None) -> Image.Image:
    """Transform an RGB image of any size to the square."""
    size = (config.image_size, config.image_size)
    if crop is not None:
        return image.resize(size, Image.Resampling.BICUBIC, box=crop.box(*image.size, config.image_size))
    if image.size == size:
        return image
    if config.resize == "squash":
        return image.resize(size, Image.Resampling.BICUBIC)
    if config.resize == "pad":
        return ImageOps.pad(image, size, Image.Resampling.BICUBIC, color=config.background)
    return ImageOps.fit(image, size, Image.Resampling.BICUBIC)


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Stack equal-sized RGB images into uint8 `[B, 3, H, W]`."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def random_view(image: Tensor, config: ViewsConfig, generator: torch.Generator) -> Tensor:
    """Return an augmented view of an image; outside the image its border pixels are repeated.

    Args:
        image: float `[3, H, W]` in [-1, 1], on the CPU or a GPU.
        config: the ranges of the view.
        generator: random generator on the CPU, which determines the view.

    Returns:
        float `[3, H, W]` in [-1, 1].
    """
    mirror, zoom, angle, right, down = torch.rand(5, generator=generator).tolist()
    stretch = math.exp(config.stretch * float(torch.randn((), generator=generator)))
    scale = 1 / (config.zoom[0] + zoom * (config.zoom[1] - config.zoom[0]))  # of the sampling window
    sign = -1.0 if config.flip and mirror < 0.5 else 1.0
    radians = math.radians(config.rotation * (2 * angle - 1))
    cosine, sine = scale * math.cos(radians), scale * math.sin(radians)
    # positions run from -1 to 1, so a shift by a fraction of the side counts twice
    window = [
        [sign * cosine * stretch, -sine, 2 * config.shift * (2 * right - 1)],
        [sign * sine, cosine / stretch, 2 * config.shift * (2 * down - 1)],
    ]
    grid = F.affine_grid(image.new_tensor([window]), [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, "bicubic", "border", align_corners=False)[0].clamp(-1, 1)


def normalise(pixels: Tensor) -> Tensor:
    """Convert uint8 0..255 `[B, 3, H, W]` to float32 in [-1, 1], the input range of every model of this package."""
    return pixels.float() / 127.5 - 1.0


def to_pixels(images: Tensor) -> Tensor:
    """Convert float `[B, 3, H, W]` in [-1, 1] to uint8 0..255, rounded and clamped."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Convert uint8 `[B, 3, H, W]` to a list of B RGB images."""
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]
