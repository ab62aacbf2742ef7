"""Conventions of table rows: statuses, splits, and keys of the views of an image."""

from __future__ import annotations

OK, FILTERED, UNDECODABLE = "ok", "filtered", "undecodable"
"""Values of the column `status`; `stages.download.sources.source` has those of downloading only."""

SPLIT = "split"
"""Column with `train` or `test`; '' means `train`, and rows with other values are kept but used by no stage."""
TRAIN, TEST = "train", "test"

VIEW = "view"
"""Column of a code table with the name of the view of the image."""
ORIGINAL = "original"
"""Name of the view that is the image itself."""
CODE_TABLE_COLUMNS = ("key", "text", VIEW, "codes")
"""Columns of every code table; it also has the columns of the data set."""


def split_of(value: str | None) -> str:
    """Return the split of a row from its value of the column; a row without a value is for training."""
    return value or TRAIN


def view_name(number: int) -> str:
    """Return the name of an augmented view; numbers begin at 1."""
    return f"view_{number}"


def row_key(image: str, view: str) -> str:
    """Return the key of a code table's row from the key of its image and its view."""
    return image if view == ORIGINAL else f"{image}_{view}"


def image_key(row: str, view: str) -> str:
    """Return the key of the image of a code table's row."""
    return row.removesuffix(f"_{view}")
