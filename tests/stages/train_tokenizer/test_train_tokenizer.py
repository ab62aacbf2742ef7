"""How a tokenizer is trained: its losses, its crops, and what is shown while it goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra.executors import LocalExecutor
from models.tokenizers.image_tokenizer import TokenizerOutput
from models.tokenizers.losses import LossConfig
from models.transforms import CropConfig
from stages.artifacts.models import read_weights
from stages.pipeline.execution import run_stage
from stages.pipeline.recipe import STAGES, load_recipe
from stages.train_tokenizer.stage import TRAINING, TokenizerTraining
from stages.training.loop import OptimiserConfig, build_optimiser
from tests.helpers.tiny import TinyRun


def test_looking_at_pictures_does_not_change_the_result(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = tmp_path / "events"
    shown = [f"tokenizer.tensorboard={events}", "tokenizer.pictures_every=4"]
    store = tiny_run.store_before("train_tokenizer", tmp_path / "store")
    result = run_stage("train_tokenizer", load_recipe("tiny", shown), store, LocalExecutor())
    assert result.digest == tiny_run.results["train_tokenizer"].digest
    said = capsys.readouterr().err
    for phase in ("training", "teacher's features of training images", "held-out images, batches"):
        assert f"{phase}:   0%" in said and f"{phase}: 100%" in said, "each long phase says how far it is"
    written = EventAccumulator(str(events))
    written.Reload()
    pictures = written.Images("originals and reconstructions")
    assert [picture.step for picture in pictures] == [4, 8, 12]
    assert (pictures[0].width, pictures[0].height) == (8 * 32, 2 * 32)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_averaged_weights_hold_the_codebook_unless_it_is_an_average_itself(
    tiny_run: TinyRun, update: str, tmp_path: Path
) -> None:
    store = tiny_run.store_before("train_tokenizer", tmp_path / "store")

    def weights(decay: float, steps: int) -> dict[str, Tensor]:
        settings = [f"tokenizer.ema_decay={decay}", f"tokenizer.steps={steps}", f"tokenizer.quantizer.update={update}"]
        alone = [
            "tokenizer.kind=vqgan",
            "tokenizer.loss.perceptual=none",
        ]
        recipe = load_recipe("tiny", [*alone, *settings])
        return read_weights(store, run_stage("train_tokenizer", recipe, store, LocalExecutor()).manifest)

    last, followed = weights(0, 4), weights(1e-7, 4)
    assert all(torch.allclose(followed[name], last[name], atol=1e-6) for name in last)
    one, four = weights(1, 1), weights(1, 4)  # a decay of 1 keeps what there was at the start
    moved = {name for name in one if not torch.equal(one[name], four[name])}
    assert all(name.startswith("quantizer") for name in moved)
    assert any("codebook" in name for name in moved) == (update == "ema")


@pytest.mark.parametrize(("l2_weight_in_ratio", "expected"), [(None, 1.45), (1.0, 0.31)])
def test_the_adaptive_weight_may_leave_out_the_weight_of_the_squared_error(
    l2_weight_in_ratio: float | None, expected: float
) -> None:
    """A decoder of one number, whose gradient is 0.285 by the squared error, 0.025 by LPIPS and 1 by the GAN term."""
    last_layer = nn.Parameter(torch.ones(()))
    pixel = (0.285 / 2) ** 0.5
    drawn = last_layer * torch.full((2, 3, 4, 4), pixel)
    loss = LossConfig(
        l2_weight=5.0,
        adversarial_weight=0.75,
        adversarial_adaptive=True,
        adversarial_l2_weight=l2_weight_in_ratio,
        adversarial_start=0,
    )
    training: Any = SimpleNamespace(
        config=TRAINING["vqgan"](loss=loss),
        perceptual=lambda images, references: 0.025 * images.mean((1, 2, 3)) / pixel,
        discriminator=lambda images: -images / pixel,
        tokenizer=SimpleNamespace(decoder=SimpleNamespace(last_layer=last_layer)),
        _adversarial=lambda step: True,
    )
    output = TokenizerOutput(drawn, torch.zeros(()), torch.zeros(()), None, None)
    total, terms = TokenizerTraining._generator_loss(training, output, torch.zeros_like(drawn), [0, 1], 0)
    weight = (total - 5 * terms["l2"] - terms["perceptual"]) / (0.75 * terms["adversarial"])
    assert float(weight.detach()) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("schedule", "rate"), [("training", 0.5), ("own", 0.1)])
def test_the_discriminator_may_warm_up_when_it_starts(schedule: str, rate: float) -> None:
    optimiser = OptimiserConfig(learning_rate=1.0, warmup_steps=10, final_learning_rate_fraction=0.0)
    loss = LossConfig(adversarial_start=60, discriminator_schedule=schedule)
    config = TRAINING["vqgan"](loss=loss, discriminator_optimiser=optimiser, steps=110, precision="fp32")
    discriminator = nn.Conv2d(3, 1, 1)
    training: Any = SimpleNamespace(
        config=config,
        device=torch.device("cpu"),
        discriminator=discriminator,
        discriminator_optimiser=build_optimiser(discriminator, optimiser),
    )
    images = torch.rand(1, 3, 4, 4)
    TokenizerTraining._train_discriminator(training, images, images, 60)
    assert training.discriminator_optimiser.param_groups[0]["lr"] == pytest.approx(rate)


def test_crops_depend_on_seed_step_and_place_alone() -> None:
    config = TRAINING["vqgan"](random_crop=CropConfig(kind="square"), batch_size=3)
    training: Any = SimpleNamespace(config=config, seed=7)
    first, again, later = (TokenizerTraining._own_crops(training, step) for step in (0, 0, 1))
    assert first == again
    assert len({crop.seed for crop in first + later}) == 6


def test_dualtokens_released_settings_train(tiny_run: TinyRun, tmp_path: Path) -> None:
    settings = {
        "steps": 2,
        "batch_size": 4,
        "kind": "dualtoken",
        "random_crop": "{kind: area, smallest: 0.9}",
        "horizontal_flip": "false",
        "optimiser.gradient_clip": "null",
        "loss.adversarial_adaptive": "true",
        "loss.adversarial_l2_weight": 1,
        "loss.adversarial_start": 1,
        "loss.discriminator": "residual",
        "loss.discriminator_schedule": "own",
        "loss.hinge_slope": 0.01,
        "residual.dead_threshold": 1.0,
    }
    store = tiny_run.store_before("train_tokenizer", tmp_path / "store")
    recipe = load_recipe("tiny", [f"tokenizer.{name}={value}" for name, value in settings.items()])
    weights = read_weights(store, run_stage("train_tokenizer", recipe, store, LocalExecutor()).manifest)
    assert all(bool(value.isfinite().all()) for value in weights.values() if value.is_floating_point())


@pytest.mark.parametrize(
    ("recipe", "overrides", "needed"),
    [
        ("paper-vqgan-256", [], False),
        ("paper-sde-256", [], True),
        ("paper-vila_u-256", [], True),
        ("mini", [], True),
        ("mini", ["tokenizer.kind=vqgan"], True),  # its perceptual distance looks through the teacher's backbone
        ("mini", ["tokenizer.kind=vqgan", "tokenizer.loss.perceptual_weight=0"], False),
        ("mini", ["tokenizer.kind=external", "tokenizer.codes=folder"], False),
    ],
)
def test_a_teacher_is_an_input_where_it_is_used_and_nowhere_else(
    recipe: str, overrides: list[str], needed: bool
) -> None:
    loaded = load_recipe(recipe, overrides)
    assert STAGES["train_tokenizer"].feeders(loaded.tokenizer) == ("download", "prepare_teacher")[: 1 + needed]
    assert STAGES["tokenize"].feeders(loaded.tokenize) == ("download", "train_tokenizer")
    scoring = load_recipe(recipe, [*overrides, "tokenize.min_caption_match=0.2"])
    assert "prepare_teacher" in STAGES["tokenize"].feeders(scoring.tokenize)
    assert "prepare_teacher" in STAGES["evaluate"].feeders(loaded.evaluate), "it judges drawings"


def test_a_kind_without_a_teacher_is_trained_and_used_without_one(tiny_run: TinyRun, tmp_path: Path) -> None:
    store = tiny_run.store_before("prepare_teacher", tmp_path / "store")
    overrides = ["tokenizer.kind=vqgan", "tokenizer.loss.perceptual=none", "tokenizer.steps=2"]
    recipe = load_recipe("tiny", overrides)
    trained = run_stage("train_tokenizer", recipe, store, LocalExecutor()).manifest
    assert set(trained.inputs) == {"download"}
    assert trained.metrics["reconstruction"]["psnr"] > 0
    assert set(trained.metrics) == {"reconstruction"} and "frechet_teacher" not in trained.metrics["reconstruction"]
    assert run_stage("tokenize", recipe, store, LocalExecutor()).manifest.metrics["num_rows"] > 0
