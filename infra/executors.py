"""Executors run the work of stages, in this process and its children or on Ray; stage code does not know which."""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from infra.interrupts import descendants, end_processes, program_name, take_back_signals
from infra.process_groups import Function, run_here, run_on_ray
from infra.terminal import on_one_line
from infra.worker_errors import WorkerDied, is_worker_death, portable

logger = logging.getLogger(__name__)

Item = dict[str, Any]
Worker = Callable[[Item], Item]
WorkerFactory = Callable[[], Worker]
ExecutorName = Literal["local", "ray"]

TASK_RETRIES = 5
"""How often an input is retried in a new worker process after its worker died. An input that waits in a worker's queue
while another input kills the worker loses a retry too. So this is twice what one input may need (`stages.tokenize`
finds the image that kills its worker at the third attempt), plus one for bad luck."""
STARTS = 2
"""Number of attempts to start a local Ray cluster."""
START_S = 120.0
"""Seconds that Ray's processes may take to start, per attempt. Ray's own limits (15 s for its agent, 30 s for all) are
too short on a busy machine: on two cores with eight busy processes a start took 46 s."""
OBJECT_STORE_BYTES = 256 * 2**20
"""Size of the object store of a local cluster, in shared memory; items and results are small."""


class ClusterUnreachable(ConnectionError):
    """Raised if the Ray cluster at `RAY_ADDRESS` does not answer."""


class ClusterNotStarted(OSError):
    """Raised if no Ray cluster can be started on this machine."""


class Executor(Protocol):
    """Runs the work of stages: maps items over workers, and runs process groups."""

    @property
    def on_this_machine(self) -> bool:
        """Whether all workers run on the machine of this process."""
        ...

    def map(
        self, factory: WorkerFactory, items: list[Item], *, num_workers: int, num_gpus: float = 0
    ) -> Iterator[Item]:
        """Map items over workers and yield one result per item, in the order in which they finish.

        An exception of the factory or of a worker ends the iteration and is raised here with its own type and message.

        Args:
            factory: picklable; called once in each worker process, returns the function that is called with each item.
            items: small JSON-like dictionaries, each with everything that its worker needs to find its data.
            num_workers: largest number of workers at a time.
            num_gpus: number of GPUs, or fraction of a GPU, that each worker reserves.

        Raises:
            ValueError: no machine has so many GPUs, and none can join.
            WorkerDied: an input killed every worker process that it was given to.
        """
        ...

    def run_together(
        self, function: Function, *, num_processes: int, num_gpus: float = 0, scratch: Path | None = None
    ) -> Any:
        """Run a function in each process of a `torch.distributed` group; return the result of rank 0.

        If a process dies, the whole group is restarted, up to `RESTARTS` times. An exception of the function ends all
        processes and is raised here with its own type and message.

        Args:
            function: picklable function without arguments.
            num_processes: number of processes.
            num_gpus: number of GPUs per process.
            scratch: folder for temporary files; by default that of the system.

        Raises:
            ValueError: there are too few GPUs, and no more can join.
            WorkerDied: the restarts are used up.
        """
        ...

    def close(self) -> None:
        """Stop what the executor has started; the executor can be used again and then starts it again."""
        ...


class LocalExecutor:
    """Works without Ray: maps items one by one in this process, and runs process groups on this machine."""

    on_this_machine = True

    def map(
        self, factory: WorkerFactory, items: list[Item], *, num_workers: int, num_gpus: float = 0
    ) -> Iterator[Item]:
        if items:
            worker = factory()
            for item in items:
                yield worker(item)

    def run_together(
        self, function: Function, *, num_processes: int, num_gpus: float = 0, scratch: Path | None = None
    ) -> Any:
        return run_here(function, num_processes, num_gpus, scratch)

    def close(self) -> None:
        """Do nothing, since nothing stays running."""


