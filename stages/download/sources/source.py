"""What a source of image-text pairs is: rows first, all of them, then the bytes of some rows at a time."""

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
"""A row as the plan holds it: `url`, `PLACE`, and columns of text."""

URL = "url"
"""Column that says which input a row is: a URL, or the image's name within the files that were given."""
PLACE = "musevl_place"
"""Column with what a source needs to find the image again, in its own words; '' where the row has none. It stays in
the plan and enters no artifact."""

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
"""What can become of a row."""


NUM_EXAMPLES = 3
"""How many of the files that are left out, or of the rows that failed, messages name."""


@dataclass(frozen=True)
class Failure:
    """Why a row has no image."""

    status: str
    """One of `STATUSES`."""
    reason: str
    """The same words for the same cause, so that they can be counted."""


Fetched = bytes | Failure


class Source(Protocol):
    """A list of image-text pairs. Opened anew in each process that needs it."""

    @property
    def what(self) -> str:
        """How messages name it."""
        ...

    def content(self) -> dict[str, str]:
        """Digests of all that decides the rows and their images; part of the action key. No path enters them.

        Raises:
            ValueError: it cannot be read.
        """
        ...

    def rows(self, columns: Sequence[str]) -> pa.Table:
        """Every row in order: `url`, `PLACE` and `columns`.

        Raises:
            ValueError: it cannot be read, or lacks what was expected; the message says what, where and the remedy.
        """
        ...

    def fetch(self, rows: list[Row], scratch: Path) -> Iterator[tuple[int, Fetched]]:
        """Position in `rows` and what was found, in any order; at most one for each row.

        Args:
            rows: of the plan.
            scratch: an empty private folder.
        """
        ...


@dataclass(frozen=True)
class SourceOptions:
    """What a source of files needs of the stage's config beside its own."""

    caption_column: str
    """Name of the caption's column."""
    max_bytes: int
    """Largest image file; of larger ones no more is read."""
    tsv_quotes: bool
    """In lists whose values tabs separate, double quotes enclose values."""


TAKE_COLUMNS = "set download.caption_column, .extra_columns and .keep to what it has"
"""What to do where a source lacks a column."""


def find_columns(
    what: str, wanted: Sequence[str], available: Sequence[str], remedy: str = TAKE_COLUMNS
) -> dict[str, str]:
    """The name in the source of every column that is wanted of it: `URL` and ` url` are `url` where that is not there.

    Raises:
        ValueError: one is not there, or it is not clear which one is meant.
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
    """Whether two names of columns differ in upper case and in spaces around them at most."""
    return one.strip().casefold() == other.strip().casefold()


def say_left_out(logger: logging.Logger, what: str, names: Sequence[str], kind: str, number: int | None = None) -> None:
    """Log how many files or members of a source are not used, and the first of them; nothing where there are none.

    Args:
        logger: of the module that leaves them out.
        what: the source, as messages name it.
        names: of those that are left out, or of the first ones.
        kind: what they are, as in `3 files that are no tars`.
        number: how many they are, where `names` are not all.
    """
    if names:
        number = number or len(names)
        examples = ", ".join(names[:NUM_EXAMPLES]) + (", ..." if number > NUM_EXAMPLES else "")
        logger.warning("%s: left out %d %s: %s", what, number, kind, examples)


def has_text(caption: str) -> bool:
    """Whether a caption says anything: white space, and characters that nobody sees, do not."""
    return any(character.isprintable() and not character.isspace() for character in caption)


def place(*parts: Any) -> str:
    """Write a `PLACE`."""
    return json.dumps(parts)


def no_place(status: str, reason: str) -> str:
    """Write the `PLACE` of a row of which it is known already that it gives no image; arguments as of `Failure`."""
    return json.dumps({"status": status, "reason": reason})


def known_failure(row: Row) -> Failure | None:
    """Why a row gives no image, where its source knew that from the beginning."""
    found = json.loads(row[PLACE]) if row[PLACE] else None
    return Failure(**found) if isinstance(found, dict) else None


def placed(rows: Sequence[Row], what: str) -> Iterator[tuple[int, list[Any] | Failure]]:
    """Position and `PLACE` of every row; a failure where the row says that it has no image."""
    for position, row in enumerate(rows):
        if not row[PLACE]:
            yield position, Failure(MISSING, f"{what} has no image")
        else:
            yield position, known_failure(row) or json.loads(row[PLACE])
