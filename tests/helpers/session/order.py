"""Which tests come first, and which of them share a process of xdist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[3]
SLOWEST_FIRST = (
    "tests/stages/pipeline/test_resume.py",
    "tests/flows/test_pipeline.py",
    "tests/flows/test_deployment.py",
    "tests/flows/test_interrupts.py",
    "tests/flows/test_comparison.py",
    "tests/storage/test_faults.py",
    "tests/stages/pipeline/test_crashes.py",
    "tests/stages/training/test_shared.py",
    "tests/stages/metrics/test_measuring.py",
    "tests/infra/test_executors.py",
    "tests/stages/pipeline/test_kills.py",
    "tests/stages/tokenize/test_poison.py",
    "tests/flows/test_ray_job.py",
    "tests/stages/pipeline/test_execution.py",
    "tests/stages/train_tokenizer/test_train_tokenizer.py",
    "tests/stages/download/test_download_failures.py",
    "tests/stages/download/test_download.py",
    "tests/flows/test_prefect_server.py",
    "tests/stages/tokenize/test_tokenize.py",
    "tests/stages/prepare_teacher/test_prepare_teacher.py",
)
"""Files of tests that take longest, so that no process is left with one of them at the end. The first makes the tiny
run; what follows it begins with tests that do without, so that the other process does not wait for it."""

ONE_PREFECT_SERVER = frozenset(
    f"tests/flows/test_{name}.py" for name in ("comparison", "deployment", "interrupts", "pipeline")
)
"""Files that share the fixture `prefect_server`, and so the process that has it."""


def slowest_first(items: list[pytest.Item]) -> None:
    """Sort tests by the place of their file in that list; all others keep their order and come last."""
    places = {file: place for place, file in enumerate(SLOWEST_FIRST)}
    if missing := [file for file in places if not (ROOT / file).exists()]:
        raise pytest.UsageError(f"tests/helpers/session/order.py names {missing}, which do not exist")
    items.sort(key=lambda item: places.get(item.path.relative_to(ROOT).as_posix(), len(places)))


class ByFile(LoadScopeScheduling):
    """Gives a process a file of tests at a time, in the order of collection (xdist's own would be by their number).

    Files that share a server count as one.
    """

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return "one Prefect server" if file in ONE_PREFECT_SERVER else file
