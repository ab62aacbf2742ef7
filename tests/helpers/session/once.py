"""What is made once for all processes of a test run, however many xdist starts."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first process of this test run to ask fills, while the others wait; nobody changes it later.

    Args:
        factory: pytest's; its base folder is this process's own, and the folder above belongs to the whole run.
        name: of the folder.
        make: fills it, and is called again by the next process where it failed.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, complete = base / f"once-{name}", base / f"once-{name}.complete"
    with open(base / f"once-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            complete.touch()
    return folder
