"""Recognition of image files by their names; decoding finds out what they really are."""

from __future__ import annotations

IMAGE_SUFFIXES = frozenset(
    {
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff"),
        *("avif", "avifs", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "jpeg2000", "ppm", "pgm", "pbm", "pnm", "pfm"),
        *("heic", "heif", "jxl"),
    }
)
"""Suffixes of `IMAGE_FORMATS`, of `mpo` and `jpeg2000` in shards of older versions, and of unsupported formats, whose
rows get a status that says so, while ignoring the files would lose pairs silently."""


def is_image_name(name: str) -> bool:
    """Return whether a file name, or an extension, is that of an image."""
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES
