"""The `musevl` command, in this process (`command`) and in one of its own (`musevl`), and a Prefect server."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def prefect_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables of processes that use Prefect, without what this machine's user has set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MUSEVL_", "RAY_"))}
    return kept | {
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "RAY_worker_niceness": "0",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture
def musevl(prefect_environment: dict[str, str], tmp_path: Path) -> Command:
    """Run a Python module (default the `musevl` command) in an empty folder and return how it ended."""

    def run(*arguments: str, module: str = "flows.cli", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=tmp_path,
            env=prefect_environment | environment,
            capture_output=True,
            text=True,
            timeout=1500,
        )

    return run


@dataclass(frozen=True)
class Answer:
    """What a command ended with."""

    code: int
    stdout: str
    stderr: str
    """With the log."""


InProcess = Callable[..., Answer]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    fresh_loggers: None,
    tmp_path: Path,
) -> InProcess:
    """Run the `musevl` command in this process, in an empty folder: for what needs none of its own."""
    from flows import cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Answer:
        caplog.clear()
        capsys.readouterr()
        code = cli.run_command(list(arguments))
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err + caplog.text)

    return run


@pytest.fixture(scope="session")
def prefect_server(prefect_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a Prefect server on a free port of the loopback interface and yield its API's URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    command = ["server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    log_path = tmp_path_factory.mktemp("prefect-server") / "log.txt"
    process = start_prefect(command, prefect_environment, log_path)
    try:
        for _ in range(600):
            if process.poll() is not None:
                break
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    yield url
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise RuntimeError(f"the Prefect server did not start: {log_path.read_text()}")
    finally:
        kill_group(process)


def start_prefect(arguments: list[str], environment: dict[str, str], log_path: Path) -> subprocess.Popen[bytes]:
    """Start `prefect ARGUMENTS` in the project's folder, with its children in a process group of their own."""
    with open(log_path, "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process of `start_prefect` and its children."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
