"""What all tests share: tests marked `gpu` are skipped where there is no CUDA device."""

import os

import pytest

from tests.helpers.fault_proxy import impatient, proxy, short_waits
from tests.helpers.s3 import s3_endpoint, s3_uri, store_uri
from tests.helpers.tiny import tiny_run

__all__ = ["impatient", "proxy", "s3_endpoint", "s3_uri", "short_waits", "store_uri", "tiny_run"]

# Ray's workers are nicer than others by default, and would starve beside the tests of another process
os.environ.setdefault("RAY_worker_niceness", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if "gpu" in item.keywords]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
