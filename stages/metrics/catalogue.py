"""Catalogue of the metrics that stages record: name, unit, direction, format and meaning of each.

Stages look a metric up when they record it, and the report, the comparison of tokenizers and `musevl results` when they
show it; the table in `docs/metrics.md` is generated from it. The module does not import PyTorch, so that commands that
only show metrics start fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Direction = Literal["higher", "lower", ""]
"""Which values are better; empty if neither are."""

HELD_OUT_CURVE = "held_out_"
"""Prefix of the names of training curves that show a metric of the held-out images."""
_GENERAL = ".4g"


@dataclass(frozen=True)
class Metric:
    """One metric."""

    name: str
    meaning: str
    """One sentence, in Markdown."""
    unit: str = ""
    """Shown after the number; `%` means that the value is a fraction of 1 and is shown as a percentage."""
    direction: Direction = ""
    form: str = _GENERAL
    """Format specification of the shown number."""
    qualifier: str = ""
    """What the qualifier of a row names, for example the codebook; empty if the metric has no qualifier."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Heading of the column in a comparison of tokenizers, by qualifier; rows with other qualifiers have no column."""

    def number(self, value: float, sign: str = "") -> str:
        """Format a value without its unit; `sign="+"` also shows the sign of positive values."""
        if not math.isfinite(value):
            return str(value)
        return f"{100 * value if self.unit == '%' else value:{sign}{self.form}}"

    def text(self, value: float) -> str:
        """Format a value with its unit."""
        number = self.number(value)
        return f"{number}\u00a0{self.unit}" if self.unit and math.isfinite(value) else number


_BOOK = "the book, where there are several, and its depth, where it has several: `semantic`, `pixel.depth2`, `depth1`"

_METRICS = (
    # Evaluation and held-out images, in the order of the columns of a comparison of tokenizers
    Metric(
        "accuracy",
        "Share of multiple-choice questions that are answered right.",
        unit="%",
        direction="higher",
        form=".1f",
        qualifier="where the wrong choices come from: `same_category`, `random`",
        columns={"same_category": "same category %", "random": "random %"},
    ),
    Metric(
        "recognition",
        "Share of drawings in which the teacher recognises what was asked for, among several concepts.",
        unit="%",
        direction="higher",
        form=".1f",
        columns={"": "drawing %"},
    ),
    Metric(
        "zero_shot_accuracy",
        "Share of images whose class is among the nearest class names in the teacher's image-text space.",
        unit="%",
        direction="higher",
        form=".1f",
        qualifier="how many nearest names count: `top1`, `top5`",
        columns={"top1": "zero-shot %"},
    ),
    Metric(
        "psnr",
        "Peak signal-to-noise ratio of reconstructions, mean over images.",
        unit="dB",
        direction="higher",
        form=".2f",
        columns={"": "PSNR dB"},
    ),
    Metric(
        "ssim",
        "Structural similarity of reconstructions (Wang et al. 2004: Gaussian window, range 1).",
        direction="higher",
        form=".3f",
        columns={"": "SSIM"},
    ),
    Metric(
        "ssim_llamagen",
        "Structural similarity as LlamaGen's and TokenFlow's scripts compute it: uniform window, range 2; larger.",
        direction="higher",
        form=".3f",
    ),
    Metric(
        "lpips",
        "Learned perceptual distance of reconstructions (LPIPS with VGG16).",
        direction="lower",
        form=".4f",
    ),
    Metric(
        "perceptual",
        "Distance of reconstructions in a backbone's features; it stands in for LPIPS and compares with no paper.",
        direction="lower",
        form=".4f",
    ),
    Metric(
        "rfid",
        "Fréchet distance of reconstructions and originals in Inception's features (rFID).",
        direction="lower",
        form=",.2f",
        columns={"": "rFID"},
    ),
    Metric(
        "frechet_teacher",
        "Fréchet distance in the teacher's features; it compares between runs with one teacher and with no paper.",
        direction="lower",
        form=",.3f",
        columns={"": "Fréchet, teacher"},
    ),
    Metric(
        "semantic_cosine",
        "Cosine of the features that the codes are decoded to with the teacher's, mean over positions and images.",
        direction="higher",
        form=".3f",
        columns={"": "cosine"},
    ),
    Metric(
        "codebook_usage",
        "Share of a codebook's codes that occur in the held-out images; without a qualifier, of the least used book.",
        unit="%",
        direction="higher",
        form=".1f",
        qualifier=_BOOK,
        columns={"": "codebook %"},
    ),
    Metric(
        "codebook_perplexity",
        "Number of equally frequent codes that a codebook is worth: exponential of the entropy of its codes.",
        direction="higher",
        form=",.1f",
        qualifier=_BOOK,
    ),
    Metric(
        "bits_per_image",
        "Most information that the codes of an image can hold: log2 of the codebook's size for each code.",
        unit="bits",
        form=",.0f",
        columns={"": "bits an image"},
    ),
    # Curves of training
    Metric("loss", "What the optimiser minimises: the weighted sum of all terms.", direction="lower"),
    Metric("gradient_norm", "Norm of the gradient of all weights before it is clipped."),
    Metric(
        "batch_accuracy",
        "Share of a batch's images whose own caption is the nearest one.",
        unit="%",
        direction="higher",
        form=".1f",
    ),
    Metric("l1", "Mean absolute difference of reconstruction and image, in [-1, 1].", direction="lower"),
    Metric("l2", "Mean squared difference of reconstruction and image, in [-1, 1].", direction="lower"),
    Metric("quantizer", "Commitment and codebook losses of the quantizers, weighted.", direction="lower"),
    Metric("semantic", "1 minus the cosine of the decoded features with the teacher's.", direction="lower"),
    Metric("semantic_mse", "Mean squared difference of the decoded features and the teacher's.", direction="lower"),
    Metric("pooled", "1 minus the cosine of the pooled decoded features with the teacher's.", direction="lower"),
    Metric(
        "pooled_mse", "Mean squared difference of the pooled features, decoded and the teacher's.", direction="lower"
    ),
    Metric("contrastive", "Contrastive loss of the codes' embeddings and those of the captions.", direction="lower"),
    Metric("adversarial", "Generator's loss: minus the mean output of the discriminator on reconstructions."),
    Metric("discriminator", "Hinge loss of the discriminator on images and reconstructions."),
    # Counts
    Metric("num_rows", "Rows of the artifact, or rows that were trained on."),
    Metric("num_ok", "Rows of a download that gave an image."),
    Metric("num_filtered", "Images that a filter left out."),
    Metric(
        "num_failed",
        "Rows that gave no image, images that gave no codes, or held-out rows that could not be measured.",
        direction="lower",
    ),
    Metric("num_in_unused_splits", "Images in splits that no stage reads."),
    Metric("num_cut", "Rows whose text was too long for the language model and was cut.", direction="lower"),
    Metric(
        "num_left_out",
        "Rows that were left out because their text was too long for the language model.",
        direction="lower",
    ),
    Metric("status", "Rows of a download by what became of them.", qualifier="the status"),
    Metric("errors", "Failed rows of a download by the reason.", direction="lower", qualifier="the reason"),
    Metric("filters", "Filtered images of a download by the filter.", qualifier="the filter"),
    Metric("splits", "Images of a download by split.", qualifier="the split"),
    Metric("hosts", "Rows of the hosts with most failures.", qualifier="the host, then `rows` or `failed`"),
)

