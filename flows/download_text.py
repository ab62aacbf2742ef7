"""Text output about a download: the results of its rows by status, reason and host (for link rot)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from flows.text import megabytes, text_table
from infra.terminal import printable
from stages.artifacts.rows import FILTERED, OK
from stages.artifacts.shards import METADATA
from stages.download.counts import host_of, reason_of
from stages.download.sources.source import NUM_EXAMPLES, STATUSES
from stages.download.splits import unused_splits
from storage.tables import read_table

if TYPE_CHECKING:
    from storage.manifest import Manifest
    from storage.store import Store

KIND = "image_shards"
_SHOWN = 20
_LONGEST_EXAMPLE = 120


def inspect_download(store: Store, manifest: Manifest) -> str:
    """Describe a download for the terminal by counts over all metadata rows, with examples for each reason.

    Args:
        store: the store with the download.
        manifest: manifest of kind `image_shards`.
    """
    status, reasons, filters = Counter[str](), Counter[str](), Counter[str]()
    examples: dict[str, list[str]] = {}
    hosts: dict[str, Counter[str]] = {}
    for entry in manifest.files_under(METADATA):
        for row in read_table(store.fetch(entry), ["key", "url", "status", "error"]).to_pylist():
            status[row["status"]] += 1
            reason = row["error"] if row["status"] == FILTERED else reason_of(row["status"], row["error"])
            failed = row["status"] not in (OK, FILTERED)
            if row["status"] != OK:
                (reasons if failed else filters)[reason] += 1
                if len(shown := examples.setdefault(reason, [])) < NUM_EXAMPLES:
                    shown.append(f"{row['key']}: {row['url']}")
            if host := host_of(row["url"]):
                hosts.setdefault(host, Counter())[reason if failed else OK] += 1
    parts = [
        f"download {manifest.digest}\n{status.total()} rows, {status[OK]} images, {megabytes(manifest.size)}",
        text_table(
            ["status", "rows", "share", "what it means"],
            [
                [name, str(count), f"{count / status.total():.1%}", STATUSES.get(name, "")]
                for name, count in status.most_common()
            ],
        ),
    ]
    parts += _counts("reason of failure", reasons, examples) + _counts("filtered because", filters, examples)
    parts += _splits(manifest.metrics.get("splits", {})) + _rot(hosts)
    return "\n\n".join(parts)


def _counts(title: str, counts: Counter[str], examples: dict[str, list[str]]) -> list[str]:
    """Format the counts of reasons, with the first rows of each reason on lines of their own."""
    if not counts:
        return []
    rows = []
    for reason, count in counts.most_common(_SHOWN):
        for number, example in enumerate(examples[reason]):
            cells = ["", ""] if number else [reason, str(count)]
            rows.append([*cells, printable(example, _LONGEST_EXAMPLE)])
    return [text_table([title, "rows", "for example"], rows) + _more(len(counts))]


def _splits(counts: dict[str, int]) -> list[str]:
    """Format the number of images of each split, if there are several, and mark splits that no stage uses."""
    if len(counts) < 2:
        return []
    unused = unused_splits(counts)
    rows = [
        [printable(name, _LONGEST_EXAMPLE), str(count), "used by no stage" if name in unused else ""]
        for name, count in counts.items()
    ]
    return [text_table(["split", "images", ""], rows)]


def _rot(hosts: dict[str, Counter[str]]) -> list[str]:
    """Format the hosts with most failures."""
    rows: list[tuple[int, list[Any]]] = []
    for host, counts in hosts.items():
        total, failed = counts.total(), counts.total() - counts[OK]
        if failed:
            worst = next(reason for reason, _ in counts.most_common() if reason != OK)
            rows.append((failed, [host, str(total), str(failed), f"{failed / total:.0%}", worst]))
    if not rows:
        return []
    rows.sort(key=lambda row: (-row[0], row[1][0]))
    table = text_table(["host", "rows", "failed", "share", "mostly"], [cells for _, cells in rows[:_SHOWN]])
    return [table + _more(len(rows))]


def _more(count: int) -> str:
    return f"\nand {count - _SHOWN} more" if count > _SHOWN else ""
