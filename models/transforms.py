"""One image transform for training, tokenization and evaluation; it is part of the tokenizer's artifact."""

from __future__ import annotations

import io
import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from models.config import Config, Fraction

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What is decoded. Of the others that Pillow knows some run programs on what strangers wrote (EPS: Ghostscript)."""


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


def load_image(data: bytes, config: TransformConfig) -> Image.Image:
    """Decode and shape one image.

    Args:
        data: an encoded image in one of `IMAGE_FORMATS`.
        config: target size and resize mode.

    Returns:
        RGB image of `image_size` x `image_size` pixels, EXIF orientation applied, transparency flattened.

    Raises:
        OSError: the bytes are not an image, are damaged or cut off, or decode to more pixels than Pillow allows.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as opened:
            return shape_image(opened, config)
    except OSError:
        raise
    except Exception as error:  # on damaged bytes Pillow also raises SyntaxError, ValueError, RuntimeError, ...
        raise OSError(f"cannot decode the image: {error}") from error


def shape_image(opened: Image.Image, config: TransformConfig) -> Image.Image:
    """`load_image` for an image that is open already."""
    upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I"):
        upright = eight_bit(upright)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        flat = Image.new("RGBA", rgba.size, (*config.background, 255))
        image = Image.alpha_composite(flat, rgba).convert("RGB")
    else:
        image = upright.convert("RGB")
    size = (config.image_size, config.image_size)
    if image.size == size:
        return image
    if config.resize == "squash":
        return image.resize(size, Image.Resampling.BICUBIC)
    if config.resize == "pad":
        return ImageOps.pad(image, size, Image.Resampling.BICUBIC, color=config.background)
    return ImageOps.fit(image, size, Image.Resampling.BICUBIC)


def eight_bit(image: Image.Image) -> Image.Image:
    """A 16-bit grey image scaled to 8 bits; Pillow's own conversion clips instead, which makes most of them white."""
    return Image.fromarray((np.asarray(image).clip(0, 65_535) / 257).round().astype(np.uint8))


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
