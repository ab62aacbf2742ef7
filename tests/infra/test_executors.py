"""Executors: the same results from each, exceptions as themselves, and worker deaths survived or reported."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra import executors
from infra.executors import (
    STARTS,
    TASK_RETRIES,
    ClusterNotStarted,
    Executor,
    Item,
    LocalExecutor,
    RayExecutor,
    Worker,
    build_executor,
    cpus_per_worker,
    cpus_together,
)
from infra.worker_errors import WorkerDied, WorkerFailed
from stages.pipeline.errors import one_line
from tests.infra.test_process_groups import check_death_and_exception

ROOT = Path(__file__).parents[2]
ITEMS: list[Item] = [{"number": number, "name": f"item {number}"} for number in range(5)]


@pytest.fixture(scope="module")
def ray_executor() -> Iterator[RayExecutor]:
    executor = RayExecutor(num_cpus=2)
    yield executor
    executor.close()


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.processes)])
def executor(request: pytest.FixtureRequest) -> Executor:
    return LocalExecutor() if request.param == "local" else request.getfixturevalue("ray_executor")


def per_item(function: Worker) -> Callable[[], Worker]:
    return lambda: function


class CannotTravel(Exception):
    """Pickles, but does not unpickle: its arguments are not those of its constructor."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"{name} {number}")


# First, before this process has a cluster: a failed start ends every process that came up meanwhile


class _Starts:
    """In the place of `ray.init`: fails so many times, as Ray does on a busy machine, and leaves a process behind."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls, self.left = failures, 0, list[subprocess.Popen[bytes]]()

    def __call__(self, **settings: object) -> None:
        self.calls += 1
        if self.calls <= self.failures:
            self.left.append(subprocess.Popen(["sleep", "60"]))
            raise Exception("The current node timed out during startup.\nThis could happen because ...")


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], _Starts]:
    """Makes Ray's start fail so many times."""
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(RayExecutor, "_cluster_is_ours", False)

    def install(failures: int) -> _Starts:
        monkeypatch.setattr(ray, "init", found := _Starts(failures))
        return found

    return install


@pytest.mark.processes
def test_a_cluster_that_does_not_start_is_tried_once_more(
    starts: Callable[[int], _Starts], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("infra"), "propagate", True)
    ray_init = starts(1)
    RayExecutor()._connect()
    assert ray_init.calls == 2
    assert "Ray did not start (The current node timed out during startup. This could" in caplog.text
    assert all(process.wait(1) for process in ray_init.left), "what the first try left behind has ended"


@pytest.mark.processes
def test_a_cluster_that_never_starts_is_one_line_that_names_the_way_out(starts: Callable[[int], _Starts]) -> None:
    starts(STARTS)
    with pytest.raises(ClusterNotStarted) as caught:
        RayExecutor()._connect()
    text = one_line(caught.value)
    assert "Ray does not start on this machine, after 2 tries: The current node timed out" in text
    assert "use `--executor local`" in text


def test_a_start_may_take_two_minutes_as_long_as_its_process_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    asked: list[str] = []

    def not_yet(*arguments: str) -> str:
        asked.append("asked")
        if len(asked) < 4:
            raise RuntimeError("no such node")
        return "joined"

    monkeypatch.setattr(services, "get_node", not_yet)
    monkeypatch.setattr(executors, "program_name", lambda process: "raylet")
    monkeypatch.setattr(executors, "descendants", lambda: [1])
    with executors._adapted_start():
        assert services.get_node("address", "node") == "joined"
    assert services.get_node is not_yet or services.get_node() == "joined"
    asked.clear()
    monkeypatch.setattr(executors, "descendants", list)
    with executors._adapted_start(), pytest.raises(RuntimeError):
        services.get_node("address", "node")
    assert asked == ["asked"], "of a process that died nothing is awaited"


def test_rays_start_leaves_sigterm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import utils

    before = signal.getsignal(signal.SIGTERM)
    with executors._adapted_start():
        utils.set_sigterm_handler(lambda *_: None)
    assert signal.getsignal(signal.SIGTERM) == before


