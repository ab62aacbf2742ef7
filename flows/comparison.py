"""Flow that compares tokenizers: each kind is trained on the same images, then the same language model on its codes."""

from __future__ import annotations

from typing import Literal

from prefect import flow

from flows.pipeline import full_pipeline
from flows.report.comparison import overrides_of
from stages.pipeline.recipe import load_recipe


@flow(name="compare-tokenizers", flow_run_name="{recipe}", persist_result=False)
def compare_tokenizers(
    kinds: list[str],
    seeds: list[int],
    recipe: str = "mini",
    store: str | None = None,
    overrides: list[str] | None = None,
    executor: Literal["ray", "local"] = "ray",
) -> None:
    """Run the full pipeline for every kind and seed; results that they have in common are made once.

    Args:
        kinds: values of `tokenizer.kind`.
        seeds: random seeds of the runs; the held-out pairs stay the same.
        recipe: name of a recipe, or path of a YAML file.
        store: folder or s3://bucket/prefix; default MUSEVL_STORE, else `.musevl/store`.
        overrides: `section.field=value` strings for every run.
        executor: executor of mapped work: `ray`, or `local` for this process alone.

    Raises:
        RecipeError: one of the runs has a wrong recipe; none is started then.
    """
    runs = [overrides_of(kind, seed, overrides or []) for seed in seeds for kind in kinds]
    for given in runs:
        load_recipe(recipe, given)  # a mistake in the last one is not found out after hours of the others
    for given in runs:
        full_pipeline(recipe=recipe, store=store, overrides=given, executor=executor)
