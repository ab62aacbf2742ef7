"""Construction of metric rows: each has a metric of the catalogue, a model in a role, and the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from models.metrics.measures import Interval, mean_interval, wilson_interval
from stages.metrics.catalogue import full_name, metric_of
from storage.tables import OURS, Role


@dataclass(frozen=True)
class RowMaker:
    """The common part of the rows of one model on one benchmark."""

    model: str
    benchmark: str
    split: str
    settings: dict[str, Any]
    """Settings of every row; a row may add more."""
    role: Role = OURS

    def of(self, model: str, role: Role) -> RowMaker:
        """Return the same for another model."""
        return replace(self, model=model, role=role)

    def mean(self, metric: str, values: Sequence[float], **settings: Any) -> dict[str, Any]:
        """Make a row of the mean over samples with its normal 95% interval."""
        interval = mean_interval(torch.tensor(values, dtype=torch.float64))
        return self._row(metric, "", interval, len(values), settings)

    def share(self, metric: str, correct: Sequence[bool], qualifier: str = "", **settings: Any) -> dict[str, Any]:
        """Make a row of the fraction of correct samples with its Wilson 95% interval."""
        return self._row(metric, qualifier, wilson_interval(sum(correct), len(correct)), len(correct), settings)

    def number(
        self, metric: str, value: float, num_samples: int, qualifier: str = "", **settings: Any
    ) -> dict[str, Any]:
        """Make a row of one number for all samples, without an interval."""
        return self._row(metric, qualifier, value, num_samples, settings)

    def _row(
        self, metric: str, qualifier: str, found: Interval | float, num_samples: int, settings: dict[str, Any]
    ) -> dict[str, Any]:
        if qualifier and not metric_of(metric).qualifier:
            raise ValueError(
                f"metric {metric!r} has no qualifier by its entry in the catalogue, yet a row has {qualifier!r}"
            )
        value, low, high = found if isinstance(found, Interval) else (found, None, None)
        return {
            "model": self.model,
            "role": self.role,
            "benchmark": self.benchmark,
            "split": self.split,
            "metric": metric_of(metric).name,
            "qualifier": qualifier,
            "value": value,
            "ci_low": low,
            "ci_high": high,
            "num_samples": num_samples,
            "settings": self.settings | settings,
        }


def name_of(row: dict[str, Any]) -> str:
    """Return the name of a row's metric with its qualifier."""
    return full_name(row["metric"], row["qualifier"])


def artifact_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the values of rows as an artifact's metrics: ours by benchmark and name, others under their model."""
    found: dict[str, Any] = {}
    for row in rows:
        group = found if row["role"] == OURS else found.setdefault(row["model"], {})
        group.setdefault(row["benchmark"], {})[name_of(row)] = row["value"]
    return found
