"""One function in several processes at once, joined by torch.distributed: on this machine, or on a Ray cluster.

A death of one of them ends all: their sums wait for one another. All are then started again, and the function has to
find by itself where it was (training stages do, by their checkpoints).
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from infra.worker_errors import WorkerDied, is_worker_death, portable

logger = logging.getLogger(__name__)

Function = Callable[[], Any]

RESTARTS = 3
"""How often all processes are started again after one was lost."""
_TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others: one may be writing a large checkpoint meanwhile."""


class _Lost(Exception):
    """Processes died, or raised what a process raises whose peer died.

    Attributes:
        raised: the exceptions of those that did not die.
    """

    def __init__(self, what: str, raised: list[Exception]) -> None:
        super().__init__(what)
        self.raised = raised


def run_here(function: Function, num_processes: int, num_gpus: float) -> Any:
    """Run a function in processes of this machine, which talk over its loopback interface.

    Args:
        function: picklable; finds `torch.distributed` ready.
        num_processes: how many.
        num_gpus: of each; above 0, process n takes the n-th GPU and they talk by NCCL, else by gloo.

    Returns:
        What the function returns in process 0.

    Raises:
        ValueError: there are fewer GPUs.
        WorkerDied: processes died again and again.
        Exception: whatever the function raised.
    """
    if num_gpus:
        import torch

        found = torch.cuda.device_count()
        if found < num_processes:
            raise ValueError(
                f"{num_processes} workers with a GPU each, and this machine has {found}; set num_workers of the stage "
                f"to {max(1, found)}, or gpus_per_worker to 0"
            )
    return _outliving_deaths(lambda: _run_here_once(function, num_processes, num_gpus))


def run_on_ray(function: Function, num_processes: int, resources: dict[str, float]) -> Any:
    """Run a function in workers of Ray Train, on the cluster that this process is connected to.

    Args:
        function: picklable; finds `torch.distributed` ready.
        num_processes: how many.
        resources: of each, by Ray's names; with a GPU they talk by NCCL, else by gloo.

    Returns, raises: as `run_here`.
    """
    return _outliving_deaths(lambda: _run_on_ray_once(function, num_processes, resources))


def _outliving_deaths(run_once: Callable[[], Any]) -> Any:
    for restart in range(RESTARTS + 1):
        try:
            return run_once()
        except _Lost as lost:
            if restart < RESTARTS:
                logger.warning("%s; all workers start again from the last checkpoint", lost)
            elif lost.raised:
                raise lost.raised[0] from None
            else:
                raise WorkerDied(
                    f"{lost}, and had died {RESTARTS} times before (out of memory?); give each worker more memory or a "
                    "smaller part of the batch. The same command goes on from the last checkpoint"
                ) from None
    raise AssertionError("the last round returns or raises")


def _may_be_of_a_lost_peer(error: Exception) -> bool:
    """What collectives raise when another process is gone: NCCL's own type, or gloo's plain RuntimeError."""
    from torch.distributed import DistError

    return type(error) is RuntimeError or isinstance(error, DistError)


def _raise_or_lose(raised: list[Exception], what: str) -> None:
    """Raise the first exception that has nothing to do with a lost process, else `_Lost`."""
    for error in raised:
        if not _may_be_of_a_lost_peer(error):
            raise error
    raise _Lost(what, raised)


def _run_here_once(function: Function, num_processes: int, num_gpus: float) -> Any:
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

    with tempfile.TemporaryDirectory(prefix="musevl-group-") as name:
        folder = Path(name)
        arguments = (num_processes, num_gpus > 0, folder, pickle.dumps(function))
        try:
            start_processes(_be_a_process, arguments, num_processes, daemon=True, start_method="spawn")
        except (ProcessRaisedException, ProcessExitedException) as error:
            raised = [pickle.loads(path.read_bytes()) for path in sorted(folder.glob("raised-*"))]
            signal = getattr(error, "signal_name", None)
            _raise_or_lose(raised, f"worker {error.error_index} died" + (f" of {signal}" if signal else ""))
        return pickle.loads((folder / "result").read_bytes())


