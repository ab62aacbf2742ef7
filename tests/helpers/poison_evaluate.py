"""Evaluation tasks that a row brings down: TEST_POISON, which child processes inherit, is TASK:KEY."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

from stages.evaluate.tasks import EvaluationTasks, TaskFactory


class PoisonableTasks(EvaluationTasks):
    def measure(self, task: str, rows: list[int]) -> list[dict[str, Any]]:
        poisoned_task, _, key = os.environ["TEST_POISON"].partition(":")
        if task == poisoned_task and key in [self.rows.keys[row] for row in rows]:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().measure(task, rows)


@dataclass(frozen=True)
class PoisonableTaskFactory(TaskFactory):
    def __call__(self) -> EvaluationTasks:
        return PoisonableTasks(self)
