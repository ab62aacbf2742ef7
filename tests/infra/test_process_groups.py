"""One function in several processes: what each sees, whose result counts, and what a death or an exception does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from infra import process_groups
from infra.executors import Executor, LocalExecutor
from infra.worker_errors import WorkerDied
from models.ranks import average_gradients, gather_objects, mean_terms, own_part
from models.tokenizers.losses import contrastive_loss


class Troubled:
    """Its second process dies in the first round; in the second round it raises what a bad sample would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> None:
        rounds = len(gather_objects(sorted(self.folder.glob("round-*")))[0])
        if dist.get_rank() == 1:
            (self.folder / f"round-{rounds}").touch()
            if rounds == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("sample 000000007")
        dist.barrier()


def check_death_and_exception(executor: Executor, folder: Path) -> None:
    with pytest.raises(KeyError, match="sample 000000007") as caught:
        executor.run_together(Troubled(folder), num_processes=2)
    assert len(list(folder.iterdir())) == 2, "one round before the death, one after it, none after the exception"
    assert "in the worker:" in caught.value.__notes__[0]


@pytest.mark.processes
def test_a_death_starts_all_again_and_an_exception_is_raised_as_itself(tmp_path: Path) -> None:
    check_death_and_exception(LocalExecutor(), tmp_path)


@pytest.mark.processes
def test_process_zero_answers_and_sums_reach_all() -> None:
    assert LocalExecutor().run_together(_ranks, num_processes=3) == [3.0, [0, 1, 2]]


def _ranks() -> list[object]:
    total = torch.ones(())
    dist.all_reduce(total)
    return [float(total), gather_objects(dist.get_rank())]


@pytest.mark.processes
def test_deaths_without_end_are_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_groups, "RESTARTS", 1)
    with pytest.raises(WorkerDied, match="died of SIGKILL, after 1 restarts.*more memory.*last checkpoint"):
        LocalExecutor().run_together(_die, num_processes=2)


@pytest.mark.processes
def test_what_looks_like_a_lost_peer_but_is_a_defect_is_raised_at_once(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        LocalExecutor().run_together(_fail, num_processes=2)
    assert not [record for record in caplog.records if record.name == "infra.process_groups"]


def _fail() -> None:
    raise RuntimeError("shapes do not fit")


@pytest.mark.processes
def test_an_interrupt_ends_a_worker_even_inside_a_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_groups, "RESTARTS", 0)
    with pytest.raises(WorkerDied, match="died of SIGINT"):
        LocalExecutor().run_together(_wait_for_an_interrupt, num_processes=2)


def _wait_for_an_interrupt() -> None:
    first, _ = gather_objects(os.getpid())
    if dist.get_rank() == 0:
        dist.barrier()  # the other one never comes
    time.sleep(0.5)  # until the first one waits
    os.kill(first, signal.SIGINT)
    time.sleep(60)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_gpus_that_are_not_there_are_an_error() -> None:
    if torch.cuda.device_count() >= 64:
        pytest.skip("this machine has them")
    with pytest.raises(ValueError, match=r"64 processes.*num_processes"):
        LocalExecutor().run_together(_ranks, num_processes=64, num_gpus=1)


class Net(nn.Module):
    """Two layers, one of which only some rows use, and one that none uses."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Linear(4, 3)
        self.some = nn.Linear(4, 3)
        self.none = nn.Linear(4, 3)


def gradients_of(module: Net, images: Tensor, texts: Tensor) -> dict[str, Tensor | None]:
    """Contrastive over all rows, and a mean that only rows above a mark enter."""
    loss = contrastive_loss(F.normalize(module.all(images), dim=1), texts, torch.zeros(()))
    chosen = images[images[:, 0] > 0]
    if len(chosen):
        loss = loss + module.some(chosen).square().sum() / len(images)
    loss.backward()
    average_gradients(module)
    terms = mean_terms({"loss": loss})
    return {name: parameter.grad for name, parameter in module.named_parameters()} | {"loss": terms["loss"].detach()}


def _batch() -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    images, texts = torch.randn(8, 4), F.normalize(torch.randn(8, 3), dim=1)
    images[:4, 0] = -1  # the rows of the first process do not use `some`
    return Net(), images, texts


def _shared_gradients() -> dict[str, Tensor | None]:
    module, images, texts = _batch()
    own = own_part(len(images))
    return gradients_of(module, images[own], texts[own])


@pytest.mark.processes
def test_gradients_of_two_processes_are_those_of_one_with_the_whole_batch() -> None:
    expected = gradients_of(*_batch())
    found = LocalExecutor().run_together(_shared_gradients, num_processes=2)
    assert {name for name, gradient in found.items() if gradient is None} == {"none.weight", "none.bias"}
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient)


def test_a_batch_that_cannot_be_shared_equally_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.ranks.num_ranks", lambda: 3)
    with pytest.raises(ValueError, match="8 rows cannot be divided equally among 3 processes"):
        own_part(8)
