"""What a source of image-text pairs is: rows first, all of them, then the bytes of some rows at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

Row = dict[str, Any]
"""A row as the plan holds it: `url`, `PLACE`, and columns of text."""

URL = "url"
"""Column that says which input a row is: a URL, or the image's name within the files that were given."""
PLACE = "musevl_place"
"""Column with what a source needs to find the image again, in its own words; '' where the row has none. It stays in
the plan and enters no artifact."""

OK, FILTERED = "ok", "filtered"
HTTP_ERROR = "http_error"
TIMEOUT = "timeout"
CONNECTION_ERROR = "connection_error"
TOO_MANY_REDIRECTS = "too_many_redirects"
REFUSED = "refused"
OPTED_OUT = "opted_out"
TOO_LARGE = "too_large"
NOT_AN_IMAGE = "not_an_image"
TOO_MANY_PIXELS = "too_many_pixels"
UNDECODABLE = "undecodable"
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
    NO_CAPTION: "no text beside the image; a .json, or an entry of a conversation file, that cannot be used",
    NOT_FETCHED: "img2dataset said nothing of the row",
}
"""What can become of a row."""


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


def check_columns(what: str, wanted: Sequence[str], available: Sequence[str]) -> None:
    """Raise ValueError unless a source has every column that is wanted of it."""
    for name in wanted:
        if name not in available:
            raise ValueError(
                f"{what} has no column {name!r}; it has {', '.join(available)}: set download.caption_column, "
                f".extra_columns and .keep to what it has"
            )
        if (count := list(available).count(name)) > 1:
            raise ValueError(f"{what} has {count} columns {name!r}; give each its own name")


def place(*parts: Any) -> str:
    """Write a `PLACE`."""
    return json.dumps(parts)


def no_place(status: str, reason: str) -> str:
    """Write the `PLACE` of a row of which it is known already that it gives no image; arguments as of `Failure`."""
    return json.dumps({"status": status, "reason": reason})


def placed(rows: Sequence[Row], what: str) -> Iterator[tuple[int, list[Any] | Failure]]:
    """Position and `PLACE` of every row; a failure where the row says that it has no image."""
    for position, row in enumerate(rows):
        found = json.loads(row[PLACE]) if row[PLACE] else Failure(MISSING, f"{what} has no image")
        yield position, Failure(**found) if isinstance(found, dict) else found
