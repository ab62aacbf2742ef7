"""Which images are held out where their source does not say."""

from __future__ import annotations

import hashlib

import pyarrow as pa

from stages.sources.source import PLACE, URL

SPLIT = "split"
"""Column with `train` or `test`."""


def hold_out(rows: pa.Table, fraction: float) -> pa.Table:
    """The rows with a column `split`: about this part of them is `test`.

    A row's own address decides (its URL, or its place in a file), and neither the others nor the recipe's seed: a list
    that grows moves no image to the other side, and runs of several seeds are measured on the same images.

    Args:
        rows: `url` and `PLACE`, and not yet `split`.
        fraction: 0 to 1.

    Raises:
        ValueError: the part is so small, or so large, that one side is empty.
    """
    addresses = (url or place for url, place in zip(rows[URL].to_pylist(), rows[PLACE].to_pylist(), strict=True))
    splits = ["test" if _share(address) < fraction else "train" for address in addresses]
    if len(set(splits)) < 2:
        raise ValueError(
            f"download.held_out_fraction={fraction} leaves all {len(splits)} rows in {splits[0]!r}; choose another, or "
            "give the rows a column `split` (download.extra_columns: [split])"
        )
    return rows.append_column(SPLIT, pa.array(splits, pa.string()))


def _share(address: str) -> float:
    """A number in [0, 1) that the address alone decides."""
    return int.from_bytes(hashlib.sha256(address.encode()).digest()[:8], "big") / 2**64
