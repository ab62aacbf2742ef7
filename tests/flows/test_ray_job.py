"""`ray start` and `ray job submit` with a token: a stage runs on the cluster of its job."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.flows.conftest import ROOT
from tests.helpers.tiny import TinyRun

RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A fresh token, an empty home folder and this Python first on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MUSEVL_"))}
    return kept | {
        "HOME": str(tmp_path_factory.mktemp("home")),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


@pytest.fixture(scope="module")
def job_server(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray head node in the foreground of a process group that is ended as a whole; yields its job server's URL."""
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(4)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        gcs, dashboard, client, agent = (str(probe.getsockname()[1]) for probe in sockets)
    folder = tempfile.mkdtemp(prefix="ray-")  # short: it holds Unix sockets
    command = [RAY, "start", "--head", "--block", "--num-cpus", "2", "--disable-usage-stats", "--temp-dir", folder]
    command += ["--port", gcs, "--dashboard-port", dashboard, "--ray-client-server-port", client]
    command += ["--dashboard-agent-listen-port", agent]
    log_path = tmp_path_factory.mktemp("ray") / "log.txt"
    with open(log_path, "wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{dashboard}", head, log_path)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        head.terminate()  # it ends its children
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(url: str, head: subprocess.Popen[bytes], log_path: Path) -> None:
    for _ in range(1500):
        if head.poll() is not None:
            break
        try:
            httpx.get(url)
        except httpx.TransportError:
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"the Ray head did not start: {log_path.read_text()}")


def submit(job_server: str, environment: dict[str, str], *command: str) -> tuple[int, str]:
    arguments = [RAY, "job", "submit", "--address", job_server, "--working-dir", ".", "--", *command]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_submitted_stage_maps_on_the_jobs_cluster(
    job_server: str, environment: dict[str, str], tiny_run: TinyRun, tmp_path: Path
) -> None:
    store = tiny_run.store_before("tokenize", tmp_path / "store")
    command = ["python", "-m", "stages.tokenize", "--recipe", "tiny", "--store", store.uri]
    code, output = submit(job_server, environment, *command)
    assert code == 0, output
    assert "connected to the Ray cluster" in output
    assert "started a local Ray cluster" not in output
    (record,) = store.runs()
    assert (record["stage"], record["recipe"], record["hit"]) == ("tokenize", "tiny", False)
    assert record["artifact"] == tiny_run.results["tokenize"].digest


@pytest.mark.slow
def test_a_submitted_stage_with_bad_input_fails_in_one_line(job_server: str, environment: dict[str, str]) -> None:
    code, output = submit(job_server, environment, "python", "-m", "stages.download", "--recipe", "nosuch")
    assert code != 0
    assert "musevl: unknown recipe 'nosuch'" in output
    assert "Traceback" not in output