def test_every_item_gives_one_result(executor: Executor) -> None:
    def square(item: Item) -> Item:
        return {"number": item["number"], "square": item["number"] ** 2}

    results = executor.map(per_item(square), ITEMS, num_workers=2)
    assert sorted((r["number"], r["square"]) for r in results) == [(n, n * n) for n in range(5)]


def test_items_and_results_keep_their_python_types(executor: Executor) -> None:
    items: list[Item] = [{"list": [1, "two", None]}, {"nested": {"empty": {}}, "bytes": b"\x00"}, {"list": []}]
    results = list(executor.map(per_item(lambda item: item), items, num_workers=1))
    assert sorted(results, key=repr) == sorted(items, key=repr)
    assert all(type(value) in (list, dict, bytes) for result in results for value in result.values())


def test_no_items_start_no_worker(executor: Executor) -> None:
    def factory() -> Worker:
        raise AssertionError("called")

    assert list(executor.map(factory, [], num_workers=2)) == []


def test_a_workers_exception_arrives_as_itself(executor: Executor) -> None:
    def fail(item: Item) -> Item:
        if item["number"] == 3:
            raise FileNotFoundError(2, "no such shard", "images/00003.tar")
        return item

    with pytest.raises(FileNotFoundError, match="no such shard") as caught:
        list(executor.map(per_item(fail), ITEMS, num_workers=2))
    assert caught.value.filename == "images/00003.tar"


def test_an_exception_of_the_factory_arrives_as_itself(executor: Executor) -> None:
    def factory() -> Worker:
        raise ValueError("tokenize.precision=fp8 is unknown")

    with pytest.raises(ValueError, match="fp8"):
        list(executor.map(factory, ITEMS, num_workers=2))


def test_the_factory_is_called_once_a_worker(ray_executor: RayExecutor, tmp_path: Path) -> None:
    def factory() -> Worker:
        (tmp_path / str(os.getpid())).touch(exist_ok=False)
        return lambda item: {"pid": os.getpid()}

    pids = {result["pid"] for result in ray_executor.map(factory, ITEMS, num_workers=1)}
    assert {path.name for path in tmp_path.iterdir()} == {str(pid) for pid in pids}
    assert pids != {os.getpid()}


def test_an_exception_that_cannot_be_unpickled_keeps_its_name_and_message(ray_executor: RayExecutor) -> None:
    def fail(item: Item) -> Item:
        raise CannotTravel("shard", 7)

    with pytest.raises(WorkerFailed, match="CannotTravel: shard 7") as caught:
        list(ray_executor.map(per_item(fail), ITEMS, num_workers=2))
    assert "in the worker:" in caught.value.__notes__[0]


def test_one_killed_worker_does_not_end_the_run(
    ray_executor: RayExecutor, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("infra"), "propagate", True)
    marker = tmp_path / "killed"

    def die_once(item: Item) -> Item:
        if item["number"] == 2 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    results = list(ray_executor.map(per_item(die_once), ITEMS, num_workers=2))
    assert "1 worker processes died and were replaced" in caplog.text
    assert sorted(result["number"] for result in results) == [0, 1, 2, 3, 4]


