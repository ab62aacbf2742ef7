"""Inspection of untrusted images by decoding them, optionally in a child process, since some crash a decoder."""

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
    """Properties of a successfully decoded image."""

    width: int
    height: int
    extension: str
    """File extension of the image's format: `jpg`, `png`, ..."""
    perceptual_hash: str | None
    """Perceptual hash as hexadecimal digits; None if it was not requested."""


Inspect = Callable[[bytes], ImageFacts | Failure]


@dataclass(frozen=True)
class Inspector:
    """Decodes an image completely from its bytes and returns its properties, or why it is unusable."""

    limits: Limits
    hashed: bool
    """Whether the perceptual hash is computed."""

    def __call__(self, data: bytes) -> ImageFacts | Failure:
        try:
            image = decode_image(data, self.limits)
        except UnusableImage as error:
            return Failure(error.kind, error.reason)
        hashed = perceptual_hash(image.rgb) if self.hashed else None
        return ImageFacts(image.width, image.height, image.extension, hashed)


@contextmanager
def in_child_process(factory: Callable[[], Inspect]) -> Iterator[Inspect]:
    """Run an inspector in a child process; an image that kills the process `TRIES` times is undecodable.

    Args:
        factory: picklable; builds the inspector in the child process.
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