class RayExecutor:
    """Runs work on the Ray cluster at `RAY_ADDRESS` (as in a submitted job), else on a local cluster that it starts.

    It connects or starts a cluster at the first use. A cluster started here accepts only clients with a token made for
    this process, writes nothing to the home folder and is stopped by `close`.

    Args:
        num_cpus: number of cores of a cluster started here; None uses all cores.
    """

    # Class-wide: a process can be connected to one cluster only, which its executors share and one of them has started
    _cluster_is_ours = False

    def __init__(self, num_cpus: int | None = None) -> None:
        self._num_cpus = num_cpus
        self._started = False

    @property
    def on_this_machine(self) -> bool:
        return "RAY_ADDRESS" not in os.environ

    def map(
        self, factory: WorkerFactory, items: list[Item], *, num_workers: int, num_gpus: float = 0
    ) -> Iterator[Item]:
        if not items:
            return
        nodes = self._nodes(num_gpus)
        import ray

        num_actors = max(1, min(num_workers, len(items)))
        if RayExecutor._cluster_is_ours:
            num_actors = min(num_actors, max(1, int(sum(node.get("CPU", 0) for node in nodes))))
        unfinished = dict(enumerate(items))
        replacements: set[int] = set()
        dataset = _ray_dataset(factory, items, num_actors, cpus_per_worker(nodes, num_actors, num_gpus), num_gpus)
        try:
            for row in dataset.iter_rows():
                replacements |= {row["pid"]} if row["is_replacement"] else set()
                result = pickle.loads(row["outcome"])
                if isinstance(result, Exception):
                    raise result
                del unfinished[row["index"]]
                yield result
        except ray.exceptions.RayError as error:
            if not is_worker_death(error):
                raise
            raise WorkerDied(_death_message(len(items), unfinished)) from error
        if replacements:
            logger.warning("%d worker processes died and were replaced (out of memory?)", len(replacements))

    def run_together(
        self, function: Function, *, num_processes: int, num_gpus: float = 0, scratch: Path | None = None
    ) -> Any:
        nodes = self._nodes(num_gpus)
        cores, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
        if RayExecutor._cluster_is_ours and num_processes * num_gpus > gpus:
            raise ValueError(
                f"{num_processes} workers with {num_gpus:g} GPUs each, and this machine has {gpus:g}; set num_workers "
                "or gpus_per_worker of the stage to less, or use a Ray cluster (RAY_ADDRESS)"
            )
        cpus: float = cpus_together(nodes, num_processes, num_gpus)
        if not cpus and RayExecutor._cluster_is_ours:  # more workers than cores: they share the cores
            cpus = cores / num_processes
        if not cpus:
            logger.warning("the Ray cluster cannot run %d workers at once; waiting for machines", num_processes)
            cpus = 1
        resources = {"CPU": cpus} | ({"GPU": num_gpus} if num_gpus else {})
        return run_on_ray(function, num_processes, resources, scratch, waits=not RayExecutor._cluster_is_ours)

    def _nodes(self, num_gpus: float) -> list[dict[str, float]]:
        """Connect to the cluster, and return the resources of each machine that is alive.

        Raises:
            ValueError: no machine has so many GPUs, and none can join.
        """
        self._connect()
        import ray

        nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if num_gpus and not any(node.get("GPU", 0) >= num_gpus for node in nodes):
            lacking = f"no machine of the Ray cluster has the {num_gpus:g} GPUs that each worker reserves"
            if RayExecutor._cluster_is_ours:
                raise ValueError(f"{lacking}; set gpus_per_worker of the stage to 0 to work without GPUs")
            logger.warning("%s; waiting for one", lacking)
        return nodes

    def close(self) -> None:
        """Disconnect from the cluster, and stop it if this executor started it."""
        if self._started:
            import ray

            ray.shutdown()
            self._started = RayExecutor._cluster_is_ours = False

    def _connect(self) -> None:
        # Ray reads these variables when it is imported or first used, so they are set for the rest of the process.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray prints a paragraph on stdout for each dead worker; `map` logs one line instead
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
        if not os.environ.get("MUSEVL_DEBUG"):
            # Ray's native code logs an "error" about each actor pool of Ray Data that is not an error
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        address = os.environ.get("RAY_ADDRESS")
        if address is None:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_agent_register_timeout_ms", str(int(START_S * 1000)))
        import ray
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        if ray.is_initialized():
            return
        if address is not None:
            _check_answers(address)
            try:
                with _without_log_level_line(), _adapted_start():
                    ray.init(log_to_driver=False, logging_level=logging.WARNING)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise _unreachable(address, error) from error
            logger.info("connected to the Ray cluster %s", address)
            return
        logger.info("starting a local Ray cluster")
        _start_cluster(self._num_cpus)
        self._started = RayExecutor._cluster_is_ours = True
        logger.info("started a local Ray cluster")


def _start_cluster(num_cpus: int | None) -> None:
    """Start a Ray cluster on this machine and connect to it.

    Raises:
        ClusterNotStarted: the start failed for any reason; Ray raises many types, plain `Exception` among them.
    """
    import ray

    for start in range(STARTS):
        before = set(descendants())
        try:
            with _without_log_level_line(), _adapted_start():
                # `local`, since `auto` would join any cluster on this machine, even another run's, and end with it
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            return
        except Exception as error:
            ray.shutdown()
            end_processes(spared=before)
            reason = on_one_line(error, 300)
            if start + 1 == STARTS:
                raise ClusterNotStarted(
                    f"Ray does not start on this machine, after {STARTS} tries: {reason}; use `--executor local`, "
                    "which does not need Ray, or try again when the machine is less busy"
                ) from error
            logger.warning("Ray did not start (%s); trying once more", reason)


@contextmanager
def _adapted_start() -> Iterator[None]:
    """Change two things about Ray's start for which it has no settings.

    It waits START_S seconds for this machine to join its own cluster, as long as the raylet is alive, where Ray's code
    has 30 seconds. And the SIGTERM handler stays as it was: Ray's native handler would print a stack trace and abort
    the process three seconds later.
    """
    from ray._private import services, utils

    look_up, take_signal = services.get_node, utils.set_sigterm_handler

    def wait(*arguments: Any) -> Any:
        until = time.monotonic() + START_S
        while True:
            try:
                return look_up(*arguments)
            except RuntimeError:  # it has not joined yet
                if time.monotonic() > until or "raylet" not in map(program_name, descendants()):
                    raise
                time.sleep(0.1)

    services.get_node, utils.set_sigterm_handler = wait, lambda handler: None
    try:
        yield
    finally:
        services.get_node, utils.set_sigterm_handler = look_up, take_signal
        take_back_signals()