CATALOGUE: Mapping[str, Metric] = {metric.name: metric for metric in _METRICS}
"""All metrics by name, in the order of tables."""


def metric_of(name: str) -> Metric:
    """Return the metric of a name.

    Raises:
        ValueError: The name is not in the catalogue.
    """
    if name not in CATALOGUE:
        raise ValueError(f"there is no metric {name!r} in stages/metrics/catalogue.py; add it there, with its meaning")
    return CATALOGUE[name]


def full_name(metric: str, qualifier: str) -> str:
    """Join a metric and its qualifier to one name, for example `accuracy.same_category`."""
    return f"{metric}.{qualifier}" if qualifier else metric


def find_metric(name: str) -> Metric | None:
    """Return the metric of a name from `full_name`; None if it is not in the catalogue."""
    return CATALOGUE.get(name.partition(".")[0])


def text_of(name: str, value: float) -> str:
    """Format a value with the unit of its metric.

    Args:
        name: The name from `full_name`; a value whose name is not in the catalogue is shown with four digits.
        value: The recorded value.
    """
    metric = find_metric(name)
    return f"{value:{_GENERAL}}" if metric is None else metric.text(value)


def direction_of(name: str) -> Direction:
    """Return which values of a metric are better; empty also if it is not in the catalogue."""
    metric = find_metric(name)
    return "" if metric is None else metric.direction


def markdown_table() -> str:
    """Return the catalogue as the table of `docs/metrics.md`."""
    lines = ["| metric | unit | better | meaning | qualifier |", "| --- | --- | --- | --- | --- |"]
    for metric in CATALOGUE.values():
        cells = [f"`{metric.name}`", metric.unit, metric.direction, metric.meaning, metric.qualifier]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
