"""The metric rows of an evaluation, from what its tasks found for each held-out row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from models.metrics.frechet import frechet_distance
from models.metrics.measures import SSIM_LLAMAGEN, SSIM_WANG, book_statistics, mean_interval, wilson_interval
from models.teachers.zero_shot import Templates
from stages.artifacts.codes import CodedRows
from stages.artifacts.rows import TEST
from stages.artifacts.templates import fill_row
from stages.evaluate.results import DRAWN_FEATURES, ORIGINAL_FEATURES, RANK, TEACHER_RANK
from stages.evaluate.tasks import RANDOM, SAME_CATEGORY
from stages.metrics.measuring import SetDistance
from stages.protocol import StageContext

if TYPE_CHECKING:
    from stages.evaluate.stage import EvaluateConfig


def evaluation_metrics(
    context: StageContext[EvaluateConfig], tables: dict[str, pa.Table], rows: CodedRows, distance: SetDistance | None
) -> list[dict[str, Any]]:
    """The metric rows of an evaluation.

    Args:
        context: of the stage.
        tables: what each task found, by the task's name.
        rows: the held-out rows of the code table.
        distance: that the features of the reconstructions end in; None where nothing was reconstructed.
    """
    kind = context.inputs["train_tokenizer"].config["kind"]
    settings = {"crop": rows.info.transform["resize"], "image_size": rows.info.transform["image_size"], "format": "PNG"}
    common = {"model": kind, "benchmark": "reconstruction", "split": TEST, "settings": settings}
    found = []
    if distance is not None:
        table = tables["reconstruction"]
        classes = len({fill_row(context.config.concept, rows.row(index)) for index in range(len(rows))})
        found += [*_reconstruction_rows(common, table), *_frechet_rows(common, table, distance)]
        found += _zero_shot_rows(common, table, classes, context.config.class_templates)
    found += [*_codebook_rows(common, rows), *_understanding_rows(kind, tables["understanding"], context.config)]
    return found + (_generation_rows(kind, tables["generation"], context) if "generation" in tables else [])


def _reconstruction_rows(common: dict[str, Any], table: pa.Table) -> list[dict[str, Any]]:
    found = []
    notes: dict[str, dict[str, Any]] = {
        "psnr": {"rule": "mean of per-image dB"},
        "ssim": SSIM_WANG.settings,
        "ssim_llamagen": SSIM_LLAMAGEN.settings | {"rule": "LlamaGen's and TokenFlow's; their range inflates it"},
        "lpips": {"library": "lpips", "network": "VGG16, v0.1", "input": "[-1, 1]"},
        "perceptual": {"rule": "distance of backbone features; a stand-in for LPIPS that does not compare with it"},
        "semantic_cosine": {"rule": "decoded from codes against the teacher's features"},
    }
    for metric, note in notes.items():
        if metric in table.column_names:
            noted = common | {"settings": common["settings"] | note}
            found.append(measured_mean(noted, metric, table[metric].to_pylist()))
    return found


def _frechet_rows(common: dict[str, Any], table: pa.Table, distance: SetDistance) -> list[dict[str, Any]]:
    """A distance of the two sets of images; one image has no spread, so none."""
    if table.num_rows < 2:
        return []
    originals, drawn = (
        torch.from_numpy(np.stack(table[name].to_numpy())) for name in (ORIGINAL_FEATURES, DRAWN_FEATURES)
    )
    settings = common["settings"] | distance.settings | {"reference": "the held-out images as the tokenizer sees them"}
    noted = common | {"settings": settings}
    return [measured(noted, distance.metric, frechet_distance(drawn, originals), table.num_rows)]


def _zero_shot_rows(
    common: dict[str, Any], table: pa.Table, classes: int, templates: Templates
) -> list[dict[str, Any]]:
    """Accuracy by what the codes say and, as the ceiling, by the teacher's own embeddings; none without the former."""
    if RANK not in table.column_names:
        return []
    found = []
    for first in (1, 5):
        if first >= classes:
            continue
        settings = common["settings"] | {"classes": classes, "templates": templates, "chance": first / classes}
        for model, column in {common["model"]: RANK, "ceiling: teacher": TEACHER_RANK}.items():
            noted = common | {"model": model, "benchmark": "zero_shot", "settings": settings}
            right = [rank < first for rank in table[column].to_pylist()]
            found.append(measured_share(noted, f"accuracy_top{first}", right))
    return found


