"""The loop: what it draws, how it stops, what it leaves behind."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra.executors import LocalExecutor
from stages.protocol import StageContext
from stages.runtime.progress import tracked
from stages.runtime.seeds import mix_seed
from stages.training.loop import EpochSampler, LoopConfig, OptimiserConfig, build_optimiser, optimise, schedule, train
from storage.store import Store

KEY = "a" * 64


class Noisy:
    """A trainable whose steps depend on its weights, its optimiser and the random numbers of each step."""

    def __init__(self, config: LoopConfig, fail_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.config, self.fail_at = config, fail_at
        self.module = nn.Linear(4, 4)
        self.optimiser = build_optimiser(self.module, config.optimiser)

    def step(self, step: int) -> dict[str, Tensor]:
        if step == self.fail_at:
            return {"loss": torch.tensor(float("nan"))}
        loss = (self.module(torch.randn(8, 4)) - torch.randn(8, 4)).square().mean()
        optimise([loss], self.module, self.optimiser, self.config.optimiser, step, self.config.steps)
        return {"loss": loss}

    def batch_keys(self, step: int) -> list[str]:
        return [f"sample-{step}"]

    def pictures(self) -> dict[str, Tensor]:
        return {"weights": torch.full((3, 4, 5), 128, dtype=torch.uint8)}

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimiser.load_state_dict(state["optimiser"])


def context(folder: Path, name: str) -> StageContext[Any]:
    scratch = folder / f"scratch-{name}"
    scratch.mkdir(parents=True)
    return StageContext(LoopConfig(), 0, {}, Store(str(folder / "store")), KEY, LocalExecutor(), scratch)


@pytest.mark.parametrize("stopped_at", [4, 7, 10, 13])
def test_resumed_run_equals_uninterrupted_one(tmp_path: Path, stopped_at: int) -> None:
    config = LoopConfig(steps=20, log_every=3, checkpoint_every=4)
    whole = Noisy(config)
    history = train(context(tmp_path / "whole", "once"), whole, config)

    broken = Noisy(config, fail_at=stopped_at)
    with pytest.raises(ValueError, match=f"step {stopped_at}: loss is nan"):
        train(context(tmp_path / "broken", "first"), broken, config)
    resumed = Noisy(config)
    nn.init.zeros_(resumed.module.weight)  # what it starts from must not matter
    resumed_history = train(context(tmp_path / "broken", "second"), resumed, config)

    assert torch.equal(resumed.module.weight, whole.module.weight)
    assert resumed_history.points == history.points


def test_not_finite_loss_names_step_term_and_samples(tmp_path: Path) -> None:
    config = LoopConfig(steps=5)
    with pytest.raises(ValueError, match=r"training step 2: loss is nan \(batch keys: sample-2"):
        train(context(tmp_path, "nan"), Noisy(config, fail_at=2), config)


def test_every_sample_comes_once_an_epoch_in_an_order_that_only_the_seed_decides() -> None:
    sampler = EpochSampler(10, 4, seed=3)
    drawn = [index for step in range(5) for index in sampler.batch(step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    fresh = EpochSampler(10, 4, seed=3)
    assert fresh.batch(3) == drawn[12:16], "a step's batch does not depend on the steps before it"
    assert EpochSampler(10, 4, seed=4).batch(0) != drawn[:4]


def test_schedule_warms_up_and_ends_at_the_final_fraction() -> None:
    config = OptimiserConfig(warmup_steps=10, final_learning_rate_fraction=0.1)
    values = [schedule(step, 100, config) for step in range(101)]
    assert values[0] == pytest.approx(0.1) and values[9] == pytest.approx(1.0)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values[10:]))
    assert values[100] == pytest.approx(0.1)


def test_only_matrices_decay() -> None:
    groups = build_optimiser(nn.Linear(3, 2), OptimiserConfig(weight_decay=0.5)).param_groups
    assert [(group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in groups] == [
        (0.5, [(2, 3)]),
        (0.0, [(2,)]),
    ]


def test_a_submodule_learns_at_its_part_of_the_rate() -> None:
    module = nn.ModuleDict({"tower": nn.ModuleDict({"layer": nn.Linear(1, 1)}), "head": nn.Linear(1, 1)})
    config = OptimiserConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.0, gradient_clip=100.0)
    optimiser = build_optimiser(module, config, {"tower": 0.01})
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    loss = torch.stack([parameter.sum() for parameter in module.parameters()]).sum()
    optimise([loss], module, optimiser, config, step=0, steps=10)
    after = {name: parameter.detach() for name, parameter in module.named_parameters()}
    moved = {name: float((before[name] - after[name]).abs().sum()) for name in after}
    # Adam's first step is the learning rate, whatever the gradient
    assert moved["head.weight"] == pytest.approx(0.1, rel=1e-3)
    assert moved["tower.layer.weight"] == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize(("clip", "left"), [(1.0, 1.0), (None, 500.0)])
def test_without_a_limit_gradients_stay_as_they_are(clip: float | None, left: float) -> None:
    module = nn.Linear(1, 1, bias=False)
    config = OptimiserConfig(gradient_clip=clip)
    norm = optimise([500 * module.weight.sum()], module, build_optimiser(module, config), config, step=0, steps=10)
    assert float(norm) == pytest.approx(500)
    assert float(module.weight.grad) == pytest.approx(left)


def test_seeds_differ_by_every_part_and_repeat_exactly() -> None:
    assert mix_seed(0, "step", 1) == mix_seed(0, "step", 1)
    assert len({mix_seed(0, "step", 1), mix_seed(0, "step", 2), mix_seed(1, "step", 1), mix_seed(0, "epoch", 1)}) == 4


def test_tensorboard_shows_losses_and_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LoopConfig(steps=6, log_every=2, pictures_every=4, tensorboard=str(tmp_path / "events"))
    train(context(tmp_path, "shown"), Noisy(config), config)
    events = EventAccumulator(config.tensorboard)
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]
    assert [event.step for event in events.Images("weights")] == [4, 6]
    assert (events.Images("weights")[0].width, events.Images("weights")[0].height) == (5, 4)


@pytest.mark.parametrize("stopped_at", [3, 7])
def test_no_point_of_the_curves_appears_twice_after_a_resume(tmp_path: Path, stopped_at: int) -> None:
    """Killed after points that the checkpoint does not have; 3 is before the first checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = tmp_path / "events"
    config = LoopConfig(steps=10, log_every=1, checkpoint_every=5, tensorboard=str(events), pictures_every=1)
    with pytest.raises(ValueError, match=f"step {stopped_at}: loss is nan"):
        train(context(tmp_path, "first"), Noisy(config, fail_at=stopped_at), config)
    train(context(tmp_path, "second"), Noisy(config), config)
    written = EventAccumulator(str(events), size_guidance={"images": 0})  # all of them
    written.Reload()
    assert [point.step for point in written.Scalars("loss")] == list(range(1, 11))
    assert [picture.step for picture in written.Images("weights")] == list(range(1, 11))


def test_what_is_done_before_the_delay_shows_no_bar_and_what_takes_longer_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(tracked(iter("abc"), 3, "short work", delay=30)) == ["a", "b", "c"]
    assert "short work" not in capsys.readouterr().err
    for _ in tracked(iter("abcd"), 4, "long work", delay=0.05):
        time.sleep(0.06)
    assert re.search(r"long work:  (25|50|75)%", capsys.readouterr().err), "it begins when the delay is over"
    for _ in tracked(iter("abcd"), 4, "work"):
        break
    assert "work:   0%" in capsys.readouterr().err, "without a delay it comes at once"
