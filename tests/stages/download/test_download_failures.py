"""Downloads that meet trouble: images that kill their decoder, too many failures, sources and stores that change."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.text import text_table
from infra.executors import Item, LocalExecutor, WorkerFactory
from infra.terminal import printable
from models.images import Limits
from stages.artifacts.rows import UNDECODABLE
from stages.download.counts import DownloadedShard, Totals, receipt_of
from stages.download.image_facts import DIED, ImageFacts, Inspector, in_child_process
from stages.download.sources import url_list
from stages.download.sources.source import Failure
from stages.download.stage import STAGE, DownloadConfig, next_attempt
from stages.pipeline.errors import one_line
from stages.pipeline.recipe import STAGES, load_recipe
from stages.protocol import Outcome, StageContext
from storage.blobs import blob_key
from storage.digests import sha256_bytes
from storage.store import Store
from tests.helpers.misbehaving_server import misbehaving_server, png
from tests.helpers.poison_download import PoisonableInspector
from tests.helpers.tiny import CAPTIONS_ONLY
from tests.stages.download.test_download import config_of, write_list

ROOT = Path(__file__).parents[3]
LIMITS = Limits(max_bytes=1_000_000, max_pixels=1_000_000)


def _folder(path: Path, images: list[bytes]) -> DownloadConfig:
    """Images with captions, two a shard."""
    path.mkdir()
    for number, image in enumerate(images):
        (path / f"{number:02d}.png").write_bytes(image)
        (path / f"{number:02d}.txt").write_text(f"image {number}")
    return DownloadConfig(files={"kind": "folder", "path": str(path)}, rows_per_shard=2)


def _squares(count: int) -> list[bytes]:
    return [png(f"rgb({number}, 0, 0)") for number in range(count)]


@dataclass
class _Run:
    """Downloads into one store."""

    folder: Path
    store: Store = field(init=False)

    def __post_init__(self) -> None:
        self.store = Store(str(self.folder / "store"))

    def __call__(self, config: DownloadConfig, executor: Any = None, key: str = "") -> Outcome:
        with self.store.scratch_dir() as scratch:
            key = key or self.key(config)
            return STAGE.run(StageContext(config, 0, {}, self.store, key, executor or LocalExecutor(), scratch))

    def key(self, config: DownloadConfig) -> str:
        return STAGE.action_key(config, 0, {})

    def rows(self, outcome: Outcome) -> list[dict[str, Any]]:
        entries = [entry for entry in outcome.files if entry.path.startswith("metadata/")]
        return [row for entry in entries for row in pq.read_table(self.store.fetch(entry)).to_pylist()]


@pytest.fixture
def run(tmp_path: Path) -> _Run:
    return _Run(tmp_path)


@pytest.mark.processes
def test_an_image_that_kills_its_decoder_twice_is_undecodable_and_the_next_one_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good, bad = png("red"), png("blue")
    monkeypatch.setenv("TEST_POISON", sha256_bytes(bad))
    with in_child_process(partial(PoisonableInspector, LIMITS, False)) as inspect:
        found = [inspect(data) for data in (bad, good, b"no image")]
    assert found[0] == Failure(UNDECODABLE, DIED)
    assert isinstance(found[1], ImageFacts)
    assert found[1:] == [Inspector(LIMITS, False)(data) for data in (good, b"no image")]


@pytest.mark.processes
@pytest.mark.slow
def test_a_shard_that_kills_the_run_costs_one_image_in_the_third_run(tmp_path: Path) -> None:
    images = _squares(6)
    config = _folder(tmp_path / "given", images)
    assert config.files is not None
    overrides = ["download.rows_per_shard=2", f"download.files={config.files.model_dump_json()}", *CAPTIONS_ONLY]
    recipe = load_recipe("tiny", overrides)
    key = STAGES["download"].action_key(recipe.download, recipe.seed, {})

    def start(folder: str, poison: str) -> tuple[int, Store]:
        command = [
            sys.executable,
            "-m",
            "tests.helpers.poison_download",
            "tiny",
            str(tmp_path / folder),
            "local",
            *overrides,
        ]
        ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"TEST_POISON": poison}, capture_output=True)
        return ended.returncode, Store(str(tmp_path / folder))

    def rows(store: Store) -> list[dict[str, Any]]:
        found = store.lookup(key)
        assert found is not None
        return [row for e in found.files_under("metadata") for row in pq.read_table(store.fetch(e)).to_pylist()]

    codes = [start("poisoned", sha256_bytes(images[3]))[0] for _ in range(2)]
    assert all(code < 0 for code in codes)
    code, store = start("poisoned", sha256_bytes(images[3]))
    assert code == 0
    whole = rows(start("plain", "")[1])
    assert [row["status"] for row in whole] == ["ok"] * 6
    found = rows(store)
    assert (found[3]["status"], found[3]["error"]) == (UNDECODABLE, DIED)
    assert found[:3] + found[4:] == whole[:3] + whole[4:]
    assert store.objects.list("marks/") == [], "the marks of dead workers are gone"


@pytest.mark.processes
def test_decoding_in_a_child_process_changes_nothing_in_the_result(run: _Run, tmp_path: Path) -> None:
    config = _folder(tmp_path / "given", [*_squares(3), b"no image", png("red")[:-20], png("red", (300, 200))])
    config = config.model_copy(update={"max_failed_fraction": 1.0})
    careful = _Run(tmp_path / "careful")
    for shard in ("00001", "00002"):
        for number in range(2):
            careful.store.objects.put(f"marks/{run.key(config)}/{shard}/dead{number}.json", b"{}")
    assert run(config) == careful(config)
    assert careful.store.objects.list("marks/") == []


class _Watched(LocalExecutor):
    """Counts the iterations that were ended early."""

    ended = 0

    def map(
        self, factory: WorkerFactory, items: list[Item], *, num_workers: int, num_gpus: float = 0
    ) -> Iterator[Item]:
        try:
            yield from super().map(factory, items, num_workers=num_workers)
        except GeneratorExit:
            self.ended += 1
            raise


def test_a_run_that_must_fail_stops_at_once_and_goes_on_with_a_higher_limit(run: _Run, tmp_path: Path) -> None:
    config = _folder(tmp_path / "given", [b"no image"] * 9 + _squares(31))
    stopped = r"9 of 40 images failed with 30 still to come.*max_failed_fraction=0.2.*9 x not_an_image"
    executor = _Watched()
    for ended in (1, 1):  # the second run counts the receipts of the first, and needs no worker
        with pytest.raises(ValueError, match=stopped) as raised:
            run(config, executor)
        assert executor.ended == ended, f"workers go on although the run ended with {raised.value}"
        assert list(dict(run.store.work(run.key(config)).receipts())) == [f"{number:05d}" for number in range(5)]
    assert next_attempt(config, 0, run.store) == 1, "an attempt that cannot succeed is not the one to go on with"
    assert run(config.model_copy(update={"max_failed_fraction": 0.3})).metrics["num_ok"] == 31


def test_lost_rows_of_a_plan_are_written_again(run: _Run, tmp_path: Path) -> None:
    config = _folder(tmp_path / "given", _squares(6))
    first, key = run(config), run.key(config)
    plan = run.store.work(key).read_plan()
    assert plan is not None
    run.store.objects.delete(blob_key(plan["rows"]["sha256"]))
    run.store.objects.delete(f"receipts/{key}/00001.json")
    assert run(config) == first
    run.store.objects.delete(blob_key(plan["rows"]["sha256"]))
    run.store.objects.delete(f"receipts/{key}/00001.json")
    (tmp_path / "given" / "00.txt").write_text("another caption")
    with pytest.raises(ValueError, match=rf"lost the rows.*folder .*given gives others now.*plans/{key}.json"):
        run(config, key=key)


class _Meddler(LocalExecutor):
    """Lets something happen after the first shard."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self._meddle = meddle

    def map(
        self, factory: WorkerFactory, items: list[Item], *, num_workers: int, num_gpus: float = 0
    ) -> Iterator[Item]:
        for number, result in enumerate(super().map(factory, items, num_workers=num_workers)):
            if number == 0:
                self._meddle()
            yield result


