"""What must not change a code: hash seeds, workers, batches, shards, threads that decode; in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.code_table import read_code_table
from storage.digests import sha256_bytes
from storage.store import Store
from tests.light import light_run

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 12


def tokenize(
    folder: Path, tokenize: dict[str, int], *, rows_per_shard: int = 6, hash_seed: str = "0"
) -> tuple[str, str]:
    """Digest of the artifact, and of keys and codes alone, from a child process."""
    folder.mkdir()
    run = light_run(
        folder,
        num_images=NUM_IMAGES,
        rows_per_shard=rows_per_shard,
        sections={"tokenize": {"batch_size": 4} | tokenize},
    )
    store = run.store(str(folder / "store"))
    executor = "ray" if tokenize.get("num_workers", 1) > 1 else "local"
    command = [sys.executable, "-m", "stages.tokenize", "--recipe", str(run.recipe_path)]
    command += ["--store", store.uri, "--executor", executor]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return digests(store, run.action_key)


def digests(store: Store, action_key: str) -> tuple[str, str]:
    table = store.lookup(action_key)
    assert table is not None
    rows = read_code_table([store.fetch(entry) for entry in table.files_under("codes")])
    return table.digest, sha256_bytes(repr(rows.keys).encode() + rows.codes.tobytes())


@pytest.mark.slow
def test_nothing_that_only_says_how_to_run_changes_the_artifact(tmp_path: Path) -> None:
    expected = tokenize(tmp_path / "plain", {})
    assert tokenize(tmp_path / "seed", {"decode_threads": 7}, hash_seed="123") == expected
    assert tokenize(tmp_path / "workers", {"num_workers": 2}, hash_seed="7") == expected


@pytest.mark.slow
def test_neither_batches_nor_shards_change_a_code(tmp_path: Path) -> None:
    """They are in the key, since kernels of other devices may round otherwise."""
    codes = {
        tokenize(tmp_path / "plain", {})[1],
        tokenize(tmp_path / "batches", {"batch_size": 5})[1],
        tokenize(tmp_path / "small", {"batch_size": 3})[1],
        tokenize(tmp_path / "one", {"batch_size": 1})[1],
        tokenize(tmp_path / "shards", {}, rows_per_shard=5)[1],
    }
    assert len(codes) == 1
