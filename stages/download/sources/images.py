"""Which files are images, by name; what they really are is found out by decoding."""

from __future__ import annotations

IMAGE_SUFFIXES = frozenset(
    {
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff"),
        *("avif", "avifs", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "jpeg2000", "ppm", "pgm", "pbm", "pnm", "pfm"),
        *("heic", "heif", "jxl"),
    }
)
"""Those of `IMAGE_FORMATS`, also `mpo` and `jpeg2000` in shards that older versions wrote, and of formats that are not
read: their rows say so, where passing over them in silence would lose pairs."""


def is_image_name(name: str) -> bool:
    """Whether a file name or an extension is one of an image."""
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES
