"""What is measured of a tokenizer, after training and in evaluation: rFID, zero-shot accuracy, the pooled loss."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.executors import LocalExecutor
from models.metrics.frechet import InceptionFeatures, frechet_distance
from stages.artifacts.images import ImageSource
from stages.artifacts.models import load_tokenizer
from stages.metrics.measuring import perceptual_of
from stages.metrics.rows import name_of
from stages.pipeline.execution import StageResult, run_stage
from stages.pipeline.recipe import load_recipe
from stages.runtime.devices import autocast
from stages.train_tokenizer import stage as train_tokenizer
from storage.digests import sha256_file
from storage.store import Store
from storage.tables import read_metrics, read_table
from tests.helpers.inception import random_inception_state
from tests.helpers.tiny import TinyRun

NUM_HELD_OUT = 22


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_inception_state(), path)
    return path


def train(store: Store, *overrides: str) -> StageResult:
    return run_stage("train_tokenizer", load_recipe("tiny", list(overrides)), store, LocalExecutor())


@pytest.fixture(scope="module")
def dualtoken(tiny_run: TinyRun, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, StageResult]:
    """Two steps of `dualtoken` with the pooled loss, measured with Inception."""
    store = tiny_run.store_before("train_tokenizer", tmp_path_factory.mktemp("dualtoken") / "store")
    return store, train(store, *overrides(weights))


def held_out(store: Store, result: StageResult) -> ImageSource:
    transform = load_tokenizer(store, result.digest).config.transform
    return ImageSource(store, store.load(result.manifest.inputs["download"]), transform, split="test")


def overrides(weights: Path) -> list[str]:
    loss = "tokenizer.loss={perceptual: none, adversarial_weight: 0, semantic_weight: 5, semantic_mse_weight: 2"
    return [
        "tokenizer.kind=dualtoken",
        f"{loss}, pooled_weight: 0.5}}",
        "tokenizer.steps=2",
        "tokenizer.log_every=1",
        "tokenizer.measure_every=2",
        f"tokenizer.inception_weights={weights}",
    ]


def test_the_loss_is_the_sum_of_its_terms(dualtoken: tuple[Store, StageResult]) -> None:
    """DualToken: `5 (1 - cos + MSE)` of the layer, `(1 - cos + MSE)` of the pooled vector; here MSE counts twice."""
    store, result = dualtoken
    points = read_table(store.fetch(result.manifest.file("history.parquet"))).to_pylist()
    for step in {row["step"] for row in points if row["name"] == "loss"}:
        term = {row["name"]: row["value"] for row in points if row["step"] == step}
        semantic = 5 * (term["semantic"] + 2 * term["semantic_mse"])
        pooled = 0.5 * (term["pooled"] + 2 * term["pooled_mse"])
        expected = term["l2"] + term["quantizer"] + semantic + pooled
        assert term["loss"] == pytest.approx(expected, rel=2e-2), "bf16"
        assert 0 < term["pooled"] < 2


def test_measuring_while_it_trains_draws_curves_and_changes_no_weight(
    dualtoken: tuple[Store, StageResult], weights: Path, tiny_run: TinyRun, tmp_path: Path
) -> None:
    store, result = dualtoken
    points = read_table(store.fetch(result.manifest.file("history.parquet"))).to_pylist()
    for name in ("held_out_psnr", "held_out_rfid", "held_out_zero_shot_accuracy.top1", "held_out_semantic_cosine"):
        assert [row["step"] for row in points if row["name"] == name] == [2], name
    silent = [
        override for override in overrides(weights) if "measure_every" not in override and "inception" not in override
    ]
    other = train(tiny_run.store_before("train_tokenizer", tmp_path / "store"), *silent)
    assert other.manifest.file("weights.safetensors") == result.manifest.file("weights.safetensors")


def test_rfid_takes_the_other_distances_place_and_says_how(dualtoken: tuple[Store, StageResult], weights: Path) -> None:
    store, result = dualtoken
    metrics, measured = result.manifest.metrics["reconstruction"], result.manifest.metadata["measured"]
    assert "frechet_teacher" not in metrics
    assert measured["num_images"] == NUM_HELD_OUT and measured["split"] == "test"
    about = measured["settings"]["rfid"]
    assert about["library"].startswith("torch-fidelity 0.") and about["weights"] == sha256_file(weights)
    assert about["image_size"] == 32 and about["format"] == "PNG"
    tokenizer = load_tokenizer(store, result.digest)
    network = InceptionFeatures(torch.load(weights, weights_only=True))
    source = held_out(store, result)
    originals = source.pixels(list(range(NUM_HELD_OUT)))
    with torch.no_grad(), autocast(torch.device("cpu"), result.manifest.config["precision"]):
        drawn = tokenizer(originals.float() / 127.5 - 1).reconstruction
    pixels = ((drawn.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert metrics["rfid"] == pytest.approx(frechet_distance(network(pixels), network(originals)), rel=0.05)


def test_zero_shot_classes_are_the_held_out_concepts(dualtoken: tuple[Store, StageResult], tiny_run: TinyRun) -> None:
    store, result = dualtoken
    concepts = set(held_out(store, result).columns["concept"])
    about = result.manifest.metadata["measured"]["settings"]["zero_shot_accuracy.top1"]
    assert about | {"classes": len(concepts), "templates": "name", "chance": 1 / len(concepts)} == about
    metrics = result.manifest.metrics
    assert 0 <= metrics["zero_shot"]["zero_shot_accuracy.top1"] <= 1
    own = tiny_run.results["train_tokenizer"].manifest.metrics["teacher"]
    assert metrics["teacher"] == own, "the teacher's accuracy has nothing to do with the tokenizer"


def test_inception_weights_count_by_content(
    dualtoken: tuple[Store, StageResult], weights: Path, tmp_path: Path
) -> None:
    store, result = dualtoken
    moved = shutil.copy(weights, tmp_path / "elsewhere.pth")
    again = train(store, *overrides(Path(moved)))
    assert again.hit and again.digest == result.digest


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "inception_weights='.*' does not exist; give the path of torch-fidelity's weights"),
        ("damaged", "inception_weights='.*' is damaged, or no weights: .*; fetch the file again"),
        ("other", "inception_weights='.*': the Inception weights do not fit .*Conv2d_1a_3x3.conv.weight"),
    ],
)
def test_wrong_inception_weights_end_it_before_training(
    tiny_run: TinyRun, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, message: str
) -> None:
    path = tmp_path / "weights.pth"
    if case == "damaged":
        path.write_bytes(weights.read_bytes()[:10_000])
    elif case == "other":
        torch.save({"layer.weight": torch.zeros(2)}, path)
    monkeypatch.setattr(train_tokenizer, "train", lambda *_: pytest.fail("training started"))
    store = tiny_run.store_before("train_tokenizer", tmp_path / "store")
    with pytest.raises(ValueError, match=message):
        train(store, f"tokenizer.inception_weights={path}")


def test_a_pooled_loss_needs_something_to_pool(tiny_run: TinyRun, tmp_path: Path) -> None:
    store = tiny_run.store_before("train_tokenizer", tmp_path / "store")
    with pytest.raises(ValueError, match=r"loss\.pooled_weight=1\.0 needs a kind that predicts.*set it to 0"):
        train(store, "tokenizer.kind=sde", "tokenizer.semantic_branch=false", "tokenizer.loss.pooled_weight=1")


@pytest.mark.parametrize("name", ["inception_weights", "lpips_vgg_weights"])
def test_wrong_paths_end_evaluation_at_once(tiny_run: TinyRun, tmp_path: Path, name: str) -> None:
    recipe = load_recipe("tiny", [f"evaluate.{name}={tmp_path}/nothing.pth"])
    with pytest.raises(ValueError, match=rf"evaluate\.{name}='.*nothing\.pth' does not exist; give the path of"):
        run_stage("evaluate", recipe, tiny_run.store, LocalExecutor())


def test_lpips_has_its_own_name() -> None:
    from models.tokenizers.losses import BackbonePerceptualDistance, LpipsDistance

    lpips, backbone = (object.__new__(kind) for kind in (LpipsDistance, BackbonePerceptualDistance))
    found = [perceptual_of(lpips), perceptual_of(backbone)]
    assert [one.metric for one in found if one is not None] == ["lpips", "perceptual"]
    assert perceptual_of(None) is None


def test_evaluation_measures_rfid_and_zero_shot_over_shards(tiny_run: TinyRun, weights: Path, tmp_path: Path) -> None:
    store = tiny_run.store_before("evaluate", tmp_path / "store")
    given = ["evaluate.max_rows=4", "evaluate.rows_per_shard=3", f"evaluate.inception_weights={weights}"]
    manifest = run_stage("evaluate", load_recipe("tiny", given), store, LocalExecutor()).manifest
    rows: dict[tuple[str, str], dict[str, Any]] = {
        (row["role"], name_of(row)): row for row in read_metrics(store.fetch(manifest.file("metrics.parquet")))
    }
    rfid = rows["ours", "rfid"]
    settings = rfid["settings"]
    assert rfid["num_samples"] == 4 and rfid["value"] > 0
    assert settings["library"].startswith("torch-fidelity") and settings["weights"] == sha256_file(weights)
    assert settings["image_size"] == 32 and settings["crop"] and settings["format"] == "PNG"
    for role, model in (("ours", "sde"), ("ceiling", "teacher")):
        for first in (1, 5):
            row = rows[role, f"zero_shot_accuracy.top{first}"]
            about = row["settings"]
            assert row["model"] == model
            assert row["benchmark"] == "zero_shot" and row["num_samples"] == 4
            assert row["ci_low"] <= row["value"] <= row["ci_high"]
            assert about["chance"] == first / about["classes"] and about["classes"] > 5
    five, one = (rows["ours", f"zero_shot_accuracy.top{first}"]["value"] for first in (5, 1))
    assert five >= one
    table = read_table(store.fetch(manifest.file("reconstructions.parquet")))
    assert not [name for name in table.column_names if "features" in name], "what the distance was made of is left out"


def test_without_inception_weights_the_distance_has_another_name(tiny_run: TinyRun) -> None:
    metrics = tiny_run.results["train_tokenizer"].manifest.metrics["reconstruction"]
    assert "rfid" not in metrics and {"frechet_teacher", "perceptual", "ssim"} <= set(metrics)
    manifest = tiny_run.results["evaluate"].manifest
    rows = read_metrics(tiny_run.store.fetch(manifest.file("metrics.parquet")))
    names = {row["metric"] for row in rows}
    assert "frechet_teacher" in names and "rfid" not in names
    settings = next(row["settings"] for row in rows if row["metric"] == "frechet_teacher")
    assert "tf_efficientnet_lite0" in settings["features"] and "no FID" in settings["rule"]
