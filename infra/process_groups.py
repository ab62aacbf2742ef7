"""Runs a function in a group of processes with `torch.distributed`: on this machine, or on a Ray cluster.

If one process dies, all are ended, because their collectives would wait for it. All are then restarted, and the
function has to resume by itself (training stages resume from their checkpoints).
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, redirect_stderr, suppress
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar, cast

from infra.worker_errors import WorkerDied, is_worker_death, portable

logger = logging.getLogger(__name__)

Function = Callable[[], Any]
T = TypeVar("T")

RESTARTS = 3
"""Number of restarts of the group after the death of a process."""
_TIMEOUT = timedelta(hours=2)
"""Timeout of collectives: another process may be writing a large checkpoint."""


class _Lost(Exception):
    """Raised if the group has ended in a way that a restart may cure.

    Attributes:
        died: whether a process is known to have died; otherwise one raised an error that is typical of a lost peer.
        raised: exceptions of the processes that did not die.
    """

    def __init__(self, what: str, *, died: bool, raised: list[Exception]) -> None:
        super().__init__(what)
        self.died, self.raised = died, raised


def run_here(function: Function, num_processes: int, num_gpus: float, scratch: Path | None = None) -> Any:
    """Run a function in a group of processes of this machine, which communicate over its loopback interface.

    Args:
        function: picklable; called after `torch.distributed` is initialised.
        num_processes: number of processes.
        num_gpus: number of GPUs per process; above 0, process n uses the n-th GPU and the backend is NCCL, else gloo.
        scratch: folder for temporary files, which its owner cleans up if this process is killed; by default that of
            the system.

    Returns:
        The result of the function in rank 0.

    Raises:
        ValueError: there are too few GPUs.
        WorkerDied: the restarts are used up.
        Exception: whatever the function raised.
    """
    if num_gpus:
        import torch

        found = torch.cuda.device_count()
        if found < num_processes:
            raise ValueError(
                f"{num_processes} processes with a GPU each, and this machine has {found}; set num_processes of the "
                f"stage to {max(1, found)}, or gpus_per_worker to 0"
            )
    return _outliving_deaths(lambda: _run_here_once(function, num_processes, num_gpus, scratch))


def run_on_ray(
    function: Function, num_processes: int, resources: dict[str, float], scratch: Path | None = None, *, waits: bool
) -> Any:
    """Run a function in workers of Ray Train, on the cluster that this process is connected to.

    Returns and raises the same as `run_here`.

    Args:
        function: picklable; called after `torch.distributed` is initialised.
        num_processes: number of processes.
        resources: Ray resources of each process; the backend is NCCL if they include a GPU, else gloo.
        scratch: folder for temporary files, as in `run_here`.
        waits: whether machines may still join the cluster, so that waiting for resources is worthwhile.
    """
    # Otherwise a worker's working directory is a folder of Ray, where relative paths of a config do not exist
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    return _outliving_deaths(lambda: _run_on_ray_once(function, num_processes, resources, scratch, waits))


def _outliving_deaths(run_once: Callable[[], Any]) -> Any:
    for restart in range(RESTARTS + 1):
        try:
            return run_once()
        except _Lost as lost:
            if restart < RESTARTS:
                logger.warning("%s; all workers restart from the last checkpoint", lost)
            elif lost.raised and not lost.died:
                raise lost.raised[0] from None
            else:
                raise WorkerDied(
                    f"{lost}, after {RESTARTS} restarts (out of memory?); give each worker more memory or a "
                    "smaller part of the batch. The same command resumes from the last checkpoint"
                ) from None
    raise AssertionError("the last round returns or raises")


def _may_be_of_a_lost_peer(error: Exception) -> bool:
    """Return whether a collective may have raised this because a peer is gone: NCCL's type, or gloo's RuntimeError."""
    from torch.distributed import DistError

    return type(error) is RuntimeError or isinstance(error, DistError)


def _raise_unless_of_a_lost_peer(raised: list[Exception]) -> None:
    for error in raised:
        if not _may_be_of_a_lost_peer(error):
            raise error


def _run_here_once(function: Function, num_processes: int, num_gpus: float, scratch: Path | None) -> Any:
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

    with tempfile.TemporaryDirectory(prefix="musevl-group-", dir=scratch) as name:
        folder = Path(name)
        arguments = (num_processes, num_gpus > 0, folder, pickle.dumps(function))
        with _interrupts_blocked():
            started = start_processes(
                _be_a_process, arguments, num_processes, daemon=True, start_method="spawn", join=False
            )
        try:
            while not started.join():
                pass
        except (ProcessRaisedException, ProcessExitedException):
            raised = [pickle.loads(path.read_bytes()) for path in sorted(folder.glob("raised-*"))]
            _raise_unless_of_a_lost_peer(raised)
            # torch has ended the other processes with SIGTERM
            codes = [process.exitcode or 0 for process in started.processes]
            dead = [rank for rank, code in enumerate(codes) if code < 0 and code != -signal.SIGTERM]
            if not dead and raised:
                raise raised[0] from None
            rank = dead[0] if dead else 0
            how = f" of {signal.Signals(-codes[rank]).name}" if codes[rank] < 0 else ""
            raise _Lost(f"worker {rank} died{how}", died=True, raised=raised) from None
        return pickle.loads((folder / "result").read_bytes())


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT in processes started meanwhile, so that Ctrl-C does not print tracebacks of their imports."""
    resource_tracker.ensure_running()  # it would otherwise start with the first process and unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _be_a_process(rank: int, num_processes: int, with_gpu: bool, folder: Path, function: bytes) -> None:
    # Python's handler would wait for a collective to return; torch sends SIGINT when the driver is gone
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
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


