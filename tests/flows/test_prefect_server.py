"""The Prefect server of a run: it serves flows, and ends with the run, however that ends."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from tests.flows.conftest import ROOT

pytestmark = pytest.mark.processes

_FLOW = """
import logging, os, sys, time
from flows.prefect_server import prefect_server
from prefect import flow
from prefect.settings import PREFECT_API_URL

@flow
def adds(a: int, b: int) -> int:
    return a + b

@flow
def fails() -> None:
    logging.getLogger("stages.trial").warning("the last words")
    raise ValueError("no")

with prefect_server() as wait:
    wait()
    print(PREFECT_API_URL.value(), adds(1, 2), flush=True)
    if sys.argv[1:] == ["stay"]:
        time.sleep(600)
    fails()
"""


def _address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").removesuffix("/api").partition(":")
    return host, int(port)


def _is_open(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


def test_a_flow_runs_on_the_runs_own_server_which_ends_with_it_once_all_that_was_logged_has_arrived(
    prefect_environment: dict[str, str],
) -> None:
    environment = prefect_environment | {"PREFECT_LOGGING_EXTRA_LOGGERS": "stages"}
    run = subprocess.run(
        [sys.executable, "-c", _FLOW, "fail"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    url, result = run.stdout.split()
    assert (run.returncode, result) == (1, "3")
    assert run.stderr.strip().endswith("ValueError: no"), "nothing is said after the error"
    assert _address(url)[0] == "127.0.0.1"
    assert not _is_open(_address(url))


def test_a_killed_run_leaves_no_server(prefect_environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _FLOW, "stay"], cwd=ROOT, env=prefect_environment, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        address = _address(run.stdout.readline().split()[0])
        assert _is_open(address)
        run.kill()
    until = time.monotonic() + 500
    while _is_open(address) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _is_open(address)


def test_a_configured_server_is_used_and_prefects_signal_handling_kept(prefect_environment: dict[str, str]) -> None:
    script = """
import signal, subprocess
from flows.prefect_server import prefect_server
from prefect.settings import PREFECT_API_URL
def never(*arguments, **named): raise AssertionError("a server is configured; none is to be started")
subprocess.Popen = never
before = signal.getsignal(signal.SIGINT)
with prefect_server() as wait:
    wait()
    assert PREFECT_API_URL.value() == "http://127.0.0.1:9/api"
assert signal.getsignal(signal.SIGINT) is before
"""
    environment = prefect_environment | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)


def test_a_server_that_cannot_start_says_why(prefect_environment: dict[str, str]) -> None:
    environment = prefect_environment | {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////proc/no/such/folder.db"
    }
    run = subprocess.run(
        [sys.executable, "-c", _FLOW], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "ConnectionError: the Prefect server at http://127.0.0.1:" in run.stderr
    assert "unable to open database file" in run.stderr