def _codebook_rows(common: dict[str, Any], rows: CodedRows) -> list[dict[str, Any]]:
    found = []
    info = rows.info
    total = common["settings"] | {"codebook_size": info.codebook_sizes[0], "rule": "over the whole held-out split"}
    books = book_statistics(rows.codes.long(), info.codebook_names, info.codebook_sizes)
    if len(info.codebook_names) > 1:
        least = min(books[f"_{name}"].usage for name in info.codebook_names)
        found.append(
            measured(common | {"settings": total | {"book": "the least used"}}, "codebook_usage", least, len(rows))
        )
    found.append(measured(common, "bits_per_image", info.bits_per_image, len(rows)))
    for name, (usage, perplexity) in books.items():
        found.append(measured(common | {"settings": total}, f"codebook_usage{name}", usage, len(rows)))
        found.append(measured(common | {"settings": total}, f"codebook_perplexity{name}", perplexity, len(rows)))
    return found


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
        models = {
            kind: "correct",
            "baseline: raw-pixel prototypes": "pixel_baseline_correct",
            "ceiling: teacher": "teacher_correct",
        }
        for model, column in models.items():
            rule = settings if column == "correct" else settings | {"rule": "nearest of the choices"}
            common = {"model": model, "benchmark": "understanding", "split": TEST, "settings": rule}
            answered = [row[column] for row in asked if row[column] is not None]
            if answered:
                found.append(measured_share(common, f"accuracy_{distractors}", answered))
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
    common = {"benchmark": "generation", "split": TEST, "settings": settings}
    drawn, real = _by_prompt(table, "correct"), _by_prompt(table, "real_correct")
    ours, ceiling = common | {"model": kind}, common | {"model": "ceiling: real images"}
    if config.images_per_prompt == 1:
        own = measured_share(ours, "recognition", [shown[0] for shown in drawn])
    else:  # drawings of one prompt are alike, so the prompts are the samples
        shares = [sum(shown) / len(shown) for shown in drawn]
        own = measured_mean(ours | {"settings": settings | {"interval": "over prompts"}}, "recognition", shares)
    return [own, measured_share(ceiling, "recognition", [shown[0] for shown in real])]


def _by_prompt(table: pa.Table, column: str) -> list[list[bool]]:
    """The values of a column for the drawings of each held-out row."""
    values: dict[str, list[bool]] = {}
    for key, value in zip(table["key"].to_pylist(), table[column].to_pylist(), strict=True):
        values.setdefault(key, []).append(value)
    return list(values.values())


def measured_mean(common: dict[str, Any], metric: str, values: list[float]) -> dict[str, Any]:
    """One metric row: a mean and its normal 95% interval."""
    interval = mean_interval(torch.tensor(values, dtype=torch.float64))
    return _row(common, metric, interval.value, interval.low, interval.high, len(values))


def measured_share(common: dict[str, Any], metric: str, correct: list[bool]) -> dict[str, Any]:
    """One metric row: a proportion and its Wilson 95% interval."""
    interval = wilson_interval(sum(correct), len(correct))
    return _row(common, metric, interval.value, interval.low, interval.high, len(correct))


def measured(common: dict[str, Any], metric: str, value: float, num_samples: int) -> dict[str, Any]:
    """One metric row without an interval."""
    return _row(common, metric, value, None, None, num_samples)


def _row(
    common: dict[str, Any], metric: str, value: float, low: float | None, high: float | None, num_samples: int
) -> dict[str, Any]:
    return common | {"metric": metric, "value": value, "ci_low": low, "ci_high": high, "num_samples": num_samples}
