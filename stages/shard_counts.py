"""What is counted of a shard's rows: in its receipt, and over all shards in the artifact's metrics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from stages.sources.source import FILTERED, OK
from storage.manifest import FileEntry

_COUNTED = ("status", "errors", "filters", "hosts", "failed_hosts", "splits")
_DETAILS = re.compile(r" \([^()]*\)$")
_SHOWN = 20
"""Reasons and hosts that the metrics name; the metadata tables have them all."""


def receipt_of(files: Sequence[FileEntry], metadata: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The receipt of a shard: its files and how often each thing is there in its metadata rows."""
    counted: dict[str, Counter[str]] = {name: Counter() for name in _COUNTED}
    for row in metadata:
        status, host = row["status"], host_of(row["url"])
        counted["status"][status] += 1
        counted["hosts"].update([host] if host else [])
        if status == OK:
            counted["splits"][row.get("split") or "train"] += 1
        elif status == FILTERED:
            counted["filters"][row["error"]] += 1
        else:
            counted["errors"][reason_of(status, row["error"])] += 1
            counted["failed_hosts"].update([host] if host else [])
    return {"files": [entry.to_json() for entry in files]} | {name: dict(counts) for name, counts in counted.items()}


class Totals:
    """Counts over shards. Receipts are added as they are read, and not kept: with their hosts they take much memory.

    Args:
        receipts: to begin with.
    """

    def __init__(self, receipts: Iterable[Mapping[str, Any]] = ()) -> None:
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in _COUNTED}
        for receipt in receipts:
            self.add(receipt)

    def __getitem__(self, name: str) -> Counter[str]:
        """One of the counts of a receipt, over all shards."""
        return self._counts[name]

    def add(self, receipt: Mapping[str, Any]) -> None:
        """Count a shard."""
        for name, counts in self._counts.items():
            counts.update(receipt[name])

    def take_back(self, receipt: Mapping[str, Any]) -> None:
        """Count a shard no longer."""
        for name, counts in self._counts.items():
            counts.subtract(receipt[name])
            for thing in receipt[name]:
                if not counts[thing]:
                    del counts[thing]

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
            "hosts": {host: {"rows": hosts[host], "failed": count} for host, count in failed},
        }


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
