"""A real S3 server (moto, on loopback) for the whole session, and a fresh bucket for each test that asks."""

import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import s3fs

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
    for _ in range(3000):
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


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.processes)])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URI of an empty store: each test that asks runs on a folder and on S3."""
    if request.param == "s3":
        uri: str = request.getfixturevalue("s3_uri")
        return uri
    return str(tmp_path / "store")
