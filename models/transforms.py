"""One image transform for training, tokenization and evaluation; it is part of the tokenizer's artifact."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from models.config import Config, Fraction
from models.images import Limits, decode_image


class TransformConfig(Config):
    """How a stored image becomes a square tensor."""

    image_size: PositiveInt = 256
    """Side of the square that the tokenizer sees, pixels."""
    resize: Literal["shortest_crop", "squash", "pad"] = "shortest_crop"
    """`shortest_crop`: shortest side to `image_size`, then the centre; `squash`: ignore the aspect ratio; `pad`: the
    longest side to `image_size`, the rest white."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour under transparent pixels and of padding, RGB 0..255."""


class ViewsConfig(Config):
    """Random views of an image: moved, zoomed, turned, stretched and mirrored a little."""

    count: NonNegativeInt = 0
    """Views of each training image beside the image itself."""
    flip: bool = True
    """Mirror half of the views."""
    zoom: tuple[PositiveFloat, PositiveFloat] = (0.8, 1.1)
    """Smallest and largest size of the content, 1 being its own."""
    shift: Fraction = 0.1
    """Most that the content moves to each side, as a part of the image's side."""
    rotation: NonNegativeFloat = 9.0
    """Most that the content turns, degrees."""
    stretch: NonNegativeFloat = 0.1
    """Deviation of the logarithm of width over height."""


def load_image(data: bytes, config: TransformConfig, limits: Limits | None = None) -> Image.Image:
    """Decode and shape one image.

    Args:
        data: an encoded image in one of `IMAGE_FORMATS`.
        config: target size and resize mode.
        limits: what it may cost; none but Pillow's own where they are not given.

    Returns:
        RGB image of `image_size` x `image_size` pixels as a browser shows it: sRGB, upright, transparency flattened.

    Raises:
        UnusableImage: the bytes are too many, no image in a format that is read, or damaged; an OSError.
    """
    return shape_image(decode_image(data, limits, config.background).rgb, config)


def shape_image(image: Image.Image, config: TransformConfig) -> Image.Image:
    """An RGB image of any size as the square."""
    size = (config.image_size, config.image_size)
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