class _RayWorker:
    """The callable class that Ray Data runs as an actor; it returns exceptions as results, which keeps their type."""

    def __init__(self, factory: WorkerFactory) -> None:
        # The factory is called with the first item, so that a death in it counts as a retry and is not repeated forever
        self._factory = factory
        self._worker: Worker | None = None
        import ray

        self._is_replacement = ray.get_runtime_context().was_current_actor_reconstructed

    def __call__(self, row: Item) -> Item:
        result: Item | Exception
        try:
            if self._worker is None:
                self._worker = self._factory()
            result = self._worker(pickle.loads(row["item"]))
        except Exception as error:  # raised again by `map` in the driver
            result = portable(error)
        return {
            "index": row["index"],
            "outcome": pickle.dumps(result),
            "pid": os.getpid(),
            "is_replacement": self._is_replacement,
        }


def _ray_dataset(factory: WorkerFactory, items: list[Item], num_actors: int, num_cpus: int, num_gpus: float) -> Any:
    """Build the lazy Ray Data pipeline with one block, and so one task, per item."""
    import ray.data

    # Items are pickled, since Arrow columns would fill in missing keys and turn lists into arrays.
    rows = [{"index": index, "item": pickle.dumps(item)} for index, item in enumerate(items)]
    with warnings.catch_warnings():
        # The limit on retries has no named parameter yet; without it an input that kills its worker is retried forever
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        return ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _RayWorker,  # type: ignore[arg-type]  # Ray accepts a callable class too
            fn_constructor_args=(factory,),
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            num_cpus=num_cpus,
            num_gpus=num_gpus or None,
            max_task_retries=TASK_RETRIES,
        )


def build_executor(name: ExecutorName, *, num_cpus: int | None = None) -> Executor:
    """Build the executor with the given command-line name.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "ray":
        return RayExecutor(num_cpus)
    if name == "local":
        return LocalExecutor()
    raise ValueError(f"unknown executor {name!r}; use ray or local")


def cpus_per_worker(nodes: Sequence[Mapping[str, float]], num_workers: int, num_gpus: float) -> int:
    """Return the number of cores, and so of threads (Ray sets OMP_NUM_THREADS to it), of each worker.

    Args:
        nodes: resources of each machine, as Ray lists them.
        num_workers: number of workers that share the machines.
        num_gpus: number of GPUs that each worker reserves; only machines with at least that many count.

    Returns:
        Whole cores, at least 1, and no more than the smallest of these machines has.
    """
    cores = [int(node.get("CPU", 0)) for node in nodes if node.get("GPU", 0) >= num_gpus and node.get("CPU", 0) >= 1]
    if not cores:
        return 1
    return max(1, min(min(cores), sum(cores) // max(1, num_workers)))


def cpus_together(nodes: Sequence[Mapping[str, float]], num_workers: int, num_gpus: float) -> int:
    """Return the largest number of whole cores per worker with which all workers can run at once, or 0 if they cannot.

    Args:
        nodes: resources of each machine, as Ray lists them.
        num_workers: number of workers.
        num_gpus: number of GPUs per worker.
    """

    def capacity(cores: int) -> int:
        by_cores = (int(node.get("CPU", 0)) // cores for node in nodes)
        by_gpus = (int(node.get("GPU", 0) / num_gpus) if num_gpus else num_workers for node in nodes)
        return sum(map(min, by_cores, by_gpus))

    most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    return next((cores for cores in range(most, 0, -1) if capacity(cores) >= num_workers), 0)


def _check_answers(address: str) -> None:
    """Raise ClusterUnreachable unless something listens at HOST:PORT, since Ray itself would end the process."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> ClusterUnreachable:
    reason = on_one_line(error)
    return ClusterUnreachable(
        f"cannot connect to the Ray cluster of RAY_ADDRESS={address}: {reason}; start it, or unset RAY_ADDRESS to use "
        "this machine alone"
    )


@contextmanager
def _without_log_level_line() -> Iterator[None]:
    """Buffer the process's stderr meanwhile, and drop the line about its log level that Ray's native code writes."""
    sys.stderr.flush()
    real = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            held.seek(0)
            for line in held.read().splitlines():
                if b"RAY_BACKEND_LOG_LEVEL" not in line:
                    os.write(2, line + b"\n")


def _death_message(num_items: int, unfinished: Mapping[int, Item]) -> str:
    first = "; ".join(_short(item) for item in list(unfinished.values())[:3])
    return (
        f"worker processes died {1 + TASK_RETRIES} times on the same input, and the run was given up (out of memory, "
        f"or a crash in native code?); {len(unfinished)} of {num_items} inputs are unfinished, first: {first}. "
        "Give the workers more memory or smaller batches, or remove the input; finished inputs are kept"
    )


def _short(item: Item) -> str:
    text = repr(item)
    return text if len(text) <= 200 else text[:200] + "..."
