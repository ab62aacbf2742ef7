"""What all tests share. `make test-fast`, `make test` and `make test-all` are three selections of them.

Fixtures of a whole test run, each made when a test first asks for it:

- `tiny_run` (tests/helpers/tiny.py): a finished run of the recipe `tiny`, made once for all processes; with
  `store_before` a test gets a store that holds the artifacts of the stages before one.
- `s3_endpoint` (tests/helpers/s3.py): a real S3 server on loopback; a test asks for `s3_uri`, a bucket of its own, or
  for `store_uri`, and then runs on a folder and on S3. `proxy` (tests/helpers/fault_proxy.py) spoils requests to it.
- `prefect_server`, `musevl` and `command` (tests/flows/conftest.py): a Prefect server, and the command line in a
  process of its own and in this one.
- `light_run` (tests/helpers/light.py) is no fixture but a function: a store in which `tokenize` can start at once.

Marks:

- `processes`: the test starts a process (a child, Ray, Prefect, a browser, an S3 server). Tests that ask for a fixture
  that does are marked by themselves; any other test fails when it starts one (tests/helpers/session/processes.py).
- `slow`: it takes more than about ten seconds.
- `exhaustive`: a case of a full matrix of kills and crashes, which only `make test-all` runs (`--exhaustive`).
- `gpu`: it needs a CUDA device.
"""

import contextlib
import os
from collections.abc import Generator
from typing import Any

import pytest

from tests.helpers.fault_proxy import impatient, proxy, short_waits
from tests.helpers.loggers import fresh_loggers
from tests.helpers.s3 import s3_endpoint, s3_uri, store_uri
from tests.helpers.session.order import ByFile, slowest_first
from tests.helpers.session.processes import MARK, mark_processes, no_processes
from tests.helpers.tiny import tiny_run

__all__ = ["fresh_loggers", "impatient", "proxy", "s3_endpoint", "s3_uri", "short_waits", "store_uri", "tiny_run"]

# Ray's workers are nicer than others by default, and would starve beside the tests of another process
os.environ.setdefault("RAY_worker_niceness", "0")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="also the full matrices of kills and crashes")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by what is marked here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        mark_processes(item)
        if "exhaustive" in item.keywords and not config.getoption("--exhaustive"):
            item.add_marker(pytest.mark.skip(reason="only in `make test-all` (--exhaustive)"))
        if "gpu" in item.keywords and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    slowest_first(items)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors are tiny here: more threads only wait for one another, longest beside the tests of another process."""
    import torch

    torch.set_num_threads(1)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    allowed = item.get_closest_marker(MARK) is not None
    with contextlib.nullcontext() if allowed else no_processes():
        return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return ByFile(config, log) if config.getoption("dist") == "loadfile" else None
