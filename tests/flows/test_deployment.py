"""`prefect deploy` and `prefect deployment run` against a real server and a real worker of a process pool."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from stages.pipeline.recipe import STAGES
from storage.store import Store
from tests.flows.conftest import ROOT, kill_group, start_prefect
from tests.helpers.tiny import TinyRun


@pytest.fixture(scope="module")
def store_uri(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with a finished run of the recipe `tiny`, and no record of how it came there."""
    folder = tmp_path_factory.mktemp("deployment") / "store"
    shutil.copytree(tiny_run.store.uri, folder)
    shutil.rmtree(folder / "runs")
    return str(folder)


@pytest.fixture(scope="module")
def environment(prefect_environment: dict[str, str], prefect_server: str, store_uri: str) -> dict[str, str]:
    return prefect_environment | {"PREFECT_API_URL": prefect_server, "MUSEVL_STORE": store_uri}


@pytest.fixture(scope="module")
def worker_log(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Deploy what prefect.yaml lists and keep a worker running; yield its log."""
    prefect(environment, "work-pool", "create", "--type", "process", "musevl")
    prefect(environment, "--no-prompt", "deploy", "--all")
    path = tmp_path_factory.mktemp("worker") / "log.txt"
    worker = start_prefect(["worker", "start", "--pool", "musevl"], environment, path)
    yield path
    kill_group(worker)


def prefect(environment: dict[str, str], *arguments: str, succeeds: bool = True) -> str:
    command = [sys.executable, "-m", "prefect", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == succeeds, output
    return output


def query(api: str, what: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = httpx.post(f"{api}/{what}/filter", json={}).raise_for_status().json()
    return found


def test_deployments_hold_no_path_of_this_machine(worker_log: Path, prefect_server: str) -> None:
    deployments = query(prefect_server, "deployments")
    assert {"mini", "tiny"} <= {deployment["name"] for deployment in deployments}
    for deployment in deployments:
        used = {name: deployment[name] for name in ("path", "entrypoint", "pull_steps", "job_variables", "parameters")}
        assert str(ROOT) not in json.dumps(used)


def test_the_run_form_knows_the_parameters(worker_log: Path, prefect_server: str) -> None:
    for deployment in query(prefect_server, "deployments"):
        schema = deployment["parameter_openapi_schema"]
        assert isinstance(schema, dict)
        compared = {"kinds", "seeds"} if str(deployment["entrypoint"]).endswith(":compare_tokenizers") else set()
        assert set(schema["properties"]) == {"recipe", "store", "overrides", "executor"} | compared
        assert schema["properties"]["executor"]["enum"] == ["ray", "local"]


def test_a_deployed_run_with_an_unknown_recipe_fails_and_says_so(
    worker_log: Path, environment: dict[str, str], prefect_server: str
) -> None:
    prefect(environment, "deployment", "run", "full-pipeline/mini", "--watch", "-p", "recipe=nosuch", succeeds=False)
    states = [run["state"] for run in query(prefect_server, "flow_runs")]
    messages = [state["message"] for state in states if isinstance(state, dict) and state["type"] == "FAILED"]
    assert any("unknown recipe 'nosuch'" in str(message) for message in messages), worker_log.read_text()[-4000:]


def test_a_deployed_run_goes_through_the_whole_pipeline_in_the_workers_store(
    worker_log: Path, environment: dict[str, str], prefect_server: str, store_uri: str
) -> None:
    output = prefect(environment, "deployment", "run", "full-pipeline/tiny", "--watch")
    assert "Completed" in output, worker_log.read_text()[-4000:]
    assert {record["stage"]: record["hit"] for record in Store(store_uri).runs()} == dict.fromkeys(STAGES, True)
    published = {artifact["key"] for artifact in query(prefect_server, "artifacts") if artifact["type"] == "markdown"}
    assert published >= {f"tiny-{name.replace('_', '-')}" for name in STAGES}
