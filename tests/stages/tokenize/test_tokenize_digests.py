"""What must not change a code: batches, shards, threads that decode.

That nor workers nor hash seeds do is seen in `tests/stages/pipeline`, where runs in processes of their own are killed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.executors import LocalExecutor
from stages.pipeline.execution import run_stage
from storage import tables
from storage.code_table import read_code_table
from storage.digests import sha256_bytes
from storage.store import Store
from tests.helpers.light import LightRun, light_run

NUM_IMAGES = 12


def light(folder: Path, tokenize: dict[str, int], rows_per_shard: int = 6) -> tuple[LightRun, Store]:
    folder.mkdir()
    sections = {"tokenize": {"batch_size": 4} | tokenize}
    run = light_run(folder, num_images=NUM_IMAGES, rows_per_shard=rows_per_shard, sections=sections)
    return run, run.store(str(folder / "store"))


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


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return here(tmp_path_factory.mktemp("plain") / "run", {})


def test_no_number_of_threads_that_decode_changes_the_artifact(plain: tuple[str, str], tmp_path: Path) -> None:
    assert here(tmp_path / "seven", {"decode_threads": 7}) == plain


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 16])
def test_no_batch_size_changes_a_code(batch_size: int, plain: tuple[str, str], tmp_path: Path) -> None:
    """It is in the key, since other devices may round otherwise."""
    assert here(tmp_path / "other", {"batch_size": batch_size})[1] == plain[1]


@pytest.mark.parametrize("threads", [2, 3])
def test_no_number_of_threads_changes_the_artifact(threads: int, tmp_path: Path) -> None:
    """Twelve images are two lots of eight, so two threads have work."""
    alone = here(tmp_path / "alone", {"batch_size": 16, "threads_per_worker": 1})
    assert here(tmp_path / "beside", {"batch_size": 16, "threads_per_worker": threads}) == alone


def test_no_size_of_shards_changes_a_code(plain: tuple[str, str], tmp_path: Path) -> None:
    assert here(tmp_path / "of five", {}, rows_per_shard=5)[1] == plain[1]


def test_no_size_of_row_groups_changes_a_code(
    plain: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROW_GROUP_ROWS", 5)
    found = here(tmp_path / "groups of five", {})
    assert found[0] != plain[0], "the files differ"
    assert found[1] == plain[1]
