"""A local store and the same store on a real S3 server (`tests/helpers/s3.py`), and child processes."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.manifest import FileEntry, Manifest
from storage.store import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(store_uri: str) -> Store:
    """Return an empty store, on a folder and on S3."""
    return Store(store_uri)


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    """Return an empty store in a folder."""
    return Store(str(tmp_path / "store"))


@pytest.fixture
def manifest_of() -> Callable[..., Manifest]:
    """Return a maker of manifests with given files."""

    def make(*files: FileEntry, **changes: object) -> Manifest:
        fields: dict[str, object] = {
            "kind": "sample",
            "schema_version": 1,
            "stage": "make_sample",
            "config": {"seed": 0},
            "inputs": {},
            "files": tuple(files),
            "metrics": {},
            "metadata": {},
        }
        return Manifest(**(fields | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture
def damage() -> Callable[[Store, str, bytes], None]:
    """Return a function that overwrites an object behind the store's back, or removes it for b''."""

    def overwrite(store: Store, key: str, data: bytes) -> None:
        store.objects.delete(key)
        if data:
            store.objects.put(key, data)

    return overwrite


@pytest.fixture
def start_python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts a Python process on a piece of code, with this project importable."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()