def _run_on_ray_once(
    function: Function, num_processes: int, resources: dict[str, float], scratch: Path | None, waits: bool
) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

    temporary = tempfile.TemporaryDirectory(prefix="musevl-train-", dir=scratch)
    with temporary as folder, _first_workers_stderr() as stderr:
        # Failures are handled here, since Ray would also retry errors of the function. It does restart the group
        # itself if a machine is preempted or has not joined yet.
        retries = {"max_failures": 0, "controller_failure_limit": -1 if waits else RESTARTS}
        trainer = TorchTrainer(
            _be_a_ray_worker,
            train_loop_config={"function": pickle.dumps(function), "stderr": stderr},
            torch_config=TorchConfig(timeout_s=int(_TIMEOUT.total_seconds())),
            scaling_config=ScalingConfig(
                num_workers=num_processes, use_gpu=resources.get("GPU", 0) > 0, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=uuid.uuid4().hex, storage_path=folder, failure_config=cast(Any, FailureConfig)(**retries)
            ),
        )
        try:
            result: Any = _in_a_thread(trainer.fit)
            return result.return_value
        except WorkerGroupError as error:
            failures = sorted(error.worker_failures.items())
            dead = [rank for rank, failure in failures if _is_lost(failure)]
            raised = [_as_raised(failure) for rank, failure in failures if rank not in dead]
            _raise_unless_of_a_lost_peer(raised)
            what = f"worker {dead[0]} died" if dead else f"a worker failed ({_first_line(raised)})"
            raise _Lost(what, died=bool(dead), raised=raised) from None
        except TrainingFailedError as error:
            raise _Lost(f"the workers could not be run ({_first_line([error])})", died=True, raised=[]) from None


def _in_a_thread(function: Callable[[], T]) -> T:
    """Call a function in another thread: in the main thread Ray Train installs a SIGINT handler that exits with 0."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised again by `future.result()`
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future.result()


def _first_line(errors: list[Exception]) -> str:
    return next((line for error in errors for line in str(error).splitlines() if line), "no reason given")[:300]


def _is_lost(failure: Exception) -> bool:
    """Return whether a worker died; Ray Train has its own exceptions for workers that do not answer in time."""
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
    """A stderr for workers that forwards what is written to it to the driver's stderr through a queue."""

    def __init__(self, queue: Any, is_terminal: bool) -> None:
        self._queue, self._is_terminal = queue, is_terminal

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._queue, self._is_terminal)

    def write(self, text: str) -> int:
        from ray.exceptions import RayError

        with suppress(RayError):  # a lost line is no reason to stop
            self._queue.put(text)
        return len(text)

    def isatty(self) -> bool:
        return self._is_terminal


@contextmanager
def _first_workers_stderr() -> Iterator[_DistantStderr]:
    """Provide a stderr for the worker of rank 0 that is shown by the driver, where the stage was started."""
    import ray
    from ray.exceptions import RayError
    from ray.util.queue import Empty, Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    ended = threading.Event()

    def show() -> None:
        while True:
            try:
                sys.stderr.write(queue.get(timeout=0.5))
                sys.stderr.flush()
            except Empty:
                if ended.is_set():
                    return
            except RayError:
                return

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield _DistantStderr(queue, sys.stderr.isatty())
    finally:
        ended.set()
        thread.join()
        queue.shutdown(force=True)
