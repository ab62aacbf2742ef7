"""The code table of the tiny run: which rows it has."""

from __future__ import annotations

from stages.image_data import ORIGINAL
from stages.vlm_training import load_rows
from tests.tiny import TinyRun


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
