"""Sums over the processes of one training run, where there are several (`torch.distributed`)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_ELEMENTS = 1 << 24
"""Gradients travel together up to this many (64 MiB of float32): few large messages, and little memory for copies."""


def num_ranks() -> int:
    """How many processes train together; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place, and return it; as it is where there is one process.

    A collective: every rank has to come here, with the same shape.
    """
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def take_from_first_rank(values: Tensor) -> Tensor:
    """Overwrite a tensor with that of rank 0 and return it. A collective, as `sum_over_ranks`."""
    if dist.is_initialized():
        dist.broadcast(values, src=0)
    return values


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    return rank() == 0


def gather_objects(own: Any) -> list[Any]:
    """Something picklable of each rank, in rank order, on every rank. A collective; nothing goes through a GPU."""
    found: list[Any] = [own] * num_ranks()
    if dist.is_initialized():
        dist.all_gather_object(found, own, group=_cpu_group())
    return found


@functools.cache
def _cpu_group() -> dist.ProcessGroup | None:
    """All ranks over gloo; None, the default group, where that is gloo's already."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


@torch.no_grad()
def start_equal(*modules: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0: machines may round otherwise when they make them."""
    if not dist.is_initialized():
        return
    for module in modules:
        for own in (*module.parameters(), *module.buffers()):
            own.copy_(take_from_first_rank(own.detach().clone(memory_format=torch.contiguous_format)))


def own_part(num_rows: int) -> slice:
    """This rank's rows of a batch that all ranks share: equal parts, in rank order.

    Raises:
        ValueError: the rows cannot be shared out equally.
    """
    each, left = divmod(num_rows, num_ranks())
    if left:
        raise ValueError(f"{num_rows} rows cannot be shared by {num_ranks()} processes; take a multiple")
    return slice(rank() * each, (rank() + 1) * each)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of a tensor over all ranks, in place; without a gradient. A collective, as `sum_over_ranks`."""
    return sum_over_ranks(values).div_(num_ranks()) if dist.is_initialized() else values


def mean_terms(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scalars by name, each as its mean over all ranks, detached; every rank has to bring the same names."""
    if not dist.is_initialized():
        return dict(terms)
    values = mean_over_ranks(torch.stack([value.detach().float() for value in terms.values()]))
    return dict(zip(terms, values, strict=True))


def gather_rows(values: Tensor) -> Tensor:
    """Rows `[B, ...]` of each rank to those of all, `[ranks * B, ...]` in rank order; gradients flow back to them all.

    Every rank has to have the same number of rows.
    """
    if not dist.is_initialized():
        return values
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(values.contiguous()))


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """Replace each gradient by its mean over all ranks.

    A parameter that no rank used keeps none; one that some ranks did not use counts as zero there, as the rows of those
    ranks would in one process.
    """
    if not dist.is_initialized():
        return
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    used = torch.tensor([parameter.grad is not None for parameter in parameters], device=parameters[0].device)
    trained = [
        parameter
        for parameter, count in zip(parameters, sum_over_ranks(used.long()).tolist(), strict=True)
        if count > 0
    ]
    for bucket in _buckets(trained):
        only = bucket[0].grad
        if len(bucket) == 1 and only is not None and only.is_contiguous():  # large: no copy
            mean_over_ranks(only)
            continue
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in bucket]
        means = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = means.split([gradient.numel() for gradient in gradients])
        for one, part in zip(bucket, parts, strict=True):
            if one.grad is None:
                one.grad = torch.empty_like(one)
            one.grad.copy_(part.view_as(one))


def _buckets(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Runs of parameters of one type on one device, each as large as a bucket may be; a larger one has its own."""
    buckets: list[list[nn.Parameter]] = []
    kind: tuple[torch.dtype, torch.device] | None = None
    room = 0
    for parameter in parameters:
        if (parameter.dtype, parameter.device) != kind or room < parameter.numel():
            buckets.append([])
            kind, room = (parameter.dtype, parameter.device), _BUCKET_ELEMENTS
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets


def rows_of_ranks(num_rows: int, device: torch.device) -> tuple[int, int]:
    """Where this rank's rows stand when those of all ranks follow one another in rank order.

    Args:
        num_rows: of this rank; ranks may have different numbers.
        device: one that the process group can reduce on.

    Returns:
        Position of this rank's first row, and the number of rows of all ranks. A collective.
    """
    if not dist.is_initialized():
        return 0, num_rows
    rank = dist.get_rank()
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=device)
    counts[rank] = num_rows
    dist.all_reduce(counts)
    return int(counts[:rank].sum()), int(counts.sum())
