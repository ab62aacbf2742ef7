"""The flow of the whole pipeline: which stage feeds which. Results that the store has already are reused."""

from __future__ import annotations

from typing import Literal

from prefect import flow

from flows.stage_task import StageSummary, stage_tasks


@flow(name="full-pipeline", flow_run_name="{recipe}", persist_result=False)
def full_pipeline(
    recipe: str = "mini",
    store: str | None = None,
    overrides: list[str] | None = None,
    executor: Literal["ray", "local"] = "ray",
) -> list[StageSummary]:
    """Run all stages, from image-text pairs to an evaluated model.

    Args:
        recipe: name of a recipe, or path of a YAML file.
        store: folder or s3://bucket/prefix; default MUSEVL_STORE, else `.musevl/store`.
        overrides: `section.field=value` strings.
        executor: executor of mapped work: `ray`, or `local` for this process alone.

    Returns:
        One summary per stage, in pipeline order.
    """
    with stage_tasks(recipe, store, overrides or [], executor) as stage:
        images = stage("download")
        teacher = stage("prepare_teacher", images)
        tokenizer = stage("train_tokenizer", images, teacher)
        codes = stage("tokenize", images, teacher, tokenizer)
        pretrained = stage("pretrain", codes)
        finetuned = stage("sft", codes, pretrained)
        metrics = stage("evaluate", images, teacher, tokenizer, codes, finetuned)
    return [images, teacher, tokenizer, codes, pretrained, finetuned, metrics]
