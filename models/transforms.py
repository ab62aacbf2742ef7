"""One image transform for training, tokenization and evaluation; it is part of the tokenizer's artifact."""

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
    """How a stored image becomes a square tensor."""

    image_size: PositiveInt = 256
    """Side of the square that the tokenizer sees, pixels."""
    resize: Literal["shortest_crop", "squash", "pad"] = "shortest_crop"
    """`shortest_crop`: shortest side to `image_size`, then the centre; `squash`: ignore the aspect ratio; `pad`: the
    longest side to `image_size`, the rest white."""
    background: tuple[_Level, _Level, _Level] = (255, 255, 255)
    """Colour under transparent pixels and of padding, RGB 0..255."""


class CropConfig(Config):
    """Random crops of training images; evaluation and tokenizing always see the whole centre."""

    kind: Literal["none", "square", "area"] = "none"
    """`none`: training images are shaped as everywhere else; `square`: a square anywhere in the image whose side is a
    random part of the shortest one (LlamaGen); `area`: a random part of the area with a random aspect ratio, squashed
    to the square (torchvision's RandomResizedCrop, as in DualToken's released code)."""
    smallest: PositiveFraction = 0.8
    """Least part of the side or of the area."""
    largest: PositiveFraction = 1.0
    """Greatest part."""

    @model_validator(mode="after")
    def _ordered(self) -> CropConfig:
        if self.smallest > self.largest:
            raise ValueError(f"smallest={self.smallest} is larger than largest={self.largest}; exchange them")
        return self


@dataclass(frozen=True)
class RandomCrop:
    """One random crop; the same seed makes the same crop."""

    config: CropConfig
    seed: int

    def box(self, width: int, height: int, image_size: int) -> tuple[float, float, float, float]:
        """What is kept of an image of `width` x `height` pixels: left, top, right, bottom.

        Args:
            width: of the image, pixels.
            height: of the image, pixels.
            image_size: side of the square that it becomes; `square` draws among the whole sizes that its shortest side
                may be resized to.
        """
        numbers = random.Random(self.seed)
        if self.config.kind == "square":
            sizes = [math.ceil(image_size / part) for part in (self.config.largest, self.config.smallest)]
            side = min(width, height) * image_size / numbers.randint(*sizes)
            return _at(side, side, width, height, numbers)
        for _ in range(10):  # as often as torchvision tries
            area = width * height * numbers.uniform(self.config.smallest, self.config.largest)
            ratio = math.exp(numbers.uniform(-_LOG_ASPECT, _LOG_ASPECT))
            kept = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if kept[0] <= width and kept[1] <= height:
                return _at(*kept, width, height, numbers)
        # no shape of that size fits: the middle, in the allowed shape that is nearest to the image's own
        kept = min(width, height * _ASPECT), min(height, width * _ASPECT)
        left, top = (width - kept[0]) / 2, (height - kept[1]) / 2
        return left, top, left + kept[0], top + kept[1]


_ASPECT = 4 / 3
"""Widest shape of a crop of kind `area`; the tallest is its inverse."""
_LOG_ASPECT = math.log(_ASPECT)


def _at(
    kept_width: float, kept_height: float, width: int, height: int, numbers: random.Random
) -> tuple[float, float, float, float]:
    """A box of that size at a random place within an image."""
    left, top = numbers.uniform(0, width - kept_width), numbers.uniform(0, height - kept_height)
    return left, top, min(left + kept_width, width), min(top + kept_height, height)


class ViewsConfig(Config):
    """Random views of an image: moved, zoomed, turned, stretched and mirrored a little."""

    count: NonNegativeInt = 0
    """Views of each training image beside the image itself."""
    flip: bool = True
    """Mirror half of the views."""
    zoom: Annotated[tuple[_Zoom, _Zoom], InOrder] = (0.8, 1.1)
    """Smallest and largest size of the content, 1 being its own."""
    shift: Fraction = 0.1
    """Most that the content moves to each side, as a part of the image's side."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 9.0
    """Most that the content turns, degrees."""
    stretch: Fraction = 0.1
    """Deviation of the logarithm of width over height."""


def load_image(
    data: bytes, config: TransformConfig, limits: Limits | None = None, crop: RandomCrop | None = None
) -> Image.Image:
    """Decode and shape one image.

    Args:
        data: an encoded image in one of `IMAGE_FORMATS`.
        config: target size and resize mode.
        limits: what it may cost; none but Pillow's own where they are not given.
        crop: taken in place of the resize mode.

    Returns:
        RGB image of `image_size` x `image_size` pixels as a browser shows it: sRGB, upright, transparency flattened.

    Raises:
        UnusableImage: the bytes are too many, no image in a format that is read, or damaged; an OSError.
    """
    return shape_image(decode_image(data, limits, config.background).rgb, config, crop)


def shape_image(image: Image.Image, config: TransformConfig, crop: RandomCrop | None = None) -> Image.Image:
    """An RGB image of any size as the square."""
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
    """One view of an image; what lies outside it repeats its border.

    Args:
        image: float `[3, H, W]` in [-1, 1], on the CPU or a GPU.
        config: limits of the view.
        generator: on the CPU; decides the view.

    Returns:
        float `[3, H, W]` in [-1, 1].
    """
    mirror, zoom, angle, right, down = torch.rand(5, generator=generator).tolist()
    stretch = math.exp(config.stretch * float(torch.randn((), generator=generator)))
    scale = 1 / (config.zoom[0] + zoom * (config.zoom[1] - config.zoom[0]))  # of the window that is looked through
    sign = -1.0 if config.flip and mirror < 0.5 else 1.0
    radians = math.radians(config.rotation * (2 * angle - 1))
    cosine, sine = scale * math.cos(radians), scale * math.sin(radians)
    # positions run from -1 to 1, so a shift by a part of the side counts twice
    window = [
        [sign * cosine * stretch, -sine, 2 * config.shift * (2 * right - 1)],
        [sign * sine, cosine / stretch, 2 * config.shift * (2 * down - 1)],
    ]
    grid = F.affine_grid(image.new_tensor([window]), [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, "bicubic", "border", align_corners=False)[0].clamp(-1, 1)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 0..255 `[B, 3, H, W]` to float32 in [-1, 1], the range of every model here."""
    return pixels.float() / 127.5 - 1.0


def to_pixels(images: Tensor) -> Tensor:
    """float `[B, 3, H, W]` in [-1, 1] to uint8 0..255, rounded and clamped."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """uint8 `[B, 3, H, W]` to a list of B RGB images."""
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]
