"""One image transform for training, tokenization and evaluation; it is part of the tokenizer's artifact."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from models.config import Config


class TransformConfig(Config):
    """How a stored image becomes a square tensor."""

    image_size: int = 256
    """Side of the square that the tokenizer sees, pixels."""
    resize: Literal["shortest_crop", "squash", "pad"] = "shortest_crop"
    """`shortest_crop`: shortest side to `image_size`, then the centre; `squash`: ignore the aspect ratio; `pad`: the
    longest side to `image_size`, the rest white."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour under transparent pixels and of padding, RGB 0..255."""


def load_image(data: bytes, config: TransformConfig) -> Image.Image:
    """Decode and shape one image.

    Args:
        data: an encoded image in any format that Pillow reads.
        config: target size and resize mode.

    Returns:
        RGB image of `image_size` x `image_size` pixels, EXIF orientation applied, transparency flattened.

    Raises:
        OSError: the bytes are not an image, are damaged or cut off, or decode to more pixels than Pillow allows.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return shape_image(opened, config)
    except OSError:
        raise
    except Exception as error:  # on damaged bytes Pillow also raises SyntaxError, ValueError, RuntimeError, ...
        raise OSError(f"cannot decode the image: {error}") from error


def shape_image(opened: Image.Image, config: TransformConfig) -> Image.Image:
    """`load_image` for an image that is open already."""
    upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I"):
        upright = _eight_bit(upright)
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


def _eight_bit(image: Image.Image) -> Image.Image:
    """A 16-bit grey image scaled to 8 bits; Pillow's own conversion clips instead, which makes most of them white."""
    return Image.fromarray((np.asarray(image).clip(0, 65_535) / 257).round().astype(np.uint8))


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Stack equal-sized RGB images into uint8 `[B, 3, H, W]`."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def normalise(pixels: Tensor) -> Tensor:
    """uint8 0..255 `[B, 3, H, W]` to float32 in [-1, 1], the range of every model here."""
    return pixels.float() / 127.5 - 1.0


def to_pixels(images: Tensor) -> Tensor:
    """float `[B, 3, H, W]` in [-1, 1] to uint8 0..255, rounded and clamped."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """uint8 `[B, 3, H, W]` to a list of B RGB images."""
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]
