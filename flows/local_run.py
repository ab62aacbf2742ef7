"""Runs the Prefect flows in this process, with the server at PREFECT_API_URL or else with a temporary server."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from infra.terminal import said_if_slow
from stages.runtime.process import prepare_process

if TYPE_CHECKING:
    from flows.report.comparison import Comparison
    from flows.stage_task import StageSummary
    from infra.executors import ExecutorName

# The stages log to the terminal themselves; Prefect stores its own log lines and ours with the run.
_SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "stages,infra,storage",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
_STARTING = "starting Prefect"


def run_pipeline(recipe: str, store: str, overrides: Sequence[str], executor: ExecutorName) -> list[StageSummary]:
    """Run `full_pipeline` and return its summaries.

    Raises:
        ValueError, OSError, StoreError: the recipe or the store cannot be used; raised before the flow starts.
        ConnectionError: the temporary server did not start.
    """
    _check(recipe, store, overrides, executor)
    with _server() as wait:
        with said_if_slow(_STARTING):
            from flows.pipeline import full_pipeline

            wait()
        return full_pipeline(recipe=recipe, store=store, overrides=list(overrides), executor=executor)


def run_comparison(
    recipe: str, store: str, overrides: Sequence[str], executor: ExecutorName, kinds: list[str], seeds: list[int]
) -> Comparison:
    """Run `compare_tokenizers` and return its results.

    Raises:
        ValueError, OSError, StoreError: a kind, the recipe or the store cannot be used; raised before the flow starts.
        ConnectionError: the temporary server did not start.
    """
    from flows.report.comparison import collect_comparison, overrides_of

    for kind in kinds:
        _check(recipe, store, overrides_of(kind, seeds[0], list(overrides)), executor)
    with _server() as wait:
        with said_if_slow(_STARTING):
            from flows.comparison import compare_tokenizers

            wait()
        compare_tokenizers(
            kinds=kinds, seeds=seeds, recipe=recipe, store=store, overrides=list(overrides), executor=executor
        )
    from storage.store import Store

    return collect_comparison(recipe, kinds, seeds, list(overrides), Store(store))


def _server() -> AbstractContextManager[Callable[[], None]]:
    prepare_process()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from flows.prefect_server import prefect_server

    return prefect_server()


def _check(recipe: str, store: str, overrides: Sequence[str], executor: ExecutorName) -> None:
    prepare_process()
    with said_if_slow(f"checking recipe {recipe}: loading PyTorch"):
        from infra.executors import build_executor
        from stages.pipeline.execution import check_ready
        from stages.pipeline.recipe import load_recipe
        from storage.store import Store

        check_ready(load_recipe(recipe, list(overrides)), Store(store), build_executor(executor))
