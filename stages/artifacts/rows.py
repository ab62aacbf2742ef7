"""What the rows of our tables have in common: statuses, splits, and the views of an image."""

from __future__ import annotations

OK, FILTERED, UNDECODABLE = "ok", "filtered", "undecodable"
"""Of the column `status`; `stages.download.sources.source` has those of downloading alone."""

SPLIT = "split"
"""Column with `train` or `test`; '' is `train`, and rows with anything else are kept and used by no stage."""
TRAIN, TEST = "train", "test"

VIEW = "view"
"""Column of a code table: which view of its image a row is."""
ORIGINAL = "original"
"""The view that is the image itself."""
CODE_TABLE_COLUMNS = ("key", "text", VIEW, "codes")
"""Columns that every code table has; those that the data bring stand beside them."""


def split_of(value: str | None) -> str:
    """The split of a row, from its value of the column; a row that has none is for training."""
    return value or TRAIN


def view_name(number: int) -> str:
    """The name of an augmented view; numbers begin at 1."""
    return f"view_{number}"


def row_key(image: str, view: str) -> str:
    """The key of a code table's row, from those of its image and view."""
    return image if view == ORIGINAL else f"{image}_{view}"


def image_key(row: str, view: str) -> str:
    """The key of the image that a code table's row shows."""
    return row.removesuffix(f"_{view}")
