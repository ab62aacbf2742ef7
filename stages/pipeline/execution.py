"""Execution of a stage: its result is looked up in the store or made, and the run is recorded."""

from __future__ import annotations

import logging
import os
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch

from infra.executors import Executor
from infra.interrupts import done_at_end
from stages.pipeline.errors import named_full_disk
from stages.pipeline.recipe import STAGES, Recipe
from stages.pipeline.recipe_files import check_stage_name
from stages.protocol import Stage, StageContext, normalised_config
from stages.runtime.devices import acceptable_precisions, warn_of_emulation
from stages.training.loop import LoopConfig, thread_count
from stages.training.shared import SharedLoopConfig
from storage.held_folders import remove_scratch
from storage.manifest import Manifest
from storage.store import Store

logger = logging.getLogger(__name__)


class MissingInput(ValueError):
    """Raised if a stage is run before the stages that make its inputs."""


@dataclass(frozen=True)
class StageResult:
    """The result of running a stage."""

    stage: str
    action_key: str
    manifest: Manifest
    hit: bool
    """Whether the store had the result already."""
    seconds: float
    """Wall time of this call."""

    @property
    def digest(self) -> str:
        """Digest of the artifact."""
        return self.manifest.digest


def run_stage(name: str, recipe: Recipe, store: Store, executor: Executor, *, run_id: str = "") -> StageResult:
    """Run one stage of a recipe; its inputs are looked up in the store.

    Args:
        name: name of the stage.
        recipe: configs and seed.
        store: the store with the inputs, to which the result is written.
        executor: executor of mapped work.
        run_id: identifier that groups the records of one pipeline run.

    Returns:
        The artifact, made now or found in the store.

    Raises:
        MissingInput: an input artifact is not in the store; the message names the command that makes it.
    """
    started = time.monotonic()
    stage = _stage(name)
    feeders = stage.feeders(recipe.section(stage))
    available = find_artifacts(recipe, store, list(feeders))
    inputs = {feeder: _required(feeder, available, recipe, store, needed_by=name) for feeder in feeders}
    wanted = _wanted(stage, recipe, inputs)
    found = _look_up(wanted, store)
    if found is not None:
        key, manifest = found
        result = StageResult(name, key, manifest, True, time.monotonic() - started)
    else:
        key, config = next(iter(wanted.items()))
        logger.info("stage %s: making %s", name, key[:12])
        warn_of_emulation(config, stage.section)
        with (
            store.scratch_dir() as scratch,
            done_at_end(partial(remove_scratch, scratch)),
            named_full_disk(scratch, store.uri),
        ):
            context: StageContext[Any] = StageContext(config, recipe.seed, inputs, store, key, executor, scratch)
            with thread_count(config):
                outcome = stage.run(context)
        manifest = Manifest(
            kind=outcome.kind,
            schema_version=outcome.schema_version,
            stage=name,
            config=normalised_config(config),
            inputs={feeder: input_manifest.digest for feeder, input_manifest in inputs.items()},
            files=tuple(outcome.files),
            metrics=outcome.metrics,
            metadata=outcome.metadata,
        )
        digest = store.commit(key, manifest).digest
        store.work(key).drop_checkpoints()
        result = StageResult(name, key, store.load(digest), False, time.monotonic() - started)
    store.record_run(_record(result, recipe, run_id))
    return result


def check_ready(recipe: Recipe, store: Store, executor: Executor, names: list[str] | None = None) -> None:
    """Check before any work that files and GPUs exist, which stages would otherwise notice after hours.

    A stage whose result is in the store needs neither.

    Args:
        recipe: configs.
        store: the store, which may have results already.
        executor: executor of mapped work.
        names: names of the stages that will run; default all.

    Raises:
        ValueError, OSError: a file or a GPU is missing; the message names the field.
    """
    for name, artifact in find_artifacts(recipe, store, names).items():
        if artifact is None:
            stage = STAGES[name]
            config = recipe.section(stage)
            if stage.external_inputs is not None:
                stage.external_inputs(config)
            _check_device(config, stage.section, executor)


