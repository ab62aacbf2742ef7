"""The papers' tables beside which a comparison of tokenizers is shown, as metric rows with the role `published`.

Sources: MUSE-VL (arXiv 2411.17762) and DualToken (arXiv 2503.14324). The order of their rows compares with ours, the
numbers do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.metrics.catalogue import metric_of
from storage.tables import PUBLISHED

UNDERSTANDING = ("mean of MMBench, SEED and MMStar", "accuracy", "")
"""Benchmark, metric and qualifier of the numbers in MUSE-VL's tables."""
ZERO_SHOT = ("zero_shot", "zero_shot_accuracy", "top1")
RFID = ("reconstruction", "rfid", "")


@dataclass(frozen=True)
class PapersTable:
    """A paper's table."""

    title: str
    source: str
    columns: tuple[tuple[str, str, str], ...]
    """Benchmark, metric and qualifier of each of its columns."""
    values: Mapping[str, tuple[float | None, ...]]
    """The recorded value of each column, by kind of tokenizer; None if the paper has none."""
    names: Mapping[str, str]
    """The names of the kinds in the table, in its order; empty for a table of all kinds."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The numbers as metric rows."""
        return [
            {
                "model": kind,
                "role": PUBLISHED,
                "benchmark": benchmark,
                "split": "published",
                "metric": metric_of(metric).name,
                "qualifier": qualifier,
                "value": value,
                "settings": {"source": self.source, "table": self.title},
            }
            for kind, values in self.values.items()
            for (benchmark, metric, qualifier), value in zip(self.columns, values, strict=True)
            if value is not None
        ]

    def published(self, kind: str) -> str:
        """Return the numbers of a kind as one cell; empty if the table has none."""
        found = {(row["model"], row["metric"]): metric_of(row["metric"]).number(row["value"]) for row in self.rows}
        if not any(model == kind for model, _ in found):
            return ""
        return ", ".join(found.get((kind, metric), "-") for _, metric, _ in self.columns)


ALL_KINDS = PapersTable(
    "same language model, data and steps (published: MUSE-VL's mean of MMBench, SEED and MMStar)",
    "arXiv 2411.17762",
    (UNDERSTANDING,),
    {"vqgan": (0.346,), "sde": (0.608,)},
    {},
)
ABLATIONS = (
    PapersTable(
        "image branch, semantic branch (MUSE-VL; published: mean of MMBench, SEED and MMStar)",
        "arXiv 2411.17762",
        (UNDERSTANDING,),
        {"sde-image": (0.431,), "semantic": (0.627,), "sde": (0.636,)},
        {"sde-image": "image only", "semantic": "semantic only", "sde": "both (SDE)"},
    ),
    PapersTable(
        "where the two losses stand (DualToken; published: zero-shot accuracy, rFID)",
        "arXiv 2503.14324",
        (ZERO_SHOT, RFID),
        {"dualtoken-deep": (0.723, 3.86), "dualtoken-reconstruction": (None, 0.29), "dualtoken": (0.82, 0.25)},
        {
            "dualtoken-deep": "both deep",
            "dualtoken-reconstruction": "reconstruction only",
            "dualtoken": "split layers",
        },
    ),
)
