"""A temporary Prefect server for a run, if none is configured: it starts before slow imports and ends with the run.

Prefect would start one by itself, but only at the first call, inside an import that takes seconds. As a separate
process it starts while this process still imports PyTorch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

_START_S = 120.0
"""Seconds until the server must answer; a busy machine needs half a minute."""
_STOP_S = 5.0
_PR_SET_PDEATHSIG = 1  # of Linux' prctl

_ours = False

_COMMAND = ["server", "start", "--no-ui", "--no-scheduler", "--no-late-runs", "--log-level", "ERROR"]


def is_ours() -> bool:
    """Return whether the flows use a temporary server of this process, which need not be told when they are stopped."""
    return _ours


@contextmanager
def prefect_server() -> Iterator[Callable[[], None]]:
    """Run a server on a loopback port in the block, unless PREFECT_API_URL is set (environment or profile).

    Yields:
        A function that waits until the server answers and points Prefect at it. Call it before a flow starts.

    Raises:
        ConnectionError: (by the function) the server ended or did not answer; with the end of what it printed.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value():
        yield lambda: None
        return
    global _ours
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *_COMMAND, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        _ours = True
        try:
            with temporary_settings({PREFECT_API_URL: url}):
                yield lambda: _wait(url, process, printed)
        finally:
            _ours = False
            _deliver()
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _deliver() -> None:
    """Make Prefect send its buffered log lines and events before the server ends."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=_STOP_S)


def _wait(url: str, process: subprocess.Popen[bytes], printed: IO[bytes]) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for a loopback port
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            with opener.open(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.05)
    state = f"ended with exit code {process.returncode}" if process.returncode is not None else "does not answer"
    printed.seek(max(0, printed.seek(0, os.SEEK_END) - 2000))
    raise ConnectionError(
        f"the Prefect server at {url} {state}; start one with `prefect server start` and set PREFECT_API_URL. It "
        f"printed: {printed.read().decode(errors='replace').strip() or 'nothing'}"
    )


def _end_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies, even by SIGKILL."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