def test_images_that_change_during_a_run_are_not_taken_for_what_they_were(run: _Run, tmp_path: Path) -> None:
    config, changing = _folder(tmp_path / "given", _squares(6)), tmp_path / "given" / "05.png"
    before, key = changing.read_bytes(), run.key(config)
    with pytest.raises(ValueError, match="folder .*given changed while its images were read.*run the stage again"):
        run(config, _Meddler(lambda: changing.write_bytes(png("white"))))
    changing.write_bytes(before)
    assert run.key(config) == key
    assert run.rows(run(config))[5]["sha256"] == sha256_bytes(before), "nothing of the other image is left"


@pytest.mark.processes
def test_a_url_list_may_change_once_its_rows_are_read(run: _Run, tmp_path: Path) -> None:
    with misbehaving_server() as server:
        base_url = f"http://{server.address}"
        path = write_list(tmp_path / "list.csv", base_url, ["red.png", "blue.png"])
        config = config_of(base_url, path, rows_per_shard=1)
        outcome = run(config, _Meddler(lambda: write_list(Path(path), base_url, ["blue.png"])))
    assert [row["caption"] for row in run.rows(outcome)] == ["a red.png", "a blue.png"]


def test_a_source_that_changes_while_its_rows_are_read_makes_no_plan(run: _Run, tmp_path: Path) -> None:
    config = _folder(tmp_path / "given", _squares(2))
    key = run.key(config)
    (tmp_path / "given" / "00.txt").write_text("another caption")
    with pytest.raises(ValueError, match="folder .*given changed while it was read"):
        run(config, key=key)
    assert run.store.work(key).read_plan() is None


