"""A local store and the same store on a real S3 server (moto, on loopback), and child processes."""

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import s3fs

from storage.manifest import FileEntry, Manifest
from storage.store import Store

ROOT = Path(__file__).parents[2]
_AWS_VARIABLES = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start moto's server and yield its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log_path = tmp_path_factory.mktemp("moto") / "log.txt"
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with open(log_path, "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_for(port, server, log_path)
        # Instances remember the endpoint of the environment that they were made in.
        s3fs.S3FileSystem.clear_instance_cache()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes], log_path: Path) -> None:
    for _ in range(300):
        if server.poll() is not None:
            break
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    server.kill()
    raise RuntimeError(f"moto_server did not start: {log_path.read_text()}")


@pytest.fixture
def s3_uri(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Make a fresh bucket, reachable through the environment alone, and return a URI in it."""
    for name, value in _AWS_VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("MUSEVL_CACHE", str(tmp_path / "cache"))
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}/some/store"


@pytest.fixture(params=["local", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URI of an empty store: each test that asks runs on a folder and on S3."""
    if request.param == "s3":
        uri: str = request.getfixturevalue("s3_uri")
        return uri
    return str(tmp_path / "store")


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
