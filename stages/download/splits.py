"""Which images are held out: what a column `split` says, or, where there is none, their addresses."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

import pyarrow as pa

from stages.artifacts.rows import SPLIT, TEST, TRAIN, split_of
from stages.download.sources.source import PLACE, URL


def split_counts(values: Iterable[str | None]) -> Counter[str]:
    """How many rows each split has."""
    return Counter(map(split_of, values))


def unused_splits(counts: Mapping[str, int]) -> dict[str, int]:
    """The splits that no stage uses, and their rows; the largest first."""
    others = [(name, count) for name, count in counts.items() if count and name not in (TRAIN, TEST)]
    return dict(sorted(others, key=lambda item: (-item[1], item[0])))


def split_problem(counts: Mapping[str, int]) -> str:
    """What is to be said of the splits of a list before its images are fetched; '' where there is nothing.

    Raises:
        ValueError: no row is `train`.
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
    splits = [TEST if _share(address) < fraction else TRAIN for address in addresses]
    if len(set(splits)) < 2:
        raise ValueError(
            f"download.held_out_fraction={fraction} leaves all {len(splits)} rows in {splits[0]!r}; choose another, or "
            "give the rows a column `split` (download.extra_columns: [split])"
        )
    return rows.append_column(SPLIT, pa.array(splits, pa.string()))


def _share(address: str) -> float:
    """A number in [0, 1) that the address alone decides."""
    return int.from_bytes(hashlib.sha256(address.encode()).digest()[:8], "big") / 2**64
