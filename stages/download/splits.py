"""The train/test split of images: a column `split` if there is one, else a hash of the rows' URLs or paths."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

import pyarrow as pa

from stages.artifacts.rows import SPLIT, TEST, TRAIN, split_of
from stages.download.sources.source import PLACE, URL


def split_counts(values: Iterable[str | None]) -> Counter[str]:
    """Count the rows of each split."""
    return Counter(map(split_of, values))


def unused_splits(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the splits that no stage uses with their numbers of rows, the largest first."""
    others = [(name, count) for name, count in counts.items() if count and name not in (TRAIN, TEST)]
    return dict(sorted(others, key=lambda item: (-item[1], item[0])))


def split_problem(counts: Mapping[str, int]) -> str:
    """Check the splits of a list before its images are fetched; return a warning, or ''.

    Raises:
        ValueError: no row has the split `train`.
    """
    rename = "name them `train` or `test`, exactly so, in the column `split`"
    unused = unused_splits(counts)
    named = ", ".join(f"{name[:40]!r} ({count})" for name, count in list(unused.items())[:5]) + (
        ", ..." * (len(unused) > 5)
    )
    if not counts.get(TRAIN):
        raise ValueError(
            f"no row has the split 'train', which every training reads; they have {named or repr(TEST)}: {rename}"
        )
    problems = []
    if unused:
        problems.append(
            f"{sum(unused.values())} of {sum(counts.values())} rows are in splits that no stage uses: {named}; {rename}"
        )
    if not counts.get(TEST):
        problems.append(
            "no row is held out (split 'test'), and evaluate will need some: set download.held_out_fraction, or give "
            "the rows a column `split` (download.extra_columns: [split])"
        )
    return "; ".join(problems)


def hold_out(rows: pa.Table, fraction: float) -> pa.Table:
    """Add a column `split` in which about this fraction of the rows is `test`.

    The split of a row depends only on its own address (its URL, or its place in a file), not on other rows or the
    recipe's seed. So a growing list moves no image to another split, and runs with several seeds are measured on the
    same images.

    Args:
        rows: table with the columns `url` and `PLACE`, and without `split`.
        fraction: fraction of test rows, 0 to 1.

    Raises:
        ValueError: one split is empty with this fraction.
    """
    addresses = (url or place for url, place in zip(rows[URL].to_pylist(), rows[PLACE].to_pylist(), strict=True))
    splits = [TEST if _share(address) < fraction else TRAIN for address in addresses]
    if len(set(splits)) < 2:
        raise ValueError(
            f"download.held_out_fraction={fraction} leaves all {len(splits)} rows in {splits[0]!r}; choose another, or "
            "give the rows a column `split` (download.extra_columns: [split])"
        )
    return rows.append_column(SPLIT, pa.array(splits, pa.string()))


def _share(address: str) -> float:
    """Return a hash of the address as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(address.encode()).digest()[:8], "big") / 2**64
