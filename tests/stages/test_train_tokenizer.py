"""What training a tokenizer shows while it goes on, and what that must not change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from infra.executors import LocalExecutor
from stages.execution import run_stage
from stages.loading import read_weights
from stages.recipe import load_recipe
from tests.tiny import TinyRun


def test_looking_at_pictures_does_not_change_the_result(tiny_run: TinyRun, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = tmp_path / "events"
    shown = [f"tokenizer.tensorboard={events}", "tokenizer.pictures_every=10"]
    store = tiny_run.store_before("train_tokenizer", tmp_path / "store")
    result = run_stage("train_tokenizer", load_recipe("tiny", shown), store, LocalExecutor())
    assert result.digest == tiny_run.results["train_tokenizer"].digest
    written = EventAccumulator(str(events))
    written.Reload()
    pictures = written.Images("originals and reconstructions")
    assert [picture.step for picture in pictures] == [10, 20, 30]
    assert (pictures[0].width, pictures[0].height) == (8 * 32, 2 * 32)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_averaged_weights_hold_the_codebook_unless_it_is_an_average_itself(
    tiny_run: TinyRun, update: str, tmp_path: Path
) -> None:
    store = tiny_run.store_before("train_tokenizer", tmp_path / "store")

    def weights(decay: float, steps: int) -> dict[str, Tensor]:
        settings = [f"tokenizer.ema_decay={decay}", f"tokenizer.steps={steps}", f"tokenizer.quantizer.update={update}"]
        recipe = load_recipe("tiny", ["tokenizer.kind=vqgan", *settings])
        return read_weights(store, run_stage("train_tokenizer", recipe, store, LocalExecutor()).manifest)

    last, followed = weights(0, 4), weights(1e-7, 4)
    assert all(torch.allclose(followed[name], last[name], atol=1e-6) for name in last)
    one, four = weights(1, 1), weights(1, 4)  # a decay of 1 keeps what there was at the start
    moved = {name for name in one if not torch.equal(one[name], four[name])}
    assert all(name.startswith("quantizer") for name in moved)
    assert any("codebook" in name for name in moved) == (update == "ema")
