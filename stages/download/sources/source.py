"""The interface of sources of image-text pairs: all rows first, then the bytes of some rows at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from stages.artifacts.rows import FILTERED, OK, UNDECODABLE

Row = dict[str, Any]
"""A row of the plan: `url`, `PLACE`, and text columns."""

URL = "url"
"""Column that identifies the input of a row: a URL, or the image's name within the given files."""
PLACE = "musevl_place"
"""Column with what a source needs to find the image again, in a form of its own; '' if the row has no image. It exists
in the plan only and enters no artifact."""

HTTP_ERROR = "http_error"
TIMEOUT = "timeout"
CONNECTION_ERROR = "connection_error"
TOO_MANY_REDIRECTS = "too_many_redirects"
REFUSED = "refused"
OPTED_OUT = "opted_out"
TOO_LARGE = "too_large"
NOT_AN_IMAGE = "not_an_image"
TOO_MANY_PIXELS = "too_many_pixels"
MISSING = "missing"
NO_CAPTION = "no_caption"
NOT_FETCHED = "not_fetched"

STATUSES: dict[str, str] = {
    OK: "the image is in the shard",
    FILTERED: "left out by `download.filters`",
    HTTP_ERROR: "the server answered with an error",
    TIMEOUT: "no whole answer within `download.timeout_s`",
    CONNECTION_ERROR: "no connection, or it broke; a body that ended early",
    TOO_MANY_REDIRECTS: "more redirects than `download.http.max_redirects`, or a loop",
    REFUSED: "an address of a private network, a scheme that is not fetched, or a path outside the folder",
    OPTED_OUT: "the answer's X-Robots-Tag asks not to use the image",
    TOO_LARGE: "more bytes than `download.max_bytes`",
    NOT_AN_IMAGE: "the bytes are no image: a web page, an empty file",
    TOO_MANY_PIXELS: "more pixels than `download.max_pixels`",
    UNDECODABLE: "an image that is damaged, cut off, or of a format that is not read, such as HEIC",
    MISSING: "the row names no image, or a file that is not there",
    NO_CAPTION: "no text, or an empty one; a .json, or an entry of a conversation file, that cannot be used",
    NOT_FETCHED: "img2dataset said nothing of the row",
}
"""The possible results of a row."""


NUM_EXAMPLES = 3
"""Number of skipped files, or of failed rows, that messages name as examples."""


@dataclass(frozen=True)
class Failure:
    """The reason for which a row has no image."""

    status: str
    """One of `STATUSES`."""
    reason: str
    """The cause, in the same words for every row with the same cause, so that causes can be counted."""


Fetched = bytes | Failure


class Source(Protocol):
    """A source of image-text pairs. Each process that needs one creates its own."""

    @property
    def what(self) -> str:
        """Name of the source in messages."""
        ...

    def content(self) -> dict[str, str]:
        """Return digests of everything that determines the rows and images, but no paths; they enter the action key.

        Raises:
            ValueError: the source cannot be read.
        """
        ...

    def rows(self, columns: Sequence[str]) -> pa.Table:
        """Return all rows in order, with the columns `url`, `PLACE` and `columns`.

        Raises:
            ValueError: the source cannot be read, or lacks what was expected; the message says what, where and the
                remedy.
        """
        ...

    def fetch(self, rows: list[Row], scratch: Path) -> Iterator[tuple[int, Fetched]]:
        """Yield the position in `rows` and the image or failure, in any order; at most one for each row.

        Args:
            rows: rows of the plan.
            scratch: an empty private folder.
        """
        ...


@dataclass(frozen=True)
class SourceOptions:
    """The settings of the stage's config that a source of files needs in addition to its own config."""

    caption_column: str
    """Name of the caption column."""
    max_bytes: int
    """Largest size of an image file in bytes; of a larger file only one byte more is read."""
    tsv_quotes: bool
    """Whether double quotes enclose values in lists separated by tabs."""


TAKE_COLUMNS = "set download.caption_column, .extra_columns and .keep to what it has"
"""Remedy for messages about a missing column."""


def find_columns(
    what: str, wanted: Sequence[str], available: Sequence[str], remedy: str = TAKE_COLUMNS
) -> dict[str, str]:
    """Map wanted column names to the source's own names: `URL` or ` url` stands for `url` if there is no `url`.

    Raises:
        ValueError: a column is missing or ambiguous.
    """
    found = {}
    for name in wanted:
        named = [own for own in available if own == name] or [own for own in available if same_column(own, name)]
        if not named:
            raise ValueError(f"{what} has no column {name!r}; it has {', '.join(available)}: {remedy}")
        if len(named) > 1:
            spelled = f" ({', '.join(map(repr, named))})" if set(named) != {name} else ""
            raise ValueError(f"{what} has {len(named)} columns {name!r}{spelled}; give each its own name")
        found[name] = named[0]
    return found


def same_column(one: str, other: str) -> bool:
    """Return whether two column names are equal except for upper case and surrounding spaces."""
    return one.strip().casefold() == other.strip().casefold()


def say_left_out(logger: logging.Logger, what: str, names: Sequence[str], kind: str, number: int | None = None) -> None:
    """Log how many files or members of a source are skipped, with examples; log nothing if there are none.

    Args:
        logger: logger of the module that skips them.
        what: name of the source in messages.
        names: names of all skipped files, or of the first ones.
        kind: description of the files, as in `3 files that are no tars`.
        number: number of skipped files if `names` does not hold all of them.
    """
    if names:
        number = number or len(names)
        examples = ", ".join(names[:NUM_EXAMPLES]) + (", ..." if number > NUM_EXAMPLES else "")
        logger.warning("%s: left out %d %s: %s", what, number, kind, examples)


def has_text(caption: str) -> bool:
    """Return whether a caption has a visible character."""
    return any(character.isprintable() and not character.isspace() for character in caption)


def place(*parts: Any) -> str:
    """Encode a `PLACE`."""
    return json.dumps(parts)


def no_place(status: str, reason: str) -> str:
    """Encode the `PLACE` of a row that is already known to give no image; arguments as for `Failure`."""
    return json.dumps({"status": status, "reason": reason})


def known_failure(row: Row) -> Failure | None:
    """Return the failure that the source has recorded for a row in its `PLACE`, or None."""
    found = json.loads(row[PLACE]) if row[PLACE] else None
    return Failure(**found) if isinstance(found, dict) else None


def placed(rows: Sequence[Row], what: str) -> Iterator[tuple[int, list[Any] | Failure]]:
    """Yield the position and the decoded `PLACE` of every row, or a failure if the row has no image."""
    for position, row in enumerate(rows):
        if not row[PLACE]:
            yield position, Failure(MISSING, f"{what} has no image")
        else:
            yield position, known_failure(row) or json.loads(row[PLACE])
