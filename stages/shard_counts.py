"""What is counted of a shard's rows: in its receipt, and over all shards in the artifact's metrics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from stages.sources.source import FILTERED, OK
from storage.manifest import FileEntry

_DETAILS = re.compile(r" \([^()]*\)$")
_SHOWN = 20
"""Reasons and hosts that the metrics name; the metadata tables have them all."""


def receipt_of(files: Sequence[FileEntry], metadata: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The receipt of a shard: its files and how often each thing is there in its metadata rows."""
    counted: dict[str, Counter[str]] = {
        name: Counter() for name in ("status", "errors", "filters", "hosts", "failed_hosts", "splits")
    }
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


def total(receipts: Iterable[dict[str, Any]], name: str) -> Counter[str]:
    """One count over all shards."""
    counts: Counter[str] = Counter()
    for receipt in receipts:
        counts.update(receipt[name])
    return counts


def metrics_of(receipts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of the artifact: rows by status, and the most frequent reasons and hosts of failures."""
    status, hosts, failed_hosts = (total(receipts, name) for name in ("status", "hosts", "failed_hosts"))
    return {
        "num_rows": status.total(),
        "num_ok": status[OK],
        "num_filtered": status[FILTERED],
        "num_failed": num_failed(status),
        "status": dict(sorted(status.items())),
        "errors": dict(_most(total(receipts, "errors"))),
        "filters": dict(_most(total(receipts, "filters"))),
        "hosts": {host: {"rows": hosts[host], "failed": count} for host, count in _most(failed_hosts)},
    }


def num_failed(status: Counter[str]) -> int:
    """Rows that should have given an image and did not."""
    return status.total() - status[OK] - status[FILTERED]


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
