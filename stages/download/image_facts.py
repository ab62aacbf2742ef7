"""What the bytes of an image say of it, found by decoding it: strangers made them, and some bring a decoder down."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from models.images import Limits, UnusableImage, decode_image
from stages.artifacts.rows import UNDECODABLE
from stages.download.filters import perceptual_hash
from stages.download.sources.source import Failure
from stages.runtime.child_process import TRIES, ChildDied, ChildProcess

logger = logging.getLogger(__name__)

DIED = "the process that decoded it died of it"


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
        try:
            image = decode_image(data, self.limits)
        except UnusableImage as error:
            return Failure(error.kind, error.reason)
        hashed = perceptual_hash(image.rgb) if self.hashed else None
        return ImageFacts(image.width, image.height, image.extension, hashed)


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
