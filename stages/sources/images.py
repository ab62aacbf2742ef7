"""Which files are images, by name; what they really are is found out by decoding."""

from __future__ import annotations

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm"})


def is_image_name(name: str) -> bool:
    """Whether a file name or an extension is one of an image."""
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES
