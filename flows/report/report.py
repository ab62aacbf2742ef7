"""HTML pages: what a recipe's run came to, a view of artifacts and run records; and tokenizers side by side."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from flows.report.comparison import Comparison, code_pages, side_by_side
from flows.report.data import collect
from flows.report.page import render_comparison, render_page, write_page
from stages.pipeline.execution import find_artifacts
from stages.pipeline.recipe import STAGES, Recipe
from storage.store import Store


def write_report(recipe: Recipe, store: Store, folder: Path) -> Path:
    """Write the page of a recipe from what the store holds; sections whose artifact is missing say so.

    Args:
        recipe: whose artifacts are looked up.
        store: that holds them.
        folder: made if needed; an `index.html` in it is replaced.

    Returns:
        The path of `index.html`, which needs no other file and no network.

    Raises:
        StoreError: a file of an artifact is missing or damaged.
    """
    data = collect(
        recipe=recipe.name,
        description=recipe.description,
        seed=recipe.seed,
        written=_now(),
        artifacts=find_artifacts(recipe, store),
        inputs={name: stage.feeders(recipe.section(stage)) for name, stage in STAGES.items()},
        store=store,
    )
    return write_page(render_page(data), folder)


def write_comparison(comparison: Comparison, store: Store, folder: Path) -> Path:
    """Write `index.html` and `comparison.parquet` of a comparison of tokenizers; returns the path of the page."""
    comparison.save(folder / "comparison.parquet")
    pictures, codes = side_by_side(comparison, store), code_pages(comparison, store)
    return write_page(render_comparison(comparison, pictures, codes, _now()), folder)


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
