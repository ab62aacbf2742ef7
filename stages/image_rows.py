"""What becomes of the bytes of one input: a row of metadata, and an image where it is good."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError

from models.transforms import IMAGE_FORMATS, TransformConfig, load_image
from stages.filters import PERCEPTUAL_HASH, FilterConfig, caption_problem, image_problem, perceptual_hash
from stages.sources.source import (
    FILTERED,
    NOT_AN_IMAGE,
    NOT_FETCHED,
    OK,
    PLACE,
    TOO_LARGE,
    TOO_MANY_PIXELS,
    UNDECODABLE,
    Failure,
    Fetched,
    Row,
)
from storage.digests import sha256_bytes

_LONGEST_REASON = 200


@dataclass(frozen=True)
class Limits:
    """What an image may cost."""

    max_bytes: int
    max_pixels: int


@dataclass(frozen=True)
class DescribedRow:
    """A row of metadata, and the image that goes with it."""

    metadata: dict[str, Any]
    image: bytes | None
    """None unless the status is `ok`."""
    extension: str = ""
    """Of the image: `jpg`, `png`, ..."""


def without_image(row: Row, key: str, shard: str, failure: Failure) -> DescribedRow:
    """The row of an input that gave none."""
    return DescribedRow(_blank(row, key, shard) | {"status": failure.status, "error": failure.reason}, None)


def unwanted_caption(row: Row, filters: FilterConfig) -> Failure | None:
    """Why a row is left out before anything is fetched for it."""
    reason = caption_problem(row["caption"], filters)
    return Failure(FILTERED, reason) if reason else None


def describe(
    row: Row, key: str, shard: str, fetched: Fetched | None, limits: Limits, filters: FilterConfig
) -> DescribedRow:
    """Check what was fetched by decoding it to its last row.

    Args:
        row: of the plan.
        key: of the sample.
        shard: that it belongs to.
        fetched: what its source found; None where it said nothing.
        limits: sizes beyond which it is not looked at.
        filters: which images are wanted.
    """
    if fetched is None:
        return without_image(row, key, shard, Failure(NOT_FETCHED, "no answer from img2dataset"))
    if isinstance(fetched, Failure):
        return without_image(row, key, shard, fetched)
    failure = _too_costly(fetched, limits)
    if failure is not None:
        return without_image(row, key, shard, failure)
    try:
        load_image(fetched, TransformConfig(image_size=8))  # it turns whatever Pillow raises into OSError
        with Image.open(io.BytesIO(fetched), formats=IMAGE_FORMATS) as image:
            width, height, extension = image.width, image.height, (image.format or "").lower()
            hashed = perceptual_hash(image) if filters.near_duplicate_bits is not None else None
    except OSError as error:
        reason = f"{type(error).__name__}: {error}"[:_LONGEST_REASON]
        return without_image(row, key, shard, Failure(UNDECODABLE, reason))
    facts = {"width": width, "height": height, "sha256": sha256_bytes(fetched), "bytes": len(fetched)}
    described = _blank(row, key, shard) | facts | ({PERCEPTUAL_HASH: hashed} if hashed else {})
    unwanted = image_problem(width, height, filters)
    if unwanted:
        return DescribedRow(described | {"status": FILTERED, "error": unwanted}, None)
    return DescribedRow(described, fetched, {"jpeg": "jpg"}.get(extension, extension))


def _blank(row: Row, key: str, shard: str) -> dict[str, Any]:
    facts = dict.fromkeys(("error", "width", "height", "sha256", "bytes"))
    given = {name: value for name, value in row.items() if name != PLACE}
    return given | facts | {"key": key, "status": OK, "shard": shard}


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
