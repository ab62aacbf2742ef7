"""The Prefect task: it runs a stage, retries infrastructure errors and publishes a summary."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.prefect_server import is_ours
from flows.text import one_line
from infra import interrupts
from infra.executors import ClusterNotStarted, ExecutorName, build_executor
from infra.malloc import give_back_freed_memory
from infra.worker_errors import WorkerDied, WorkerFailed
from stages.pipeline.command import default_store
from stages.pipeline.execution import check_ready, run_stage
from stages.pipeline.recipe import STAGES, load_recipe
from storage.store import Store

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun
    from prefect.tasks import Task

    from stages.pipeline.execution import StageResult

RETRY_DELAYS_SECONDS = [5.0, 30.0]
"""Seconds to wait before each retry of a stage after an infrastructure error."""

_STARTED_BY_A_WORKER = "PREFECT__FLOW_RUN_ID"
"""Environment variable that Prefect's workers set for the process of a flow run."""
_INFRASTRUCTURE_MODULES = ("ray", "botocore", "aiohttp", "urllib3", "urllib", "http", "ssl", "socket")
_INFRASTRUCTURE_ERRORS = (ConnectionError, TimeoutError, InterruptedError)


@dataclass(frozen=True)
class StageSummary:
    """The result of a stage, small enough to be passed between tasks."""

    stage: str
    digest: str
    kind: str
    hit: bool
    """Whether the store had the result already."""
    seconds: float
    """Wall time of this call."""
    num_files: int
    size: int
    """Total size of the artifact's files in bytes."""


@contextmanager
def stage_tasks(
    recipe_name: str, store_uri: str | None, overrides: Sequence[str], executor_name: ExecutorName
) -> Iterator[Callable[..., StageSummary]]:
    """Yield the function `stage(name, *feeders)` that runs a stage as a Prefect task.

    Recipe, store and executor are opened once and passed to the task as a closure, since Prefect would traverse them as
    task parameters. So the whole run uses one Ray cluster, which starts when the first stage needs it.

    Raises:
        ValueError, OSError, StoreError: the recipe or the store cannot be used, or a stage lacks a requirement.
    """
    recipe = load_recipe(recipe_name, list(overrides))
    store = Store(store_uri or default_store())
    executor = build_executor(executor_name)
    check_ready(recipe, store, executor)
    run_id = uuid.uuid4().hex

    @task(
        name="stage",
        task_run_name="{name}",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=len(RETRY_DELAYS_SECONDS),
        retry_delay_seconds=RETRY_DELAYS_SECONDS,
        retry_condition_fn=_is_worth_a_retry,
    )
    def stage(name: str, feeders: tuple[StageSummary, ...]) -> StageSummary:
        given = tuple(feeder.stage for feeder in feeders)
        if given != STAGES[name].inputs:
            raise ValueError(f"flows/pipeline.py feeds {name} from {given}; the stage takes {STAGES[name].inputs}")
        try:
            result = run_stage(name, recipe, store, executor, run_id=run_id)
        except Exception as error:
            if is_infrastructure_error(error):
                executor.close()  # so that the retry starts or joins a working cluster
            raise
        if not result.hit:
            give_back_freed_memory()  # the next stage's workers need this memory while this process waits for them
        create_markdown_artifact(
            key=artifact_key(recipe.name, name),
            markdown=summary_markdown(result),
            description=f"stage {name} of recipe {recipe.name}",
        )
        return _summary(result)

    with _signals():
        try:
            yield lambda name, *feeders: stage(name, feeders)
        finally:
            executor.close()


@contextmanager
def _signals() -> Iterator[None]:
    """End the flow at once on a signal if its server is temporary; otherwise report its state to the server."""
    if is_ours():
        interrupts.take_back_signals()  # the flow has installed Prefect's own handler of SIGTERM
        yield
        return
    with interrupts.reported_signals(owned=_STARTED_BY_A_WORKER in os.environ):
        yield


def is_infrastructure_error(error: BaseException | None) -> bool:
    """Return whether a retry may help: a network, a service or a cluster failed, and not the input or the code."""
    while error is not None:
        module = type(error).__module__.partition(".")[0]
        if isinstance(error, _INFRASTRUCTURE_ERRORS) or module in _INFRASTRUCTURE_MODULES:
            return True
        if isinstance(error, (ValueError, TypeError, KeyError, WorkerDied, WorkerFailed, ClusterNotStarted)):
            return False
        error = error.__cause__
    return False


def _is_worth_a_retry(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and is_infrastructure_error(error)


def artifact_key(recipe: str, stage: str) -> str:
    """Return the key of a Prefect artifact: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{recipe}-{stage}".lower()).strip("-")


def summary_markdown(result: StageResult) -> str:
    """Format a stage's result as two Markdown tables: facts and metrics."""
    manifest = result.manifest
    facts = {
        "artifact": f"`{result.digest}`",
        "kind": manifest.kind,
        "result": "found in the store" if result.hit else "made now",
        "seconds": f"{result.seconds:.1f}",
        "files": f"{len(manifest.files)} ({manifest.size:,} bytes)",
    }
    facts |= {f"input {name}": f"`{digest[:12]}`" for name, digest in manifest.inputs.items()}
    text = f"## {result.stage}\n\n" + _table("", "", facts)
    metrics = dict(_flat("", manifest.metrics))
    return text + ("\n### Metrics\n\n" + _table("metric", "value", metrics) if metrics else "")


def _table(left: str, right: str, rows: dict[str, Any]) -> str:
    def cell(text: str) -> str:
        return one_line(text).replace("|", "/").replace("<", "&lt;")

    lines = [f"| {cell(name)} | {cell(str(value))} |" for name, value in rows.items()]
    return "\n".join([f"| {left} | {right} |", "| --- | --- |", *lines]) + "\n"


def _flat(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield scalars of nested dictionaries under dotted names; lists (curves) are left out."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        elif isinstance(value, float):
            yield f"{prefix}{name}", f"{value:.6g}"
        elif not isinstance(value, list):
            yield f"{prefix}{name}", value


def _summary(result: StageResult) -> StageSummary:
    manifest = result.manifest
    return StageSummary(
        stage=result.stage,
        digest=result.digest,
        kind=manifest.kind,
        hit=result.hit,
        seconds=result.seconds,
        num_files=len(manifest.files),
        size=manifest.size,
    )
