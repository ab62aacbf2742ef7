"""Where mapped work runs: in this process, or as Ray Data actors. Workload code does not know which."""

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
from infra.worker_errors import WorkerDied, is_worker_death, portable

logger = logging.getLogger(__name__)

Item = dict[str, Any]
Worker = Callable[[Item], Item]
WorkerFactory = Callable[[], Worker]
ExecutorName = Literal["local", "ray"]

TASK_RETRIES = 5
"""How often an input is given to a new worker process after its worker died. An input that waits in a worker's queue
while the worker dies of another one loses a try too, so this is twice what one input may need (`stages.tokenize` finds
the image that kills its worker at the third try), and one more for bad luck."""
STARTS = 2
"""How often a cluster of this machine is started before it is given up."""
START_S = 120.0
"""How long its processes may take to come up, each time. Ray's own limits, 15 s for its agent and 30 for all, are too
short for a machine with other work: on two cores with eight busy processes a start took 46."""
OBJECT_STORE_BYTES = 256 * 2**20
"""Shared memory of a cluster started here; items and results are small."""


class ClusterUnreachable(ConnectionError):
    """The Ray cluster that `RAY_ADDRESS` names does not answer."""


class ClusterNotStarted(OSError):
    """No Ray cluster comes up on this machine."""


class Executor(Protocol):
    """Maps items over workers."""

    @property
    def on_this_machine(self) -> bool:
        """Whether every worker will be on the machine of this process."""
        ...

    def map(
        self, factory: WorkerFactory, items: list[Item], *, num_workers: int, num_gpus: float = 0
    ) -> Iterator[Item]:
        """Yield one result an item, as they finish, in any order.

        An exception of the factory or of a worker ends the iteration and is raised here with its own type and message.

        Args:
            factory: picklable; called once in each worker, returns the function that is called with each item.
            items: small JSON-like dictionaries, each with everything that its worker needs to find its data.
            num_workers: most workers at a time.
            num_gpus: share of a GPU that each worker holds.

        Raises:
            ValueError: there is no such share of a GPU, and there will be none.
            WorkerDied: an input took down every worker that it was given to.
        """
        ...

    def run_together(
        self, function: Function, *, num_processes: int, num_gpus: float = 0, scratch: Path | None = None
    ) -> Any:
        """Run one function in several processes at once, joined by `torch.distributed`; return what process 0 returns.

        When one of them dies, all start again, up to `RESTARTS` times. An exception of the function ends all of them
        and is raised here with its own type and message.

        Args:
            function: picklable, without arguments.
            num_processes: how many.
            num_gpus: of each.
            scratch: folder for temporary files; default the system's.

        Raises:
            ValueError: there are not so many GPUs, and there will be none.
            WorkerDied: processes died again and again.
        """
        ...

    def close(self) -> None:
        """Give back what the executor started; the executor can be used again and then starts anew."""
        ...


class LocalExecutor:
    """One item after the other in this process, and what runs together on this machine: without Ray."""

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
        """Nothing was started."""


class RayExecutor:
    """Ray Data actors: on the cluster that `RAY_ADDRESS` names (as in a submitted job), else on one started here.

    Nothing is started or connected before the first `map` with items. A cluster started here is open only to holders of
    a token made for this process, writes nothing to the home folder and ends with `close`.

    Args:
        num_cpus: size of a cluster started here; None takes every core.
    """

    # Of the process: executors share the one cluster that a process can be in, and only one of them started it
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
        if not cpus and RayExecutor._cluster_is_ours:  # more workers than cores share them
            cpus = cores / num_processes
        if not cpus:
            logger.warning("the Ray cluster has no room for %d workers at once; waiting for machines", num_processes)
            cpus = 1
        resources = {"CPU": cpus} | ({"GPU": num_gpus} if num_gpus else {})
        return run_on_ray(function, num_processes, resources, scratch, waits=not RayExecutor._cluster_is_ours)

    def _nodes(self, num_gpus: float) -> list[dict[str, float]]:
        """Connect, and return the resources of each living machine.

        Raises:
            ValueError: none has so many GPUs, and none will join.
        """
        self._connect()
        import ray

        nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if num_gpus and not any(node.get("GPU", 0) >= num_gpus for node in nodes):
            lacking = f"no machine of the Ray cluster has the {num_gpus:g} GPUs that each worker is to hold"
            if RayExecutor._cluster_is_ours:
                raise ValueError(f"{lacking}; set gpus_per_worker of the stage to 0 to work without")
            logger.warning("%s; waiting for one", lacking)
        return nodes

    def close(self) -> None:
        """Leave the cluster; stop it if this executor started it."""
        if self._started:
            import ray

            ray.shutdown()
            self._started = RayExecutor._cluster_is_ours = False

    def _connect(self) -> None:
        # Ray reads these when it is imported or first used, so they stay for the life of the process.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray prints a paragraph on stdout for each dead worker; `map` says it in one line
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
        if not os.environ.get("MUSEVL_DEBUG"):
            # Its native part logs an "error" about each actor pool of Ray Data, which is none
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
        ClusterNotStarted: it did not come up, whatever the reason; Ray raises anything from `Exception` down.
    """
    import ray

    for start in range(STARTS):
        before = set(descendants())
        try:
            with _without_log_level_line(), _adapted_start():
                # `local`, not `auto`: that joins any cluster on this machine, another run's too, and dies with it
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
            reason = " ".join(str(error).split())[:300]
            if start + 1 == STARTS:
                raise ClusterNotStarted(
                    f"Ray does not start on this machine, after {STARTS} tries: {reason}; use `--executor local`, "
                    "which does without it, or try again when the machine is less busy"
                ) from error
            logger.warning("Ray did not start (%s); trying once more", reason)


@contextmanager
def _adapted_start() -> Iterator[None]:
    """What Ray's start has no settings for.

    It waits START_S for this machine to join its own cluster, as long as the process that joins lives: 30 seconds are a
    number in its code. And it leaves SIGTERM to whoever took it before; its native handler would print a stack, and
    abort the process three seconds later.
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
    """The callable class that Ray Data keeps as an actor; exceptions come back as results and so keep their type."""

    def __init__(self, factory: WorkerFactory) -> None:
        # Called with the first item, so that a death in it counts against an input and is not repeated for ever
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
        except Exception as error:  # raised again where `map` is iterated
            result = portable(error)
        return {
            "index": row["index"],
            "outcome": pickle.dumps(result),
            "pid": os.getpid(),
            "is_replacement": self._is_replacement,
        }


