"""What is counted of a shard's rows: in its receipt, and over all shards in the artifact's metrics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from infra.terminal import printable
from stages.artifacts.rows import FILTERED, OK, SPLIT, split_of
from stages.download.sources.source import NUM_EXAMPLES
from stages.download.splits import unused_splits
from storage.manifest import FileEntry

_COUNTED = ("status", "errors", "filters", "hosts", "failed_hosts", "splits")
_DETAILS = re.compile(r" \([^()]*\)$")
_SHOWN = 20
"""Reasons and hosts that the metrics name; the metadata tables have them all."""
_LONGEST_EXAMPLE = 200
_TOLD, _LONGEST_TOLD = 3, 80
"""Reasons in a message, and characters of an example there."""


def receipt_of(files: Sequence[FileEntry], metadata: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The receipt of a shard: its files, how often each thing is there in its metadata, and `examples` of reasons."""
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
    return {"files": [entry.to_json() for entry in files], "examples": examples} | counts


class Totals:
    """Counts over shards. Receipts are added as they are read, and not kept: with their hosts they take much memory.

    Args:
        receipts: to begin with.
    """

    def __init__(self, receipts: Iterable[Mapping[str, Any]] = ()) -> None:
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in _COUNTED}
        self._examples: dict[str, list[str]] = {}
        for receipt in receipts:
            self.add(receipt)

    def __getitem__(self, name: str) -> Counter[str]:
        """One of the counts of a receipt, over all shards."""
        return self._counts[name]

    def add(self, receipt: Mapping[str, Any]) -> None:
        """Count a shard."""
        for name, counts in self._counts.items():
            counts.update(receipt[name])
        for reason, examples in receipt["examples"].items():
            _add_examples(self._examples.setdefault(reason, []), examples)

    def take_back(self, receipt: Mapping[str, Any]) -> None:
        """Count a shard no longer. It stays an example of what failed: it comes again, with more that is left out."""
        for name, counts in self._counts.items():
            counts.subtract(receipt[name])
            for thing in receipt[name]:
                if not counts[thing]:
                    del counts[thing]

    def reasons(self, *names: str) -> str:
        """The most frequent reasons among some counts (`errors`, `filters`), each with examples, for a message."""
        counts = sum((self[name] for name in names), Counter[str]())
        said = []
        for reason, count in counts.most_common(_TOLD):
            examples = ", ".join(printable(each, _LONGEST_TOLD) for each in self._examples[reason])
            said.append(f"{count} x {printable(reason)}, such as {examples}")
        return "; ".join(said)

    @property
    def num_rows(self) -> int:
        """Rows of these shards."""
        return self["status"].total()

    @property
    def num_failed(self) -> int:
        """Rows that should have given an image and did not."""
        return self.num_rows - self["status"][OK] - self["status"][FILTERED]

    def metrics(self) -> dict[str, Any]:
        """Metrics of the artifact: rows by status, and the most frequent reasons and hosts of failures."""
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
    """Host of a URL; '' for what is no address on a network."""
    try:
        parts = urlsplit(url)
        return (parts.hostname or "") if parts.scheme in ("http", "https") else ""
    except ValueError:
        return ""


def reason_of(status: str, error: str | None) -> str:
    """Why a row failed, without the details that differ from one image to the next."""
    return f"{status}: {_DETAILS.sub('', error or '')}"


def _most(counts: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent ones; equal counts in alphabetic order, so that no worker's speed decides."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
