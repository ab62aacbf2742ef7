"""Which tests may start a process: those marked `processes`, by themselves or by a fixture that starts one.

`make test-fast` leaves them out. So that it stays fast, every other test fails when it starts a process.
"""

from __future__ import annotations

import multiprocessing.process
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

MARK = "processes"
STARTING_FIXTURES = frozenset(
    {"browser", "job_server", "musevl", "prefect_server", "ray_executor", "s3_endpoint", "start_python", "tiny_run"}
)
"""Fixtures that start a child process (as every download does), a Ray cluster, a Prefect server, a browser or an S3
server."""
STARTERS = (
    (subprocess.Popen, "__init__"),
    (multiprocessing.process.BaseProcess, "start"),
    (os, "fork"),
    (os, "posix_spawn"),
)
"""Every way in which Python, and with it Ray and Prefect, starts a process."""


def mark_processes(item: pytest.Item) -> None:
    """Mark a test that asks for a fixture of those."""
    if STARTING_FIXTURES.intersection(getattr(item, "fixturenames", ())):
        item.add_marker(MARK)


@contextmanager
def no_processes() -> Iterator[None]:
    """Starting a process fails the test, whatever the code under test catches."""

    def refused(*arguments: Any, **named: Any) -> None:
        pytest.fail("this test starts a process, which only tests marked `pytest.mark.processes` may")

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in STARTERS:
            patch.setattr(owner, name, refused)
        yield
