"""What training a tokenizer shows while it goes on, and what that must not change."""

from __future__ import annotations

from pathlib import Path

from infra.executors import LocalExecutor
from stages.execution import run_stage
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
