"""Counts of a shard's rows for its receipt, and their totals over all shards for the artifact's metrics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from infra.terminal import printable
from stages.artifacts.rows import FILTERED, OK, SPLIT, split_of
from stages.download.sources.source import NUM_EXAMPLES
from stages.download.splits import unused_splits
from stages.mapped.engine import Receipt
from storage.manifest import FileEntry

_COUNTED = ("status", "errors", "filters", "hosts", "failed_hosts", "splits")
_DETAILS = re.compile(r" \([^()]*\)$")
_SHOWN = 20
"""Largest number of reasons and hosts in the metrics; the metadata tables have all."""
_LONGEST_EXAMPLE = 200
_TOLD, _LONGEST_TOLD = 3, 80
"""Largest number of reasons in a message, and of characters of an example there."""


@dataclass(frozen=True)
class DownloadedShard(Receipt):
    """The receipt of a shard, with counts of its metadata rows."""

    status: dict[str, int]
    """Number of rows by status."""
    errors: dict[str, int]
    """Number of failures by reason (`reason_of`)."""
    filters: dict[str, int]
    """Number of filtered rows by reason."""
    hosts: dict[str, int]
    """Number of rows by host of their URL."""
    failed_hosts: dict[str, int]
    """Number of failures by host."""
    splits: dict[str, int]
    """Number of images by split."""
    examples: dict[str, list[str]]
    """Examples, as URLs or numbers of rows, by reason."""


def receipt_of(files: Sequence[FileEntry], metadata: Iterable[dict[str, Any]]) -> DownloadedShard:
    """Build the receipt of a shard: its files, counts of its metadata, and examples for each reason."""
    counted: dict[str, Counter[str]] = {name: Counter() for name in _COUNTED}
    examples: dict[str, list[str]] = {}
    for row in metadata:
        status, host = row["status"], host_of(row["url"])
        counted["status"][status] += 1
        counted["hosts"].update([host] if host else [])
        if status == OK:
            counted["splits"][split_of(row.get(SPLIT))] += 1
        elif status == FILTERED:
            counted["filters"][row["error"]] += 1
        else:
            counted["errors"][reason_of(status, row["error"])] += 1
            counted["failed_hosts"].update([host] if host else [])
        if status != OK:
            reason = row["error"] if status == FILTERED else reason_of(status, row["error"])
            _add_examples(examples.setdefault(reason, []), [row["url"][:_LONGEST_EXAMPLE] or f"row {row['key']}"])
    counts = {name: dict(counts) for name, counts in counted.items()}
    return DownloadedShard(files=tuple(files), examples=examples, **counts)


class Totals:
    """Totals of the counts over shards. Receipts are not kept, because their hosts take much memory.

    Args:
        receipts: the first receipts to add.
    """

    def __init__(self, receipts: Iterable[DownloadedShard] = ()) -> None:
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in _COUNTED}
        self._examples: dict[str, list[str]] = {}
        for receipt in receipts:
            self.add(receipt)

    def __getitem__(self, name: str) -> Counter[str]:
        """Return one of the counts of a receipt, summed over all shards."""
        return self._counts[name]

    def add(self, receipt: DownloadedShard) -> None:
        """Add the counts of a shard."""
        for name, counts in self._counts.items():
            counts.update(getattr(receipt, name))
        for reason, examples in receipt.examples.items():
            _add_examples(self._examples.setdefault(reason, []), examples)

    def take_back(self, receipt: DownloadedShard) -> None:
        """Subtract the counts of a shard, which is added again with more rows filtered; its examples stay."""
        for name, counts in self._counts.items():
            taken = getattr(receipt, name)
            counts.subtract(taken)
            for thing in taken:
                if not counts[thing]:
                    del counts[thing]

    def reasons(self, *names: str) -> str:
        """Return the most frequent reasons of some counts (`errors`, `filters`), each with examples, for a message."""
        counts = sum((self[name] for name in names), Counter[str]())
        said = []
        for reason, count in counts.most_common(_TOLD):
            examples = ", ".join(printable(each, _LONGEST_TOLD) for each in self._examples[reason])
            said.append(f"{count} x {printable(reason)}, such as {examples}")
        return "; ".join(said)

    @property
    def num_rows(self) -> int:
        """Number of rows of these shards."""
        return self["status"].total()

    @property
    def num_failed(self) -> int:
        """Number of rows without an image that were not filtered."""
        return self.num_rows - self["status"][OK] - self["status"][FILTERED]

    def metrics(self) -> dict[str, Any]:
        """Return the artifact's metrics: rows by status, and the most frequent reasons and hosts of failures."""
        hosts, failed = self["hosts"], _most(self["failed_hosts"])
        return {
            "num_rows": self.num_rows,
            "num_ok": self["status"][OK],
            "num_filtered": self["status"][FILTERED],
            "num_failed": self.num_failed,
            "status": dict(sorted(self["status"].items())),
            "errors": dict(_most(self["errors"])),
            "filters": dict(_most(self["filters"])),
            "splits": dict(_most(self["splits"])),
            "num_in_unused_splits": sum(unused_splits(self["splits"]).values()),
            "hosts": {host: {"rows": hosts[host], "failed": count} for host, count in failed},
        }


def _add_examples(known: list[str], more: Iterable[str]) -> None:
    known += [each for each in more if each not in known][: NUM_EXAMPLES - len(known)]


def host_of(url: str) -> str:
    """Return the host of a URL, or '' if it is no HTTP URL."""
    try:
        parts = urlsplit(url)
        return (parts.hostname or "") if parts.scheme in ("http", "https") else ""
    except ValueError:
        return ""


def reason_of(status: str, error: str | None) -> str:
    """Return the cause of a failed row without the details of the single image."""
    return f"{status}: {_DETAILS.sub('', error or '')}"


def _most(counts: Counter[str]) -> list[tuple[str, int]]:
    """Return the most frequent entries; ties are in alphabetic order, independent of the workers' speed."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
