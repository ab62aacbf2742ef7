"""Evaluation on held-out pairs: reconstruction, understanding by multiple choice, generation by recognition."""

from __future__ import annotations

from typing import Annotated

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
from stages.evaluate.results import FILES, LEFT_OUT, TEXT_CUT, gather, left_out_table
from stages.evaluate.tasks import TaskFactory
from stages.evaluate.worker import EvaluationShard, EvaluationWorkerFactory, MeasuredShard
from stages.mapped.engine import FailureLimit, Job, finish_shards, gather_receipts
from stages.metrics.measuring import SetDistance, feature_space, weights_inputs
from stages.metrics.reconstructions import DRAWN_FEATURES, ORIGINAL_FEATURES
from stages.metrics.rows import artifact_metrics
from stages.protocol import Device, GpuShare, Outcome, RuntimeFraction, RuntimeInt, RuntimeStr, Stage, StageContext
from stages.runtime.devices import PrecisionConfig, resolve_device
from storage.code_table import check_tokenizer
from storage.digests import canonical_json
from storage.tables import metrics_table, write_table


class EvaluateConfig(PrecisionConfig):
    """Questions, prompts and metrics of the evaluation; answers are scored by mean log-likelihood per token."""

    max_rows: PositiveInt | None = None
    """Number of first held-out rows that are used; `null` uses all."""
    question: Template = "What is in the picture?"
    """Question about each held-out image."""
    answer: ChoiceTemplate = "{choice}"
    """Template that turns a choice into an answer."""
    concept: Template = "{concept}"
    """Template over the code table's columns for the name of what an image shows; `{caption}` is its text."""
    category_column: str = "category"
    """Column whose value same-category distractors share; rows without a value get no such questions."""
    num_choices: Annotated[int, Field(ge=2)] = 4
    """Number of choices of a question."""
    prompt: Template = "Draw {caption}."
    """Prompt for generation, for each held-out row."""
    images_per_prompt: PositiveInt = 1
    """Number of images generated per prompt."""
    recognition_choices: Annotated[int, Field(ge=2)] = 10
    """Number of concepts among which the teacher recognises a generated image."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling of generated images."""
    inception_weights: RuntimeStr = ""
    """Path of torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, for rFID; its content enters the action
    key, not its path. Empty: a Fréchet distance in the teacher's feature space, under another name."""
    lpips_vgg_weights: RuntimeStr = ""
    """Path of torchvision's VGG16 state dict, for LPIPS; its content enters the action key, not its path. Empty: the
    distance of a backbone teacher's features, under the name `perceptual`."""
    class_templates: Templates = "name"
    """Zero-shot classification among the concepts. `name`: the text of a class is its name; `openai`: the mean over
    CLIP's 80 templates for ImageNet."""
    rows_per_shard: PositiveInt = 48
    """Number of held-out rows per shard, the unit of work that is lost by a crash."""
    max_failed_fraction: RuntimeFraction = 0.01
    """The stage stops as soon as a larger fraction of the rows, of all tasks together, has killed its worker; finished
    shards are kept, and a run with a higher limit continues from there."""
    num_workers: RuntimeInt = 1
    """Number of workers."""
    gpus_per_worker: GpuShare = 0.0
    """Number of GPUs, or fraction of a GPU, that each worker reserves; with 0 and `device: auto` all workers of a
    machine use its first GPU."""
    cpu_threads: PositiveInt = 1
    """Number of CPU threads of each worker, which enters the action key as in training."""
    device: Device = "auto"
    """`auto` (a GPU if there is one), `cpu` or `cuda`."""

    def computes_on(self) -> str:
        return "cuda" if self.gpus_per_worker else resolve_device(self.device).type


