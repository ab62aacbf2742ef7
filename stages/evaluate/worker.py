"""The worker of `evaluate`: it runs one of the tasks on a range of held-out rows; rows that kill it are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.evaluate.results import store_rows
from stages.evaluate.tasks import SAME_CATEGORY, TaskFactory
from stages.mapped.engine import LeftOut, Receipt, Shard
from stages.mapped.isolation import InputCrashed, Sandbox, Wording, isolate

CRASHED = "crashed_worker"
"""Status of a row that kills the process that measures it."""
WORDING = Wording(
    input="row",
    done="measured",
    worker="evaluation worker",
    remedy="check the models, memory and evaluate.rows_per_shard",
    memory_remedy="lower evaluate.num_workers or evaluate.rows_per_shard",
)


@dataclass(frozen=True)
class EvaluationShard(Shard):
    """A range of held-out rows and the task that measures them."""

    task: str
    """Name of the task, a key of `stages.evaluate.results.FILES`."""
    start: int
    count: int


@dataclass(frozen=True)
class MeasuredShard(Receipt):
    """The receipt of a measured range."""

    task: str
    rows: int
    """Number of held-out rows, including those that were left out."""
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class EvaluationWorkerFactory:
    """Picklable description of a worker; the models are loaded in the worker process on first use."""

    tasks: TaskFactory

    def __call__(self) -> EvaluationWorker:
        return EvaluationWorker(self.tasks)


class EvaluationWorker:
    """Measures ranges of held-out rows with the models that it holds."""

    def __init__(self, factory: TaskFactory) -> None:
        self._factory = factory
        self._tasks = factory()

    def make(self, shard: EvaluationShard, *, isolated: bool) -> MeasuredShard:
        """Measure a range of rows and store its table; see `stages.mapped.engine.MakesShards`."""
        rows = list(range(shard.start, shard.start + shard.count))
        left_out: list[LeftOut] = []
        if isolated:
            found, left_out = self._measure_isolated(shard.task, rows)
        else:
            found = self._tasks.measure(shard.task, rows)
        files = store_rows(self._factory.store, shard.shard, shard.task, found)
        return MeasuredShard(tuple(files), shard.task, len(rows), tuple(left_out))

    def _measure_isolated(self, task: str, rows: list[int]) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """Measure in a child process, and find the rows that kill it."""
        keys = [self._tasks.rows.keys[row] for row in rows]
        with Sandbox(self._factory, WORDING) as sandbox:

            def measure(slots: list[int]) -> list[list[dict[str, Any]]]:
                found = sandbox.call("measure", task, [rows[slot] for slot in slots])
                return _by_key(found, [keys[slot] for slot in slots])

            isolated = isolate(measure, keys, WORDING, causes=InputCrashed)
        measured = [row for of_one_key in isolated.results for row in of_one_key]
        # The same order as without isolation: all questions with one kind of distractors before those with the other
        measured.sort(key=lambda row: row.get("distractors") == SAME_CATEGORY)
        return measured, [LeftOut(keys[slot], CRASHED, failure.error) for slot, failure in isolated.failures.items()]


def _by_key(found: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Group the rows of a result table by key."""
    rows: dict[str, list[dict[str, Any]]] = {key: [] for key in keys}
    for row in found:
        rows[row["key"]].append(row)
    return list(rows.values())
