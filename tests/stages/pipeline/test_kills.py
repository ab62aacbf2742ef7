"""SIGKILL at random points of `download` and `tokenize`: the driver, the actor at work, another Ray worker.

`make test` kills the driver of `tokenize` on Ray once; `make test-all` all of them at ten points each, and
MUSEVL_KILL_POINTS says at how many else.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.executors import LocalExecutor
from stages.pipeline.execution import run_stage
from stages.pipeline.recipe import STAGES
from storage.digests import sha256_bytes
from storage.store import Store
from tests.helpers.light import LightRun, light_run

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[3]
POINTS = int(os.environ.get("MUSEVL_KILL_POINTS", "1"))
NUM_SHARDS = POINTS + 2
NUM_WORKERS = 2
"""On Ray; the digest is that of the one worker without."""
_GIVE_UP_S = 500
_ACTOR = "ray::MapWorker"
"""How Ray titles the process of an actor that maps."""
_NUM_SAMPLE_ROWS = 88
"""Images of birds among the sample data."""


@dataclass
class Case:
    """A stage that is to be killed."""

    name: str
    store: Store
    action_key: str
    expected: str
    """Digest of an uninterrupted run."""
    start: Callable[[], subprocess.Popen[str]]

    def num_receipts(self) -> int:
        return len(list(Path(self.store.uri, "receipts", self.action_key).glob("*.json")))

    def wait_for(self, num_receipts: int, process: subprocess.Popen[str]) -> bool:
        """Wait until so many shards are done and the work on another has begun; False when the run ended before."""
        deadline = time.monotonic() + _GIVE_UP_S
        while self.num_receipts() < num_receipts or not Path(self.store.uri, "plans").exists():
            if process.poll() is not None:
                return False
            assert time.monotonic() < deadline, "the stage made no progress"
            time.sleep(0.005)
        return True

    def check_visible(self) -> None:
        """Nothing that can be seen is a part of something, also while a worker outlives its driver for a moment."""
        for key in self.store.objects.list("cas/"):
            assert sha256_bytes(self.store.objects.read(key)) == key.rpartition("/")[2]
        before, readable, after = (
            self.num_receipts(),
            len(dict(self.store.work(self.action_key).receipts())),
            self.num_receipts(),
        )
        assert before <= readable <= after
        found = self.store.lookup(self.action_key)
        assert found is None or found.digest == self.expected


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> LightRun:
    sections = {
        "download": {"rows_per_shard": -(-_NUM_SAMPLE_ROWS // NUM_SHARDS)},
        "tokenize": {"views": {"count": 10 if POINTS == 1 else 40}, "batch_size": 8, "num_workers": NUM_WORKERS},
    }
    rows_per_shard = sections["download"]["rows_per_shard"]
    assert isinstance(rows_per_shard, int)
    folder = tmp_path_factory.mktemp("light")
    return light_run(folder, num_images=rows_per_shard * NUM_SHARDS, rows_per_shard=rows_per_shard, sections=sections)


@pytest.fixture(scope="module")
def expected(light: LightRun, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The digest of an uninterrupted run of a stage."""
    folder = tmp_path_factory.mktemp("expected")

    @functools.cache
    def digest(name: str) -> str:
        store = light.store(str(folder / name)) if name == "tokenize" else Store(str(folder / name))
        return run_stage(name, light.recipe, store, LocalExecutor()).digest

    return digest


@pytest.fixture(params=[pytest.param("download", marks=pytest.mark.exhaustive), "tokenize"])
def case(request: pytest.FixtureRequest, light: LightRun, expected: Callable[[str], str], tmp_path: Path) -> Case:
    name = request.param
    uri = str(tmp_path / "store")
    if name == "tokenize":
        command = ["tests.helpers.logged", str(light.recipe_path), uri, "ray", str(tmp_path / "log")]
        return Case(name, light.store(uri), light.action_key, expected(name), lambda: _start(command))
    command = ["stages.download", "--recipe", str(light.recipe_path), "--store", uri, "--executor", "ray"]
    key = STAGES[name].action_key(light.recipe.download, light.recipe.seed, {})
    return Case(name, Store(uri), key, expected(name), lambda: _start(command))