def _ray_dataset(factory: WorkerFactory, items: list[Item], num_actors: int, num_cpus: int, num_gpus: float) -> Any:
    """The lazy Ray Data pipeline: one block, and so one task, an item."""
    import ray.data

    # Items travel pickled: as Arrow columns they would come back with missing keys filled in and lists as arrays.
    rows = [{"index": index, "item": pickle.dumps(item)} for index, item in enumerate(items)]
    with warnings.catch_warnings():
        # The bound on retries has no named parameter yet; without it an input that kills its worker is retried for ever
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        return ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _RayWorker,  # type: ignore[arg-type]  # Ray takes a callable class too
            fn_constructor_args=(factory,),
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            num_cpus=num_cpus,
            num_gpus=num_gpus or None,
            max_task_retries=TASK_RETRIES,
        )


def build_executor(name: ExecutorName, *, num_cpus: int | None = None) -> Executor:
    """An executor by its name on the command line.

    Raises:
        ValueError: an unknown name.
    """
    if name == "ray":
        return RayExecutor(num_cpus)
    if name == "local":
        return LocalExecutor()
    raise ValueError(f"unknown executor {name!r}; use ray or local")


def cpus_per_worker(nodes: Sequence[Mapping[str, float]], num_workers: int, num_gpus: float) -> int:
    """How many cores, and so threads (Ray sets OMP_NUM_THREADS to it), each worker gets.

    Args:
        nodes: resources of each machine, as Ray lists them.
        num_workers: how many share them.
        num_gpus: share of a GPU that each worker holds; only machines with that much count then.

    Returns:
        Whole cores, at least 1, and no more than the smallest machine in question has.
    """
    cores = [int(node.get("CPU", 0)) for node in nodes if node.get("GPU", 0) >= num_gpus and node.get("CPU", 0) >= 1]
    if not cores:
        return 1
    return max(1, min(min(cores), sum(cores) // max(1, num_workers)))


def cpus_together(nodes: Sequence[Mapping[str, float]], num_workers: int, num_gpus: float) -> int:
    """The most whole cores that each of several workers can have if all are to run at once; 0 where they cannot.

    Args:
        nodes: resources of each machine, as Ray lists them.
        num_workers: how many.
        num_gpus: of each.
    """

    def room(cores: int) -> int:
        by_cores = (int(node.get("CPU", 0)) // cores for node in nodes)
        by_gpus = (int(node.get("GPU", 0) / num_gpus) if num_gpus else num_workers for node in nodes)
        return sum(map(min, by_cores, by_gpus))

    most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    return next((cores for cores in range(most, 0, -1) if room(cores) >= num_workers), 0)


def _check_answers(address: str) -> None:
    """Raise ClusterUnreachable unless something listens at a HOST:PORT; Ray itself would end the process instead."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> ClusterUnreachable:
    reason = " ".join(str(error).split())
    return ClusterUnreachable(
        f"cannot connect to the Ray cluster of RAY_ADDRESS={address}: {reason}; start it, or unset RAY_ADDRESS to use "
        "this machine alone"
    )


@contextmanager
def _without_log_level_line() -> Iterator[None]:
    """Hold back the process's stderr meanwhile and drop Ray's remark on its log level, which it logs natively."""
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
