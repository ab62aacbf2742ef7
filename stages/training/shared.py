"""Data-parallel training: a stage in several processes, each of which computes a part of every batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import PositiveInt, model_validator

from infra.executors import LocalExecutor
from infra.interrupts import done_at_end
from stages.protocol import GpuShare, Outcome, StageContext
from stages.runtime.process import prepare_process
from stages.training.loop import LoopConfig, thread_count
from storage.held_folders import remove_scratch
from storage.manifest import Manifest
from storage.store import Store


class SharedLoopConfig(LoopConfig):
    """Configuration of a training loop with data parallelism."""

    num_processes: PositiveInt = 1
    """Number of data-parallel processes: each has a copy of the model and an equal part of `batch_size`, and their
    gradients are averaged. On a GPU cluster use one per GPU. The last bits of the result depend on the number, because
    sums are split over the processes."""
    gpus_per_worker: GpuShare = 0.0
    """Number of GPUs that each of several processes reserves, 1 or 0: they train on the GPU, or on the CPU without one.
    A single process uses `device`."""

    @model_validator(mode="after")
    def _check_parts(self) -> SharedLoopConfig:
        if self.batch_size % self.num_processes:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be divided equally among num_processes={self.num_processes}; "
                "make it a multiple"
            )
        if self.num_processes == 1:
            return self
        if self.gpus_per_worker not in (0, 1):
            raise ValueError(
                f"gpus_per_worker={self.gpus_per_worker:g} with num_processes={self.num_processes}: processes that "
                "share a batch cannot share a GPU; give each 1, or 0"
            )
        if self.device != "auto" and (self.device != "cpu") != bool(self.gpus_per_worker):
            raise ValueError(
                f"device={self.device} does not fit gpus_per_worker={self.gpus_per_worker:g} with num_processes="
                f"{self.num_processes}; leave device out: several processes train on the GPUs that they hold, else on "
                "the CPU"
            )
        return self

    def computes_on(self) -> str:
        return super().computes_on() if self.num_processes == 1 else self.shared_device

    @property
    def shared_device(self) -> str:
        """The device of each of several processes: its GPU if it reserves one, else the CPU."""
        return "cuda" if self.gpus_per_worker else "cpu"


def run_shared(context: StageContext[Any], function: Callable[[StageContext[Any]], Outcome | None]) -> Outcome:
    """Run a stage's function in this process, or in as many worker processes as its config asks for.

    Args:
        context: context of the stage; its config is a `SharedLoopConfig`.
        function: module-level function that returns the outcome. In several processes `torch.distributed` is
            initialised, and only the outcome of rank 0 is used.
    """
    config: SharedLoopConfig = context.config
    if config.num_processes == 1 or not config.steps:  # without steps there is nothing to parallelise
        outcome = function(context)
    else:
        outcome = context.executor.run_together(
            _Part(function, config, context.seed, context.inputs, context.store, context.action_key),
            num_processes=config.num_processes,
            num_gpus=config.gpus_per_worker,
            scratch=context.scratch,
        )
    assert isinstance(outcome, Outcome), "the first process has an outcome"
    return outcome


@dataclass(frozen=True)
class _Part:
    """Picklable description of the work of a training process; calling it in the process runs the stage's function."""

    function: Callable[[StageContext[Any]], Outcome | None]
    config: SharedLoopConfig
    seed: int
    inputs: dict[str, Manifest]
    store: Store
    action_key: str

    def __call__(self) -> Outcome | None:
        prepare_process()
        config = self.config.model_copy(update={"device": self.config.shared_device})
        with self.store.scratch_dir() as scratch, done_at_end(partial(remove_scratch, scratch)), thread_count(config):
            return self.function(
                StageContext(config, self.seed, self.inputs, self.store, self.action_key, LocalExecutor(), scratch)
            )
