"""The Prefect flows in this process: with the server of PREFECT_API_URL, else with a temporary one that it starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.standalone import prepare_process

if TYPE_CHECKING:
    from flows.comparison_data import Comparison
    from flows.stage_task import StageSummary
    from infra.executors import ExecutorName

# What the stages say is on the terminal already; Prefect keeps its own log lines, and ours, with the run.
_SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # a loaded machine needs longer than the 20 s that are the default
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "stages,infra,storage",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}


def run_pipeline(recipe: str, store: str, overrides: Sequence[str], executor: ExecutorName) -> list[StageSummary]:
    """Run `full_pipeline` and return its summaries.

    Raises:
        ValueError, OSError, StoreError: the recipe or the store cannot be used; before any server is started.
    """
    _prepare(recipe, store, overrides)
    from flows.interrupts import own_processes
    from flows.pipeline import full_pipeline

    own_processes()

    return full_pipeline(recipe=recipe, store=store, overrides=list(overrides), executor=executor)


def run_comparison(
    recipe: str, store: str, overrides: Sequence[str], executor: ExecutorName, kinds: list[str], seeds: list[int]
) -> Comparison:
    """Run `compare_tokenizers` and read what it found.

    Raises:
        ValueError, OSError, StoreError: a kind, the recipe or the store cannot be used; before any server is started.
    """
    from flows.comparison_data import collect_comparison, overrides_of

    if not kinds:
        raise ValueError("--kinds names no tokenizer; write for example --kinds vqgan,sde")
    for kind in kinds:
        _prepare(recipe, store, overrides_of(kind, seeds[0], list(overrides)))
    from flows.comparison import compare_tokenizers
    from flows.interrupts import own_processes

    own_processes()
    compare_tokenizers(
        kinds=kinds, seeds=seeds, recipe=recipe, store=store, overrides=list(overrides), executor=executor
    )
    from storage.store import Store

    return collect_comparison(recipe, kinds, seeds, list(overrides), Store(store))


def _prepare(recipe: str, store: str, overrides: Sequence[str]) -> None:
    prepare_process()
    from stages.recipe import load_recipe
    from storage.store import Store

    load_recipe(recipe, list(overrides))
    Store(store)
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
