"""Metric rows of an evaluation, computed from its tasks' tables of held-out rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from models.transforms import TransformConfig
from stages.artifacts.codes import CodedRows
from stages.artifacts.rows import TEST
from stages.artifacts.templates import fill_row
from stages.evaluate.tasks import RANDOM, SAME_CATEGORY
from stages.metrics.measuring import SetDistance, ZeroShotClasses
from stages.metrics.reconstructions import (
    DRAWN_FEATURES,
    ORIGINAL_FEATURES,
    codebook_rows,
    held_out_rows,
    reconstruction_rows,
)
from stages.metrics.rows import RowMaker
from stages.protocol import StageContext
from storage.tables import BASELINE, CEILING

if TYPE_CHECKING:
    from stages.evaluate.stage import EvaluateConfig

_FEATURES = (ORIGINAL_FEATURES, DRAWN_FEATURES)


def evaluation_metrics(
    context: StageContext[EvaluateConfig], tables: dict[str, pa.Table], rows: CodedRows, distance: SetDistance | None
) -> list[dict[str, Any]]:
    """Return the metric rows of an evaluation.

    Args:
        context: The context of the stage.
        tables: The table of each task by the task's name.
        rows: The held-out rows of the code table.
        distance: The Fréchet distance of the reconstructions' features; None if nothing was reconstructed.
    """
    config, info = context.config, rows.info
    kind = context.inputs["train_tokenizer"].config["kind"]
    make = held_out_rows(kind, TEST, TransformConfig(**info.transform))
    found = []
    if distance is not None:
        names = {fill_row(config.concept, rows.row(index)) for index in range(len(rows))}
        classes = ZeroShotClasses(len(names), config.class_templates)
        found += reconstruction_rows(make, _columns(tables["reconstruction"]), distance, classes)
    found += codebook_rows(make, rows.codes.long(), info.codebook_names, info.codebook_sizes)
    found += _understanding_rows(kind, tables["understanding"], config)
    return found + (_generation_rows(kind, tables["generation"], context) if "generation" in tables else [])


def _columns(table: pa.Table) -> dict[str, Tensor]:
    """Return the measured columns of each image, without images and texts."""
    return {
        field.name: torch.from_numpy(np.stack(table[field.name].to_numpy()))
        for field in table.schema
        if field.name in _FEATURES or pa.types.is_floating(field.type) or pa.types.is_integer(field.type)
    }


def _understanding_rows(kind: str, table: pa.Table, config: EvaluateConfig) -> list[dict[str, Any]]:
    found = []
    for distractors in (SAME_CATEGORY, RANDOM):
        asked = [row for row in table.drop_columns(["image"]).to_pylist() if row["distractors"] == distractors]
        settings = {
            "choices": config.num_choices,
            "distractors": distractors,
            "rule": "highest mean log-likelihood a token",
            "chance": 1 / config.num_choices,
        }
        own = RowMaker(kind, "understanding", TEST, settings)
        nearest = replace(own, settings=settings | {"rule": "nearest of the choices"})
        for make, column in (
            (own, "correct"),
            (nearest.of("raw-pixel prototypes", BASELINE), "pixel_baseline_correct"),
            (nearest.of("teacher", CEILING), "teacher_correct"),
        ):
            answered = [row[column] for row in asked if row[column] is not None]
            if answered:
                found.append(make.share("accuracy", answered, distractors))
    return found


def _generation_rows(kind: str, table: pa.Table, context: StageContext[EvaluateConfig]) -> list[dict[str, Any]]:
    config = context.config
    settings = {
        "choices": config.recognition_choices,
        "chance": 1 / config.recognition_choices,
        "judge": context.inputs["prepare_teacher"].digest[:12],
        "sampling": config.sampling.model_dump(mode="json"),
        "guidance_convention": "u + s(c - u)",
        "images_per_prompt": config.images_per_prompt,
    }
    make = RowMaker(kind, "generation", TEST, settings)
    drawn, real = _by_prompt(table, "correct"), _by_prompt(table, "real_correct")
    if config.images_per_prompt == 1:
        own = make.share("recognition", [shown[0] for shown in drawn])
    else:  # drawings of one prompt are alike, so the prompts are the samples
        own = make.mean("recognition", [sum(shown) / len(shown) for shown in drawn], interval="over prompts")
    return [own, make.of("real images", CEILING).share("recognition", [shown[0] for shown in real])]


def _by_prompt(table: pa.Table, column: str) -> list[list[bool]]:
    """Return the values of a column for the generated images of each held-out row."""
    values: dict[str, list[bool]] = {}
    for key, value in zip(table["key"].to_pylist(), table[column].to_pylist(), strict=True):
        values.setdefault(key, []).append(value)
    return list(values.values())
