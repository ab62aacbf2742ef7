"""A wrong recipe is refused before any server, cluster or store is made, however the work is started."""

from pathlib import Path
from typing import Any

import pytest

from flows.cli import run_command
from flows.comparison import compare_tokenizers
from flows.pipeline import full_pipeline
from stages.pipeline.command import run_standalone
from stages.pipeline.recipe_files import RecipeError

OVERRIDE = "sft.learning_rate=1"
ANSWER = "unknown field 'sft.learning_rate'; did you mean 'sft.optimiser.learning_rate'?"


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: Any, **named: Any) -> None:
        raise AssertionError("something was started")

    for name in (
        "flows.prefect_server.prefect_server",
        "infra.executors.build_executor",
        "flows.stage_task.build_executor",
        "flows.stage_task.Store",
        "storage.store.Store",
        "flows.comparison.full_pipeline",
    ):
        monkeypatch.setattr(name, started)
    monkeypatch.setattr("infra.malloc.reexec_with_fast_malloc", lambda: None)


@pytest.mark.parametrize(
    "command", [["run"], ["stage", "sft"], ["compare-tokenizers", "--kinds", "vqgan"], ["run", "--retry-failed"]]
)
@pytest.mark.parametrize("executor", ["ray", "local"])
def test_commands_refuse_a_wrong_field(
    command: list[str], executor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--recipe", "tiny", "--set", OVERRIDE, "--store", str(tmp_path / "store"), "--executor", executor]
    assert run_command([*command, *given]) == 2
    assert ANSWER in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_stage_module_refuses_a_wrong_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--recipe", "tiny", "--set", OVERRIDE, "--store", str(tmp_path / "store")]
    assert run_standalone("sft", given) == 2
    assert ANSWER in capsys.readouterr().err


def test_a_comparison_refuses_a_wrong_kind_before_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--recipe", "tiny", "--store", str(tmp_path / "store"), "--executor", "local"]
    assert run_command(["compare-tokenizers", "--kinds", "vqgam", *given]) == 2
    assert "did you mean 'vqgan'?" in capsys.readouterr().err


def test_deployed_flows_refuse_a_wrong_field() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'sft\.optimiser\.learning_rate'"):
        full_pipeline.fn(recipe="tiny", overrides=[OVERRIDE])
    with pytest.raises(RecipeError, match=r"did you mean 'sft\.optimiser\.learning_rate'"):
        compare_tokenizers.fn(kinds=["vqgan"], seeds=[0], recipe="tiny", overrides=[OVERRIDE])
    with pytest.raises(RecipeError, match="did you mean 'vqgan'"):
        compare_tokenizers.fn(kinds=["sde", "vqgam"], seeds=[0], recipe="tiny")
