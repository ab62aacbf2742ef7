"""Evaluation on held-out pairs: reconstruction, understanding by multiple choice, generation by recognition."""

from __future__ import annotations

from typing import Annotated, Any

import pyarrow.compute as pc
import torch
from pydantic import Field, PositiveInt

from models.language.sampling import SamplingConfig
from models.teachers.zero_shot import Templates
from stages.artifacts import external_codes
from stages.artifacts.codes import load_rows
from stages.artifacts.models import load_teacher
from stages.artifacts.rows import TEST
from stages.artifacts.templates import ChoiceTemplate, Template
from stages.evaluate.metric_rows import evaluation_metrics
from stages.evaluate.results import DRAWN_FEATURES, FILES, ORIGINAL_FEATURES, TEXT_CUT, gather
from stages.evaluate.tasks import TaskFactory
from stages.metrics.measuring import SetDistance, feature_space, weights_inputs
from stages.protocol import Device, Outcome, RuntimeFloat, RuntimeInt, RuntimeStr, Stage, StageContext
from stages.runtime.devices import PrecisionConfig, resolve_device
from stages.runtime.progress import tracked
from storage.code_table import check_tokenizer
from storage.digests import canonical_json
from storage.tables import metrics_table, write_table


class EvaluateConfig(PrecisionConfig):
    """What is asked, drawn and measured. The scoring rule is fixed: highest mean log-likelihood a token."""

    max_rows: PositiveInt | None = None
    """Only the first held-out rows; `null` takes all."""
    question: Template = "What is in the picture?"
    """Asked about each held-out image."""
    answer: ChoiceTemplate = "{choice}"
    """How a choice is written as an answer."""
    concept: Template = "{concept}"
    """The name of what an image shows, a template over the code table's columns; `{caption}` is its text."""
    category_column: str = "category"
    """Column from which same-category distractors are drawn; rows without a value get no such questions."""
    num_choices: Annotated[int, Field(ge=2)] = 4
    """Choices of a question."""
    prompt: Template = "Draw {caption}."
    """Drawing request of each held-out row."""
    images_per_prompt: PositiveInt = 1
    """Drawings of each request."""
    recognition_choices: Annotated[int, Field(ge=2)] = 10
    """Concepts among which the teacher recognises a drawing."""
    sampling: SamplingConfig = SamplingConfig()
    """How drawings are sampled."""
    inception_weights: RuntimeStr = ""
    """Path of torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, for rFID; its content counts, not its path.
    Empty: a Fréchet distance in the teacher's space, named so, takes its place."""
    lpips_vgg_weights: RuntimeStr = ""
    """Path of torchvision's VGG16 state dict, for LPIPS; its content counts, not its path. Empty: the distance of a
    backbone teacher's features, named `perceptual`, takes its place."""
    class_templates: Templates = "name"
    """Zero-shot classification among the concepts: `name`, a class is its name; `openai`, the mean over the 80
    sentences of CLIP's ImageNet evaluation."""
    rows_per_shard: PositiveInt = 48
    """Held-out rows measured, and lost by a crash, together."""
    num_workers: RuntimeInt = 1
    """Workers at a time."""
    gpus_per_worker: RuntimeFloat = 0.0
    """Share of a GPU that each worker holds; with 0 and `device: auto` all workers of a machine take its first GPU."""
    threads_per_worker: PositiveInt = 1
    """CPU threads of each worker; part of the identity of the result as in training."""
    device: Device = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`."""

    def computes_on(self) -> str:
        return "cuda" if self.gpus_per_worker else resolve_device(self.device).type


def run(context: StageContext[EvaluateConfig]) -> Outcome:
    """Make the `evaluation` artifact: metric rows, and the pictures and answers that they stand on.

    Raises:
        ValueError: the parts were not made for each other, or nothing is held out.
    """
    config, store, key = context.config, context.store, context.action_key
    tokenizer = context.inputs["train_tokenizer"]
    rows = load_rows(store, context.inputs["tokenize"], split=TEST, views=False)
    check_tokenizer(rows.info, tokenizer.digest)
    trained_on = context.inputs["sft"].metadata["tokenizer"]
    check_tokenizer(rows.info, trained_on)
    count = len(rows) if config.max_rows is None else min(len(rows), config.max_rows)
    tasks = ["understanding"] if tokenizer.kind == external_codes.KIND else list(FILES)
    # here, so that wrong weights end it at once
    distance = _set_distance(context) if "reconstruction" in tasks else None
    plan = store.create_plan(key, {"items": _items(tasks, count, config.rows_per_shard)})
    done = store.receipts(key)
    items = [item for item in plan["items"] if item["shard"] not in done]
    factory = TaskFactory(store, key, config, context.seed, context.inputs)
    for _ in tracked(
        context.executor.map(factory, items, num_workers=config.num_workers, num_gpus=config.gpus_per_worker),
        len(items),
        "evaluate shards",
    ):
        pass
    receipts = store.receipts(key, done)
    missing = [item["shard"] for item in plan["items"] if item["shard"] not in receipts]
    assert not missing, f"every shard was mapped, yet {missing} have no receipt"
    tables = gather(store, receipts)
    metric_rows = evaluation_metrics(context, tables, rows, distance)
    if distance is not None:
        tables["reconstruction"] = tables["reconstruction"].drop_columns([ORIGINAL_FEATURES, DRAWN_FEATURES])
    files = []
    for name, table in {
        "metrics": metrics_table(metric_rows),
        **{FILES[task]: t for task, t in tables.items()},
    }.items():
        path = context.scratch / f"{name}.parquet"
        write_table(table, path)
        files.append(store.put_file(path, f"{name}.parquet"))
    files.append(store.put_bytes(canonical_json(metric_rows), "metrics.json"))
    headline = {f"{row['model']}.{row['benchmark']}.{row['metric']}": row["value"] for row in metric_rows}
    num_cut = sum(pc.sum(table[TEXT_CUT]).as_py() for table in tables.values() if TEXT_CUT in table.column_names)
    return Outcome("evaluation", files, metrics=headline | {"num_cut": num_cut})


def _set_distance(context: StageContext[EvaluateConfig]) -> SetDistance:
    """What the workers' features end in; the networks that they are made with are not kept in this process."""
    teacher = load_teacher(context.store, context.inputs["prepare_teacher"])
    return feature_space("evaluate", context.config.inception_weights, teacher, torch.device("cpu")).distance


def _items(tasks: list[str], count: int, rows_per_shard: int) -> list[dict[str, Any]]:
    return [
        {"shard": f"{task}-{start:07d}", "task": task, "start": start, "count": min(rows_per_shard, count - start)}
        for task in tasks
        for start in range(0, count, rows_per_shard)
    ]


def _external_inputs(config: EvaluateConfig) -> dict[str, str]:
    paths = {"inception_weights": config.inception_weights, "lpips_vgg_weights": config.lpips_vgg_weights}
    return weights_inputs("evaluate", **paths)


STAGE = Stage(
    name="evaluate",
    section="evaluate",
    config_class=EvaluateConfig,
    inputs=("download", "prepare_teacher", "train_tokenizer", "tokenize", "sft"),
    run=run,
    version=6,  # SSIM as scikit-image has it; images arrive as sRGB; text is never markup
    external_inputs=_external_inputs,
)
