"""Codes that were made elsewhere take the place of a tokenizer, and everything after it runs on them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from flows.cli import import_codes
from flows.inspection import inspect_code_table
from infra.executors import LocalExecutor
from stages.artifacts.models import load_tokenizer
from stages.pipeline.execution import run_stage
from stages.pipeline.recipe import load_recipe
from storage.code_table import CodeTable, CodeTableInfo, read_code_table, write_code_shard
from tests.helpers.external import write_codes
from tests.helpers.light import light_run
from tests.helpers.tiny import TinyRun


@pytest.fixture
def theirs(tiny_run: TinyRun) -> CodeTable:
    table = tiny_run.results["tokenize"].manifest
    return read_code_table([tiny_run.store.fetch(entry) for entry in table.files_under("codes")])


def test_a_model_is_trained_and_asked_on_given_codes(tiny_run: TinyRun, theirs: CodeTable, tmp_path: Path) -> None:
    write_codes(theirs, tmp_path / "codes")
    overrides = ["tokenizer.kind=external", f"tokenizer.codes={tmp_path}/codes", "pretrain.steps=3", "sft.steps=3"]
    recipe, store = load_recipe("tiny", overrides), tiny_run.store_before("train_tokenizer", tmp_path / "store")
    results = {
        name: run_stage(name, recipe, store, LocalExecutor())
        for name in ("train_tokenizer", "tokenize", "pretrain", "sft", "evaluate")
    }
    joined = read_code_table([store.fetch(e) for e in results["tokenize"].manifest.files_under("codes")])
    assert sorted(joined.keys) == sorted(theirs.keys)
    place = {key: row for row, key in enumerate(theirs.keys)}
    for row, key in enumerate(joined.keys):
        own = place[key]
        assert {name: joined.columns[name][row] for name in theirs.columns} == {
            name: theirs.columns[name][own] for name in theirs.columns
        }
        assert (joined.codes[row].ravel() == theirs.codes[own].ravel()[:6] % 32).all()
    assert joined.info.tokenizer_digest == results["train_tokenizer"].digest
    metrics = results["evaluate"].manifest.metrics
    assert "accuracy.same_category" in metrics["understanding"]
    assert set(metrics["reconstruction"]) == {"codebook_usage", "codebook_perplexity", "bits_per_image"}
    assert "generation" not in metrics
    with pytest.raises(ValueError, match="neither encoded nor decoded"):
        load_tokenizer(store, results["train_tokenizer"].digest)

    shown = inspect_code_table(store, results["tokenize"].digest, tmp_path)
    assert "no pictures: the codes are of another project's tokenizer" in shown
    most = np.bincount(joined.codes.ravel()).max()
    assert f"{1 << (int(most).bit_length() - 1)} to " in shown, "the histogram reaches the commonest code"

    moved = tmp_path / "moved"
    (tmp_path / "codes").rename(moved)
    again = load_recipe("tiny", [*overrides[:1], f"tokenizer.codes={moved}"])
    assert run_stage("train_tokenizer", again, store, LocalExecutor()).hit, "the content counts, not the path"


def test_images_without_codes_are_named(tiny_run: TinyRun, theirs: CodeTable, tmp_path: Path) -> None:
    write_codes(theirs, tmp_path / "codes", leave_out=theirs.columns["view"].index("view_1") + 1)
    recipe = load_recipe("tiny", ["tokenizer.kind=external", f"tokenizer.codes={tmp_path}/codes"])
    store = tiny_run.store_before("train_tokenizer", tmp_path / "store")
    run_stage("train_tokenizer", recipe, store, LocalExecutor())
    with pytest.raises(ValueError, match="images of shard 00000 have no codes, first key"):
        run_stage("tokenize", recipe, store, LocalExecutor())


@pytest.mark.parametrize("case", ["empty", "several"])
def test_codes_that_cannot_be_used_are_refused(tiny_run: TinyRun, theirs: CodeTable, tmp_path: Path, case: str) -> None:
    if case == "several":
        write_codes(theirs, tmp_path / "codes", shape=(2, 1, 1, 3))
    else:
        (tmp_path / "codes").mkdir()
    recipe = load_recipe("tiny", ["tokenizer.kind=external", f"tokenizer.codes={tmp_path}/codes"])
    store = tiny_run.store_before("train_tokenizer", tmp_path / "store")
    message = {"empty": "holds no .parquet file", "several": "2 books of depth 1"}[case]
    with pytest.raises(ValueError, match=message):
        run_stage("train_tokenizer", recipe, store, LocalExecutor())


def test_codes_are_imported_with_nothing_but_the_download(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two documented commands; the store holds no teacher of this recipe."""
    run = light_run(tmp_path, num_images=4, rows_per_shard=2)
    store, codes = run.store(str(tmp_path / "store")), np.arange(24).reshape(4, 1, 1, 2, 3)
    info = CodeTableInfo((1, 1, 2, 3), ("theirs",), (64,), "SEED-2", {"image_size": 40, "resize": "squash"})
    (tmp_path / "theirs").mkdir()
    write_code_shard(tmp_path / "theirs/0.parquet", info, run.keys, {"view": [None, "", "original", None]}, codes)
    import_codes(tmp_path / "theirs", str(run.recipe_path), store.uri, "local", ["teacher.steps=7"])
    made = dict(re.findall(r"^(\w+)  made  (\w+)", capsys.readouterr().out, re.MULTILINE))
    assert list(made) == ["train_tokenizer", "tokenize"]
    table = store.load(made["tokenize"])
    found = read_code_table([store.fetch(entry) for entry in table.files_under("codes")])
    assert found.keys == run.keys and np.array_equal(found.codes, codes)
    assert set(found.columns["view"]) == {"original"}
