"""The result of one input: a row of metadata and, if the image is usable, the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stages.artifacts.rows import FILTERED, OK
from stages.download.filters import PERCEPTUAL_HASH, FilterConfig, caption_problem, image_problem
from stages.download.image_facts import Inspect
from stages.download.sources.source import (
    NO_CAPTION,
    NOT_FETCHED,
    PLACE,
    Failure,
    Fetched,
    Row,
    has_text,
    known_failure,
)
from storage.digests import sha256_bytes


@dataclass(frozen=True)
class DescribedRow:
    """A row of metadata and its image."""

    metadata: dict[str, Any]
    image: bytes | None
    """The image's bytes; None unless the status is `ok`."""
    extension: str = ""
    """File extension of the image: `jpg`, `png`, ..."""


def without_image(row: Row, key: str, shard: str, failure: Failure) -> DescribedRow:
    """Build the row of an input that gave no image."""
    return DescribedRow(_blank(row, key, shard) | {"status": failure.status, "error": failure.reason}, None)


def unwanted_caption(row: Row, filters: FilterConfig) -> Failure | None:
    """Return why a row is left out for its caption before it is fetched, or None; known failures take precedence."""
    reason = caption_problem(row["caption"], filters)
    if reason:
        return Failure(FILTERED, reason)
    if has_text(row["caption"]) or known_failure(row):
        return None
    return Failure(NO_CAPTION, "the caption is empty")


def describe(
    row: Row, key: str, shard: str, fetched: Fetched | None, inspect: Inspect, filters: FilterConfig
) -> DescribedRow:
    """Inspect what was fetched for a row, and build its metadata.

    Args:
        row: row of the plan.
        key: key of the sample.
        shard: name of the shard that the row belongs to.
        fetched: the bytes or the failure from its source; None if the source returned nothing.
        inspect: decodes an image.
        filters: conditions on images.
    """
    if fetched is None:
        return without_image(row, key, shard, Failure(NOT_FETCHED, "no answer from img2dataset"))
    found = fetched if isinstance(fetched, Failure) else inspect(fetched)
    if isinstance(found, Failure):
        return without_image(row, key, shard, found)
    assert isinstance(fetched, bytes), "only bytes are inspected"
    facts = {"width": found.width, "height": found.height, "sha256": sha256_bytes(fetched), "bytes": len(fetched)}
    hashed = {PERCEPTUAL_HASH: found.perceptual_hash} if found.perceptual_hash else {}
    described = _blank(row, key, shard) | facts | hashed
    unwanted = image_problem(found.width, found.height, filters)
    if unwanted:
        return DescribedRow(described | {"status": FILTERED, "error": unwanted}, None)
    return DescribedRow(described, fetched, found.extension)


def _blank(row: Row, key: str, shard: str) -> dict[str, Any]:
    facts = dict.fromkeys(("error", "width", "height", "sha256", "bytes"))
    given = {name: value for name, value in row.items() if name != PLACE}
    return given | facts | {"key": key, "status": OK, "shard": shard}