def _points(seed: str) -> list[tuple[int, float]]:
    """After how many shards, and how long after that (seconds), to kill."""
    generator = random.Random(seed)
    return [(number, generator.uniform(0, 0.4)) for number in sorted(generator.sample(range(NUM_SHARDS), POINTS))]


def _finish(case: Case, process: subprocess.Popen[str], tmp_path: Path) -> None:
    output = process.communicate(timeout=_GIVE_UP_S)[0]
    assert process.returncode == 0, output
    case.check_visible()
    found = case.store.lookup(case.action_key)
    assert found is not None and found.digest == case.expected
    assert case.store.verify(found.digest) == []
    if case.name == "tokenize":
        lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
        assert {shard for shard, _ in lines} == set(dict(case.store.work(case.action_key).receipts()))
        assert all(when == "first" for _, when in lines), "a shard was encoded again after its receipt existed"
        assert len(lines) <= NUM_SHARDS + POINTS * NUM_WORKERS, "a kill costs the shards being encoded, no other"


@pytest.mark.slow
def test_killed_drivers_end_with_the_digest_of_an_uninterrupted_run(case: Case, tmp_path: Path) -> None:
    kills = 0
    for num_receipts, delay in _points(f"driver of {case.name}"):
        process = case.start()
        if case.wait_for(num_receipts, process):
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        case.check_visible()
    assert kills > 0
    _finish(case, case.start(), tmp_path)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", ["actor", "worker"])
def test_a_run_whose_ray_processes_are_killed_ends_as_if_nothing_had_been(
    victim: str, case: Case, tmp_path: Path
) -> None:
    process = case.start()
    kills = 0
    for num_receipts, delay in _points(f"{victim} of {case.name}"):
        if case.wait_for(num_receipts, process):
            time.sleep(delay)
            kills += _kill_one(process, victim)
    _finish(case, process, tmp_path)
    assert kills > 0, f"no {victim} was found to kill"


def _kill_one(run: subprocess.Popen[str], victim: str) -> bool:
    """Kill the process of the actor that does the stage's work, or any other worker process of the raylet.

    Not before there is an actor: a cluster that loses a process while it starts does not come up. Not the raylet's
    agents: it ends itself when one of them dies, which is the death of a machine.
    """
    while run.poll() is None:
        titles = {pid: title for pid, title in _descendants(run.pid).items() if title.startswith("ray::")}
        actors = [pid for pid, title in titles.items() if title.startswith(_ACTOR)]
        others = [pid for pid, title in titles.items() if pid not in actors and "Agent" not in title]
        if actors and (found := actors if victim == "actor" else others):
            os.kill(found[0], signal.SIGKILL)
            return True
        time.sleep(0.02)
    return False


def _descendants(root: int) -> dict[int, str]:
    """Command lines of all processes below one, by process id."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue

    def below(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == root:
                return True
        return False

    return {pid: title for pid, title in titles.items() if below(pid)}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_runs_that_race_on_one_key_both_succeed_with_one_result(
    light: LightRun, expected: Callable[[str], str], tmp_path: Path
) -> None:
    store = light.store(str(tmp_path / "store"))
    command = ["tests.helpers.logged", str(light.recipe_path), store.uri, "local", str(tmp_path / "log")]
    both = [_start(command), _start(command)]
    for process in both:
        output = process.communicate(timeout=_GIVE_UP_S)[0]
        assert process.returncode == 0, output
    found = store.lookup(light.action_key)
    assert found is not None and found.digest == expected("tokenize")
    assert [run["event"] for run in store.runs() if "event" in run] == []
    assert store.verify() == []