def _be_a_process(rank: int, num_processes: int, with_gpu: bool, folder: Path, function: bytes) -> None:
    import torch
    import torch.distributed as dist

    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, "lo0" if sys.platform == "darwin" else "lo")
    try:
        if with_gpu:
            torch.cuda.set_device(rank)
        dist.init_process_group(
            "nccl" if with_gpu else "gloo",
            init_method=f"file://{folder}/meeting",
            rank=rank,
            world_size=num_processes,
            timeout=_TIMEOUT,
        )
        result = pickle.loads(function)()
    except Exception as error:
        _write_whole(folder / f"raised-{rank}", portable(error))
        raise
    if rank == 0:
        _write_whole(folder / "result", result)
    dist.destroy_process_group()


def _write_whole(path: Path, value: Any) -> None:
    unfinished = path.with_name(f"unfinished-{path.name}")
    unfinished.write_bytes(pickle.dumps(value))
    unfinished.rename(path)


def _run_on_ray_once(function: Function, num_processes: int, resources: dict[str, float]) -> Any:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    with tempfile.TemporaryDirectory(prefix="musevl-train-") as folder, _first_workers_stderr() as stderr:
        trainer = TorchTrainer(
            _be_a_ray_worker,
            train_loop_config={"function": pickle.dumps(function), "stderr": stderr},
            torch_config=TorchConfig(timeout_s=int(_TIMEOUT.total_seconds())),
            scaling_config=ScalingConfig(
                num_workers=num_processes, use_gpu=resources.get("GPU", 0) > 0, resources_per_worker=resources
            ),
            # No restarts by Ray: it would also repeat what failed for a reason
            run_config=RunConfig(name=uuid.uuid4().hex, storage_path=folder),
        )
        try:
            return cast(Any, trainer.fit()).return_value  # of Train v2's Result, which the types do not know
        except WorkerGroupError as error:
            failures = sorted(error.worker_failures.items())
            dead = [rank for rank, failure in failures if _is_lost(failure)]
            raised = [_as_raised(failure) for rank, failure in failures if rank not in dead]
            what = f"worker {dead[0]} died" if dead else "a worker lost another"
            _raise_or_lose(raised, what)


def _is_lost(failure: Exception) -> bool:
    """Whether a worker died; Ray Train has types of its own for one that does not answer, or not in time."""
    from ray.train.v2._internal.exceptions import RayTrainError

    return isinstance(failure, RayTrainError) or is_worker_death(failure)


def _as_raised(failure: Exception) -> Exception:
    cause = getattr(failure, "cause", None) or failure.__cause__
    return cause if isinstance(cause, Exception) else failure


def _be_a_ray_worker(config: dict[str, Any]) -> Any:
    import torch.distributed as dist

    try:
        if dist.get_rank() == 0:
            with redirect_stderr(config["stderr"]):
                return pickle.loads(config["function"])()
        return pickle.loads(config["function"])()
    except Exception as error:
        raise portable(error) from None


class _DistantStderr(io.TextIOBase):
    """The driver's stderr, in a worker: what is written to it goes there through a queue."""

    def __init__(self, queue: Any, is_terminal: bool) -> None:
        self._queue, self._is_terminal = queue, is_terminal

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._queue, self._is_terminal)

    def write(self, text: str) -> int:
        self._queue.put(text)
        return len(text)

    def isatty(self) -> bool:
        return self._is_terminal


@contextmanager
def _first_workers_stderr() -> Iterator[_DistantStderr]:
    """A stderr for the first worker, so that its progress is seen where the stage was started."""
    from ray.util.queue import Empty, Queue

    queue = Queue(actor_options={"num_cpus": 0})
    ended = threading.Event()

    def show() -> None:
        while True:
            try:
                sys.stderr.write(queue.get(timeout=0.5))
                sys.stderr.flush()
            except Empty:
                if ended.is_set():
                    return

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield _DistantStderr(queue, sys.stderr.isatty())
    finally:
        ended.set()
        thread.join()
        queue.shutdown(force=True)
