"""The flow with real Prefect, store and executors; the stages' work is replaced (see stubs.py)."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from infra.executors import ClusterNotStarted, ClusterUnreachable
from infra.worker_errors import WorkerDied
from stages.pipeline.execution import StageResult
from stages.pipeline.recipe import STAGES
from stages.pipeline.recipe_files import RecipeError
from storage.errors import StoreError
from storage.manifest import FileEntry, Manifest
from storage.store import Store
from tests.flows.conftest import Command

STUBS = "tests.flows.stubs"
ALL_FIVE_INPUTS = 5
"""Only `evaluate` has so many."""


def stage_rows(stdout: str) -> list[list[str]]:
    """Stage, result and digest from the printed table."""
    lines = [line.split() for line in stdout.splitlines()]
    return [line[:3] for line in lines if line and line[0] in STAGES]


def test_a_run_makes_everything_once_and_survives_a_network_failure(
    musevl: Command, prefect_server: str, tmp_path: Path
) -> None:
    arguments = ["run", "--recipe", "mini", "--store", "store"]
    failure = {"STUB_FAILURE": f"{ALL_FIVE_INPUTS}:ConnectionError:1", "STUB_COUNTER": str(tmp_path / "tries")}
    first = musevl(*arguments, "--executor", "local", module=STUBS, **failure)  # on a temporary Prefect server
    assert first.returncode == 0, first.stderr
    rows = stage_rows(first.stdout)
    assert [(name, result) for name, result, _ in rows] == [(name, "made") for name in STAGES]
    assert (tmp_path / "tries").read_text() == "2"
    assert "report: .musevl/report/mini/index.html" in first.stdout

    second = musevl(*arguments, "--executor", "ray", module=STUBS, PREFECT_API_URL=prefect_server)
    assert [(name, "made", digest) for name, _, digest in stage_rows(second.stdout)] == [tuple(row) for row in rows]
    assert [result for _, result, _ in stage_rows(second.stdout)] == ["hit"] * len(STAGES)
    assert second.stderr == "", "nothing was mapped, so no Ray cluster may start, and Prefect has nothing to say"

    records = Store(str(tmp_path / "store")).runs()
    assert len({record["run_id"] for record in records}) == 2
    check_what_prefect_shows(prefect_server)


def check_what_prefect_shows(api: str) -> None:
    def query(what: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.post(f"{api}/{what}/filter", json={}).raise_for_status().json()
        return found

    flow_run = max(query("flow_runs"), key=lambda run: run["start_time"] or "")
    tasks = [run for run in query("task_runs") if run["flow_run_id"] == flow_run["id"]]
    assert {task["name"] for task in tasks} == set(STAGES)
    assert {task["state_type"] for task in tasks} == {"COMPLETED"}
    artifacts = {a["key"]: a["data"] for a in query("artifacts") if a["flow_run_id"] == flow_run["id"]}
    from flows.stage_task import artifact_key

    assert set(artifacts) == {artifact_key("mini", name) for name in STAGES}
    assert "| total | 6 |" in artifacts["mini-evaluate"]


def test_a_users_error_ends_the_run_at_once_in_one_line(musevl: Command, prefect_server: str, tmp_path: Path) -> None:
    environment = {"STUB_FAILURE": "2:ValueError:9", "STUB_COUNTER": str(tmp_path / "tries")}
    environment["PREFECT_API_URL"] = prefect_server
    done = musevl("run", "--executor", "local", module=STUBS, **environment)
    assert done.returncode == 2
    assert (tmp_path / "tries").read_text() == "1"
    assert done.stderr.splitlines()[-1] == "musevl: stub failure 1"
    assert all(line.startswith("stage ") for line in done.stderr.splitlines()[:-1]), done.stderr


def chained(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError("reset by peer"), True),
        (TimeoutError(), True),
        (ClusterUnreachable("no cluster"), True),
        (chained(StoreError("cannot read"), ConnectionError()), True),
        (ValueError("bad field"), False),
        (RecipeError("bad field"), False),
        (ClusterNotStarted("after two tries"), False),
        (chained(ValueError("bad field"), ConnectionError()), False),
        (FileNotFoundError("no such file"), False),
        (PermissionError("not yours"), False),
        (chained(WorkerDied("again and again"), ConnectionError()), False),
        (AssertionError("a defect"), False),
    ],
)
def test_only_infrastructure_errors_are_worth_a_retry(error: Exception, expected: bool) -> None:
    from flows.stage_task import is_infrastructure_error

    assert is_infrastructure_error(error) is expected


def test_the_summary_names_digest_result_inputs_and_metrics() -> None:
    from flows.stage_task import summary_markdown

    manifest = Manifest(
        kind="code_table",
        schema_version=1,
        stage="tokenize",
        config={},
        inputs={"download": "ab" * 32},
        files=(FileEntry("codes/0.parquet", 1234, "cd" * 32),),
        metrics={"num_rows": 17, "usage": {"book": 0.123456789}, "curve": [1, 2, 3]},
        metadata={},
    )
    text = summary_markdown(StageResult("tokenize", "key", manifest, True, 0.25))
    for expected in (manifest.digest, "found in the store", "abababababab", "1 (1,234 bytes)", "| num_rows | 17 |"):
        assert expected in text
    assert "| usage.book | 0.123457 |" in text
    assert "curve" not in text


def test_artifact_keys_are_ones_that_prefect_takes() -> None:
    from flows.stage_task import artifact_key

    assert artifact_key("My recipe_2", "train_tokenizer") == "my-recipe-2-train-tokenizer"