def test_an_input_that_kills_every_worker_ends_the_run(ray_executor: RayExecutor, tmp_path: Path) -> None:
    def die(item: Item) -> Item:
        if item["number"] == 2:
            with open(tmp_path / "deaths", "a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(WorkerDied, match="item 2"):
        list(ray_executor.map(per_item(die), ITEMS, num_workers=1))
    assert len((tmp_path / "deaths").read_text()) == 1 + TASK_RETRIES


def test_a_factory_that_dies_ends_the_run(ray_executor: RayExecutor) -> None:
    def factory() -> Worker:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    with pytest.raises(WorkerDied, match="5 of 5 inputs are unfinished"):
        list(ray_executor.map(factory, ITEMS, num_workers=1))


def test_an_abandoned_map_gives_its_workers_back(ray_executor: RayExecutor) -> None:
    results = ray_executor.map(per_item(lambda item: item), ITEMS, num_workers=2)
    next(results)
    del results
    assert len(list(ray_executor.map(per_item(lambda item: item), ITEMS, num_workers=2))) == len(ITEMS)


def test_of_processes_that_run_together_on_ray_a_death_starts_all_again(
    ray_executor: RayExecutor, tmp_path: Path
) -> None:
    check_death_and_exception(ray_executor, tmp_path)


def test_more_workers_than_cores_are_no_problem(ray_executor: RayExecutor) -> None:
    assert len(list(ray_executor.map(per_item(lambda item: item), ITEMS, num_workers=50))) == len(ITEMS)


@pytest.mark.processes
def test_an_unreachable_cluster_is_named() -> None:
    script = (
        "from infra.executors import ClusterUnreachable, RayExecutor\n"
        "try: list(RayExecutor().map(lambda: None, [{}], num_workers=1))\n"
        "except ClusterUnreachable as error: print('caught:', error)\n"
    )
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert "caught: cannot connect to the Ray cluster of RAY_ADDRESS=127.0.0.1:1: " in done.stdout, done.stderr


@pytest.mark.processes
def test_a_local_cluster_is_silent_and_leaves_the_home_folder_alone(tmp_path: Path) -> None:
    script = (
        "from infra.executors import RayExecutor\n"
        "for turn in range(2):\n"
        "    executor = RayExecutor(num_cpus=1)\n"
        "    results = executor.map(lambda: lambda item: item, [{'n': 1}, {'n': 2}], num_workers=2)\n"
        "    print(sorted(result['n'] for result in results))\n"
        "    executor.close()\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert (done.stdout, done.stderr) == ("[1, 2]\n[1, 2]\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("nodes", "num_workers", "num_gpus", "expected"),
    [
        ([{"CPU": 2}], 1, 0, 2),
        ([{"CPU": 2}], 2, 0, 1),
        ([{"CPU": 2}], 5, 0, 1),
        ([{"CPU": 16}, {"CPU": 4}], 2, 0, 4),  # no worker asks for more than the smaller machine has
        ([{"CPU": 8}, {"CPU": 16, "GPU": 2}], 2, 1, 8),
        ([{"GPU": 1}], 1, 1, 1),
        ([], 3, 0, 1),
    ],
)
def test_cores_are_shared_among_workers(
    nodes: list[dict[str, float]], num_workers: int, num_gpus: float, expected: int
) -> None:
    assert cpus_per_worker(nodes, num_workers, num_gpus) == expected


def test_executors_have_names() -> None:
    assert isinstance(build_executor("local"), LocalExecutor)
    assert isinstance(build_executor("ray"), RayExecutor)
    with pytest.raises(ValueError, match="use ray or local"):
        build_executor("spark")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("joins", [False, True])
def test_a_share_of_a_gpu_that_no_machine_has_ends_the_run(ray_executor: RayExecutor, joins: bool) -> None:
    # `ray_executor` has started this process's cluster, and the second one is in the same
    assert list(ray_executor.map(lambda: lambda item: item, [{"a": 1}], num_workers=1)) == [{"a": 1}]
    executor = RayExecutor() if joins else ray_executor
    with pytest.raises(ValueError, match="no machine of the Ray cluster has the 999 GPUs .* gpus_per_worker"):
        list(executor.map(lambda: lambda item: item, [{"a": 1}], num_workers=1, num_gpus=999))


@pytest.mark.parametrize(
    ("machines", "num_workers", "num_gpus", "expected"),
    [
        ([(8, 0)] * 3, 4, 0, 4),
        ([(8, 2)] * 2, 3, 1, 4),
        ([(16, 8), (16, 1)], 9, 1, 2),
        ([(2, 0)], 2, 0, 1),
        ([(2, 0)], 3, 0, 0),
        ([(16, 1)], 2, 1, 0),
        ([], 2, 0, 0),
    ],
)
def test_workers_that_run_at_once_get_cores_that_all_of_them_can_have(
    machines: list[tuple[float, float]], num_workers: int, num_gpus: float, expected: int
) -> None:
    nodes = [{"CPU": cores, "GPU": gpus} for cores, gpus in machines]
    assert cpus_together(nodes, num_workers, num_gpus) == expected
