"""Held-out images are measured alike after the training of a tokenizer and in evaluation."""

from __future__ import annotations

import pytest

from stages.metrics.rows import name_of
from storage.tables import read_metrics
from tests.helpers.tiny import TinyRun


def test_training_and_evaluation_give_equal_values_under_equal_names(tiny_run: TinyRun) -> None:
    trained, evaluated = (tiny_run.results[name].manifest for name in ("train_tokenizer", "evaluate"))
    for own, other in (
        (trained.metrics, evaluated.metrics),
        (trained.metrics["teacher"], evaluated.metrics["teacher"]),
    ):
        for benchmark in ("reconstruction", "zero_shot"):
            if benchmark in own:
                # evaluation computes in smaller batches, so sums are rounded otherwise
                assert own[benchmark] == pytest.approx(other[benchmark], rel=1e-4)
    names = {name for benchmark in ("reconstruction", "zero_shot") for name in trained.metrics[benchmark]}
    assert {"psnr", "ssim", "ssim_llamagen", "perceptual", "frechet_teacher", "semantic_cosine"} < names
    assert {"codebook_usage", "bits_per_image", "zero_shot_accuracy.top1", "zero_shot_accuracy.top5"} < names


def test_training_and_evaluation_say_the_same_of_how_they_measured(tiny_run: TinyRun) -> None:
    evaluation = tiny_run.results["evaluate"].manifest
    rows = read_metrics(tiny_run.store.fetch(evaluation.file("metrics.parquet")))
    measured = tiny_run.results["train_tokenizer"].manifest.metadata["measured"]
    expected = {
        name_of(row): row["settings"]
        for row in rows
        if row["role"] == "ours" and row["benchmark"] in ("reconstruction", "zero_shot")
    }
    assert measured["settings"] == expected
    assert {(row["split"], row["num_samples"]) for row in rows if name_of(row) in expected} == {
        (measured["split"], measured["num_images"])
    }