def _check_device(config: Any, section: str, executor: Executor) -> None:
    together = isinstance(config, SharedLoopConfig) and config.num_processes > 1
    alone = isinstance(config, LoopConfig) and not together  # runs in this process, wherever workers run
    device = getattr(config, "device", "auto")
    gpus = 0.0 if alone else getattr(config, "gpus_per_worker", 0.0)
    if (device != "cuda" and not gpus) or not (alone or executor.on_this_machine) or torch.cuda.is_available():
        return
    what = f"gpus_per_worker={gpus:g}" if gpus else f"device={device}"
    remedy = f"set {section}.gpus_per_worker to 0" if gpus else f"set {section}.device to auto or cpu"
    raise ValueError(f"{section}.{what} needs a GPU, and PyTorch finds none on this machine; {remedy}")


def require_artifact(name: str, recipe: Recipe, store: Store, *, needed_by: str) -> Manifest:
    """Return the artifact of a recipe's stage from the store.

    Raises:
        MissingInput: it is not in the store.
    """
    return _required(name, find_artifacts(recipe, store, [name]), recipe, store, needed_by=needed_by)


def _required(
    name: str, available: dict[str, Manifest | None], recipe: Recipe, store: Store, *, needed_by: str
) -> Manifest:
    manifest = available[name]
    if manifest is None:
        raise MissingInput(
            f"{needed_by} needs the artifact of {name}, which the store {store.uri} does not hold for recipe "
            f"{recipe.name!r}; run `musevl stage {name}` with the same recipe, store and overrides first"
        )
    return manifest


def find_artifact(name: str, recipe: Recipe, store: Store) -> Manifest | None:
    """Return the artifact of a recipe's stage, or None if it or one of its inputs is not in the store."""
    return find_artifacts(recipe, store, [name])[name]


def find_artifacts(recipe: Recipe, store: Store, names: list[str] | None = None) -> dict[str, Manifest | None]:
    """Return the artifacts of several stages (default: all) as `find_artifact` does, each looked up once, in order."""
    found: dict[str, Manifest | None] = {}

    def resolve(name: str) -> Manifest | None:
        if name not in found:
            stage = _stage(name)
            feeders = stage.feeders(recipe.section(stage))
            inputs = {feeder: artifact for feeder in feeders if (artifact := resolve(feeder)) is not None}
            complete = len(inputs) == len(feeders)
            hit = _look_up(_wanted(stage, recipe, inputs), store) if complete else None
            found[name] = hit[1] if hit is not None else None
        return found[name]

    return {name: resolve(name) for name in names or list(STAGES)}


def _wanted(stage: Stage[Any], recipe: Recipe, inputs: dict[str, Manifest]) -> dict[str, Any]:
    """Return the configs whose results are acceptable by their action keys, the one for this machine first."""
    digests = {feeder: manifest.digest for feeder, manifest in inputs.items()}
    configs = acceptable_precisions(recipe.section(stage), inputs)
    return {stage.action_key(config, recipe.seed, digests): config for config in configs}


def _look_up(wanted: dict[str, Any], store: Store) -> tuple[str, Manifest] | None:
    """Return the first of some action keys that has an artifact, with the artifact."""
    return next(((key, manifest) for key in wanted if (manifest := store.lookup(key)) is not None), None)


def _stage(name: str) -> Stage[Any]:
    if name not in STAGES:
        check_stage_name(name)
    return STAGES[name]


def _record(result: StageResult, recipe: Recipe, run_id: str) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "recipe": recipe.name,
        "seed": recipe.seed,
        "stage": result.stage,
        "action_key": result.action_key,
        "artifact": result.digest,
        "hit": result.hit,
        "seconds": round(result.seconds, 3),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()},
    }
