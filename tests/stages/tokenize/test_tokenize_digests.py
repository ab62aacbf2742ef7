"""What must not change a code: hash seeds, workers, batches, shards, threads that decode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.executors import LocalExecutor
from stages.pipeline.execution import run_stage
from storage import tables
from storage.code_table import read_code_table
from storage.digests import sha256_bytes
from storage.store import Store
from tests.helpers.light import LightRun, light_run

ROOT = Path(__file__).parents[3]
NUM_IMAGES = 12


def light(folder: Path, tokenize: dict[str, int], rows_per_shard: int = 6) -> tuple[LightRun, Store]:
    folder.mkdir()
    sections = {"tokenize": {"batch_size": 4} | tokenize}
    run = light_run(folder, num_images=NUM_IMAGES, rows_per_shard=rows_per_shard, sections=sections)
    return run, run.store(str(folder / "store"))


def in_a_process(folder: Path, tokenize: dict[str, int], hash_seed: str) -> tuple[str, str]:
    run, store = light(folder, tokenize)
    executor = "ray" if tokenize.get("num_workers", 1) > 1 else "local"
    command = [sys.executable, "-m", "stages.tokenize", "--recipe", str(run.recipe_path)]
    command += ["--store", store.uri, "--executor", executor]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return digests(store, run.action_key)


def here(folder: Path, tokenize: dict[str, int], rows_per_shard: int = 6) -> tuple[str, str]:
    run, store = light(folder, tokenize, rows_per_shard)
    run_stage("tokenize", run.recipe, store, LocalExecutor())
    return digests(store, run.action_key)


def digests(store: Store, action_key: str) -> tuple[str, str]:
    """Of the artifact, and of keys and codes alone."""
    table = store.lookup(action_key)
    assert table is not None
    rows = read_code_table([store.fetch(entry) for entry in table.files_under("codes")])
    return table.digest, sha256_bytes(repr(rows.keys).encode() + rows.codes.tobytes())


@pytest.mark.slow
def test_nothing_that_only_says_how_to_run_changes_the_artifact(tmp_path: Path) -> None:
    expected = here(tmp_path / "plain", {})
    assert in_a_process(tmp_path / "seed", {"decode_threads": 7}, hash_seed="123") == expected
    assert in_a_process(tmp_path / "workers", {"num_workers": 2}, hash_seed="7") == expected


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 16])
def test_no_batch_size_changes_a_code(batch_size: int, tmp_path: Path) -> None:
    """It is in the key, since other devices may round otherwise."""
    codes = {size: here(tmp_path / str(size), {"batch_size": size})[1] for size in (4, batch_size)}
    assert codes[4] == codes[batch_size]


@pytest.mark.parametrize("threads", [2, 3])
def test_no_number_of_threads_changes_the_artifact(threads: int, tmp_path: Path) -> None:
    """Twelve images are two lots of eight, so two threads have work."""
    alone = here(tmp_path / "alone", {"batch_size": 16, "threads_per_worker": 1})
    assert here(tmp_path / "beside", {"batch_size": 16, "threads_per_worker": threads}) == alone


def test_no_size_of_shards_changes_a_code(tmp_path: Path) -> None:
    assert here(tmp_path / "of five", {}, rows_per_shard=5)[1] == here(tmp_path / "of six", {})[1]


def test_no_size_of_row_groups_changes_a_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = here(tmp_path / "one group", {})
    monkeypatch.setattr(tables, "ROW_GROUP_ROWS", 5)
    found = here(tmp_path / "groups of five", {})
    assert found[0] != expected[0], "the files differ"
    assert found[1] == expected[1]
