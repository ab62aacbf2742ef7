"""What the bytes of an image say of it, found by decoding it: strangers made them, and some bring a decoder down."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from models.transforms import IMAGE_FORMATS, TransformConfig, load_image
from stages.child_process import TRIES, ChildDied, ChildProcess
from stages.filters import perceptual_hash
from stages.sources.source import NOT_AN_IMAGE, TOO_LARGE, TOO_MANY_PIXELS, UNDECODABLE, Failure

logger = logging.getLogger(__name__)

DIED = "the process that decoded it died of it"
_LONGEST_REASON = 200


@dataclass(frozen=True)
class Limits:
    """What an image may cost."""

    max_bytes: int
    max_pixels: int


@dataclass(frozen=True)
class ImageFacts:
    """Of a good image."""

    width: int
    height: int
    extension: str
    """`jpg`, `png`, ..."""
    perceptual_hash: str | None
    """None where it was not asked for."""


Inspect = Callable[[bytes], ImageFacts | Failure]


@dataclass(frozen=True)
class Inspector:
    """Called with an image's bytes, decodes it to its last row."""

    limits: Limits
    hashed: bool
    """Whether the perceptual hash is wanted."""

    def __call__(self, data: bytes) -> ImageFacts | Failure:
        failure = _too_costly(data, self.limits)
        if failure is not None:
            return failure
        try:
            load_image(data, TransformConfig(image_size=8))  # it turns whatever Pillow raises into OSError
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                extension = (image.format or "").lower()
                hashed = perceptual_hash(image) if self.hashed else None
                return ImageFacts(image.width, image.height, {"jpeg": "jpg"}.get(extension, extension), hashed)
        except OSError as error:
            return Failure(UNDECODABLE, f"{type(error).__name__}: {error}"[:_LONGEST_REASON])


@contextmanager
def apart(factory: Callable[[], Inspect]) -> Iterator[Inspect]:
    """The same in a child process; an image that brings it down again and again is undecodable.

    Args:
        factory: picklable; makes the inspector in the child.
    """
    with ChildProcess(factory) as child:

        def inspect(data: bytes) -> ImageFacts | Failure:
            for _ in range(TRIES):
                try:
                    found: ImageFacts | Failure = child(data)
                    return found
                except ChildDied as error:
                    logger.warning("an image of %d bytes was decoded: %s", len(data), error)
            return Failure(UNDECODABLE, DIED)

        yield inspect


def _too_costly(data: bytes, limits: Limits) -> Failure | None:
    """What is wrong with the bytes before they are decoded: the header alone says how much memory that would take."""
    if len(data) > limits.max_bytes:
        return Failure(TOO_LARGE, f"more than {limits.max_bytes} bytes")
    too_many = Failure(TOO_MANY_PIXELS, f"more than {limits.max_pixels} pixels")
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            return too_many if image.width * image.height > limits.max_pixels else None
    except Image.DecompressionBombError:
        return too_many
    except UnidentifiedImageError:
        start = data[:512].lstrip().lower()
        if not data:
            return Failure(NOT_AN_IMAGE, "empty")
        page = start.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg", b"<head"))
        return Failure(NOT_AN_IMAGE, "a web page or XML" if page else f"none of {', '.join(IMAGE_FORMATS)}")
    except Exception as error:  # on damaged headers Pillow also raises SyntaxError, ValueError, struct.error, ...
        return Failure(UNDECODABLE, f"{type(error).__name__}: {error}"[:_LONGEST_REASON])