def _deaths(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first processes that fetch are killed, after they left something behind."""
    real, started = subprocess.run, iter(range(1000))

    def fake(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if next(started) >= count:
            return real(command, **options)
        Path(command[-1]).with_name("0").mkdir()
        return real([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], **options)

    monkeypatch.setattr(url_list.subprocess, "run", fake)


@pytest.mark.processes
def test_a_fetch_process_that_dies_once_costs_nothing(
    run: _Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _deaths(1, monkeypatch)
    with misbehaving_server() as server:
        path = write_list(tmp_path / "list.csv", f"http://{server.address}", ["red.png"])
        outcome = run(config_of(f"http://{server.address}", path))
    assert [row["status"] for row in run.rows(outcome)] == ["ok"]


@pytest.mark.processes
def test_a_fetch_process_that_dies_twice_is_an_error_that_names_the_shard(
    run: _Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _deaths(2, monkeypatch)
    config = DownloadConfig(url_list=write_list(tmp_path / "list.csv", "http://127.0.0.1:1", ["red.png"]))
    with pytest.raises(ChildProcessError, match=r"shard 00000 .* exit code -9.*\(2 times\).*connections_per_worker"):
        run(config)


def _failed(number: int, url: str, status: str = "missing", error: str = "there is no such file") -> dict[str, Any]:
    return {"key": f"{number:09d}", "url": url, "status": status, "error": error}


def test_a_message_about_failures_names_three_rows_of_each_reason() -> None:
    rows = [_failed(number, f"{number}.png") for number in range(5)]
    rows += [_failed(5, "", "no_caption", "none"), _failed(6, "x" * 999), _failed(7, "f.png", "filtered", "small")]
    totals = Totals([receipt_of([], rows[:2]), receipt_of([], rows[2:])])
    assert totals.reasons("errors") == (
        "6 x missing: there is no such file, such as 0.png, 1.png, 2.png; 1 x no_caption: none, such as row 000000005"
    )
    assert totals.reasons("errors", "filters").endswith("1 x small, such as f.png")
    assert len(Totals([receipt_of([], rows[6:7])]).reasons("errors")) < 130


def test_what_strangers_wrote_is_spelled_out_in_a_message() -> None:
    hostile = "\x1b]0;owned\x07\r\n\x9b31m\u202egnp.exe\ud800 ok é 👩\u200d🚀"
    row = _failed(0, hostile, "undecodable", hostile)
    said = Totals([receipt_of([], [row])]).reasons("errors")
    assert said.count(r"\x1b]0;owned\x07\r\n\x9b31m\u202egnp.exe\ud800 ok é 👩‍🚀") == 2
    assert said.isprintable() or said.replace("\u200d", "").isprintable()
    assert printable("a" * 9, 5) == "aaaa…" and printable("plain", 5) == "plain"
    assert one_line(ValueError(hostile)).replace("\u200d", "").isprintable()
    assert text_table(["a"], [[hostile]]).splitlines()[2].replace("\u200d", "").isprintable()


def test_totals_forget_what_is_taken_back() -> None:
    def receipt(**counts: dict[str, int]) -> DownloadedShard:
        return replace(receipt_of([], []), **counts)

    one, two = receipt(status={"ok": 2}, hosts={"a": 2}), receipt(status={"ok": 1, "timeout": 1}, hosts={"b": 2})
    totals = Totals([one, two])
    assert (totals.num_rows, totals.num_failed, totals["hosts"]) == (4, 1, {"a": 2, "b": 2})
    totals.take_back(two)
    assert totals.metrics() == Totals([one]).metrics()
    assert dict(totals["hosts"]) == {"a": 2}