def run(context: StageContext[EvaluateConfig]) -> Outcome:
    """Make the `evaluation` artifact: metric rows, and the images and answers that they are computed from.

    Raises:
        ValueError: the parts were not made for each other, or nothing is held out.
    """
    config, store = context.config, context.store
    tokenizer = context.inputs["train_tokenizer"]
    rows = load_rows(store, context.inputs["tokenize"], split=TEST, views=False)
    check_tokenizer(rows.info, tokenizer.digest)
    check_tokenizer(rows.info, context.inputs["sft"].metadata["tokenizer"])
    count = len(rows) if config.max_rows is None else min(len(rows), config.max_rows)
    tasks = ["understanding"] if tokenizer.kind == external_codes.KIND else list(FILES)
    # built here, so that wrong weights are an error at once
    distance = _set_distance(context) if "reconstruction" in tasks else None
    planned = [shard.to_json() for shard in _shards(tasks, count, config.rows_per_shard)]
    plan = store.work(context.action_key).create_plan({"shards": planned})
    shards = [EvaluationShard.from_json(shard) for shard in plan["shards"]]
    receipts = _measure(context, shards)
    tables = gather(store, ((receipt.task, receipt.files) for receipt in receipts))
    metric_rows = evaluation_metrics(context, tables, rows, distance)
    if distance is not None:
        tables["reconstruction"] = tables["reconstruction"].drop_columns([ORIGINAL_FEATURES, DRAWN_FEATURES])
    num_cut = sum(pc.sum(table[TEXT_CUT]).as_py() for table in tables.values() if TEXT_CUT in table.column_names)
    written = {"metrics": metrics_table(metric_rows), **{FILES[task]: table for task, table in tables.items()}}
    left_out = {
        task: [row for receipt in receipts if receipt.task == task for row in receipt.left_out] for task in tasks
    }
    if num_failed := sum(map(len, left_out.values())):
        written[LEFT_OUT] = left_out_table(left_out)
    files = []
    for name, table in written.items():
        path = context.scratch / f"{name}.parquet"
        write_table(table, path)
        files.append(store.put_file(path, f"{name}.parquet"))
    files.append(store.put_bytes(canonical_json(metric_rows), "metrics.json"))
    metrics = artifact_metrics(metric_rows) | {"num_cut": num_cut, "num_failed": num_failed}
    return Outcome("evaluation", files, metrics=metrics, schema_version=2)


def _measure(context: StageContext[EvaluateConfig], shards: list[EvaluationShard]) -> list[MeasuredShard]:
    """Return the receipts of the shards, in their order.

    Raises:
        ValueError: too many rows could not be measured.
    """
    config = context.config
    factory = EvaluationWorkerFactory(TaskFactory(context.store, config, context.seed, context.inputs))
    job = Job(factory, EvaluationShard, MeasuredShard, "evaluate shards", "rows", lambda receipt: receipt.rows)
    total = sum(shard.count for shard in shards)
    limit = FailureLimit(
        "evaluate.max_failed_fraction", config.max_failed_fraction, total, "rows could not be measured"
    )
    receipts = gather_receipts(
        finish_shards(context, shards, job, num_workers=config.num_workers, num_gpus=config.gpus_per_worker),
        limit,
        lambda receipt: receipt.left_out,
        "look at these rows, or raise the limit: what is measured is kept",
    )
    return [receipts[shard.shard] for shard in shards]


def _set_distance(context: StageContext[EvaluateConfig]) -> SetDistance:
    """Return the distance that the workers' features are for; the networks are not kept in this process."""
    teacher = load_teacher(context.store, context.inputs["prepare_teacher"])
    return feature_space("evaluate", context.config.inception_weights, teacher, torch.device("cpu")).distance


def _shards(tasks: list[str], count: int, rows_per_shard: int) -> list[EvaluationShard]:
    return [
        EvaluationShard(f"{task}-{start:07d}", task, start, min(rows_per_shard, count - start))
        for task in tasks
        for start in range(0, count, rows_per_shard)
    ]


def _external_inputs(config: EvaluateConfig) -> dict[str, str]:
    paths = {"inception_weights": config.inception_weights, "lpips_vgg_weights": config.lpips_vgg_weights}
    return weights_inputs("evaluate", **paths)


STAGE = Stage(
    name="evaluate",
    section="evaluate",
    inputs=("download", "prepare_teacher", "train_tokenizer", "tokenize", "sft"),
    run=run,
    version=7,  # metric rows have a role and a qualifier
    external_inputs=_external_inputs,
)
