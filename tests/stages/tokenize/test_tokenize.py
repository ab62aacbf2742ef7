"""The code table of the tiny run: which rows it has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flows.inspection import inspect_code_table, left_out_rows
from infra.executors import LocalExecutor
from models.transforms import TransformConfig, normalise
from stages.artifacts.codes import load_rows
from stages.artifacts.images import ImageSource
from stages.artifacts.models import load_teacher
from stages.artifacts.rows import ORIGINAL
from stages.pipeline.execution import run_stage
from stages.pipeline.recipe import load_recipe
from tests.helpers.tiny import TinyRun


def test_only_training_images_have_augmented_views(tiny_run: TinyRun) -> None:
    table = tiny_run.results["tokenize"].manifest
    plain = load_rows(tiny_run.store, table, split="train", views=False)
    trained = load_rows(tiny_run.store, table, split="train", views=True)
    held_out = load_rows(tiny_run.store, table, split="test", views=True)
    count = tiny_run.recipe.tokenize.views.count
    assert count > 0 and len(trained) == (1 + count) * len(plain)
    assert set(trained.columns["view"]) == {ORIGINAL, *(f"view_{number + 1}" for number in range(count))}
    assert set(held_out.columns["view"]) == {ORIGINAL}
    assert len({*trained.keys, *held_out.keys}) == len(trained) + len(held_out)
    assert table.metrics["num_rows"] == len(trained) + len(held_out)


def test_views_differ_from_their_image_and_keep_its_text(tiny_run: TinyRun) -> None:
    rows = load_rows(tiny_run.store, tiny_run.results["tokenize"].manifest, split="train", views=True)
    text, codes = dict(zip(rows.keys, rows.columns["text"], strict=True)), dict(zip(rows.keys, rows.codes, strict=True))
    views = [key for key, view in zip(rows.keys, rows.columns["view"], strict=True) if view == "view_1"]
    assert all(text[key] == text[key.removesuffix("_view_1")] for key in views)
    assert any(not codes[key].equal(codes[key.removesuffix("_view_1")]) for key in views)


@pytest.fixture(scope="module")
def scores(tiny_run: TinyRun) -> dict[str, float]:
    """How well each training image fits its caption, one pair at a time."""
    teacher = load_teacher(tiny_run.store, tiny_run.results["prepare_teacher"].manifest)
    transform = TransformConfig(image_size=tiny_run.recipe.tokenizer.transform.image_size)
    source = ImageSource(tiny_run.store, tiny_run.results["download"].manifest, transform, split="train")
    return {
        key: float((teacher.embed_images(normalise(source.pixels([at]))) @ teacher.embed_texts([caption]).T).item())
        for at, (key, caption) in enumerate(zip(source.keys, source.captions, strict=True))
    }


@pytest.mark.parametrize("kind", ["sde", "vqgan"])
def test_training_images_that_do_not_fit_their_caption_are_left_out(
    tiny_run: TinyRun, scores: dict[str, float], tmp_path: Path, kind: str
) -> None:
    ordered = sorted(scores.values())
    gaps = np.diff(ordered[2:-2])  # a threshold between two scores, which batching cannot move to the other side
    at = 2 + int(gaps.argmax())
    least = (ordered[at] + ordered[at + 1]) / 2
    overrides = [f"tokenize.min_caption_match={least}", f"tokenizer.kind={kind}", "tokenizer.steps=2"]
    recipe = load_recipe("tiny", overrides)
    store = tiny_run.store_before("train_tokenizer", tmp_path / "store")
    run_stage("train_tokenizer", recipe, store, LocalExecutor())
    table = run_stage("tokenize", recipe, store, LocalExecutor()).manifest
    unfit = {key for key, score in scores.items() if score < least}
    rows = load_rows(store, table, split="train", views=True)
    assert {key.split("_")[0] for key in rows.keys} == scores.keys() - unfit
    views = recipe.tokenize.views.count
    assert len(rows) == (len(scores) - len(unfit)) * (1 + views)
    held_out = load_rows(tiny_run.store, tiny_run.results["tokenize"].manifest, split="test", views=False)
    assert load_rows(store, table, split="test", views=False).keys == held_out.keys
    assert table.metrics == {"num_rows": len(rows) + len(held_out), "num_filtered": len(unfit), "num_failed": 0}
    left_out = left_out_rows(store, table)
    assert {row["key"] for row in left_out} == unfit
    for row in left_out:
        assert row["status"] == "filtered"
        reason, score = row["error"].removesuffix(")").split(" (")
        assert reason == f"image and caption match below {least:g}"
        assert float(score) == pytest.approx(scores[row["key"]], abs=2e-3)
    shown = inspect_code_table(store, table.digest, tmp_path, num_images=0)
    assert f"filtered              {len(unfit)}" in shown
    assert f"rows:      {len(rows) + len(held_out)} in " in shown


def test_captions_are_not_scored_by_a_teacher_without_text(tiny_run: TinyRun, tmp_path: Path) -> None:
    store = tiny_run.store_before("prepare_teacher", tmp_path / "store")
    for name in ("prepare_teacher", "train_tokenizer"):
        run_stage(name, load_recipe("tiny", ["teacher.model.head=null", "tokenizer.steps=2"]), store, LocalExecutor())
    recipe = load_recipe("tiny", ["tokenize.min_caption_match=0.3", "teacher.model.head=null", "tokenizer.steps=2"])
    with pytest.raises(ValueError, match=r"min_caption_match=0\.3 needs a teacher with a text tower"):
        run_stage("tokenize", recipe, store, LocalExecutor())
