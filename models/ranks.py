"""Collectives over the ranks of one data-parallel training run (`torch.distributed`).

Without a process group every function does what is right for a single process.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_ELEMENTS = 1 << 24
"""Largest number of elements per all-reduce of gradients (64 MiB of float32): few large messages, small copies."""


def num_ranks() -> int:
    """Return the number of ranks that train together, which is 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, which is 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """All-reduce a tensor to its sum over all ranks, in place, and return it; with one process it stays as it is.

    This is a collective: every rank has to call it with a tensor of the same shape.
    """
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def take_from_first_rank(values: Tensor) -> Tensor:
    """Broadcast rank 0's tensor into this one, in place, and return it. A collective, like `sum_over_ranks`."""
    if dist.is_initialized():
        dist.broadcast(values, src=0)
    return values


def is_first_rank() -> bool:
    """Return whether this process is rank 0, or the only process."""
    return rank() == 0


def gather_objects(own: Any) -> list[Any]:
    """Gather one picklable object per rank, in rank order, on every rank. A collective over gloo, never over a GPU."""
    found: list[Any] = [own] * num_ranks()
    if dist.is_initialized():
        dist.all_gather_object(found, own, group=_cpu_group())
    return found


@functools.cache
def _cpu_group() -> dist.ProcessGroup | None:
    """Return a gloo group of all ranks, or None, which means the default group, if that uses gloo already."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


@torch.no_grad()
def start_equal(*modules: nn.Module) -> None:
    """Broadcast the weights and buffers of rank 0, since machines may round differently when they initialise them."""
    if not dist.is_initialized():
        return
    for module in modules:
        for own in (*module.parameters(), *module.buffers()):
            own.copy_(take_from_first_rank(own.detach().clone(memory_format=torch.contiguous_format)))


def own_part(num_rows: int) -> slice:
    """Return this rank's slice of a global batch: equal parts, in rank order.

    Raises:
        ValueError: the number of rows is not a multiple of the number of ranks.
    """
    each, left = divmod(num_rows, num_ranks())
    if left:
        raise ValueError(f"{num_rows} rows cannot be divided equally among {num_ranks()} processes; use a multiple")
    return slice(rank() * each, (rank() + 1) * each)


def mean_over_ranks(values: Tensor) -> Tensor:
    """All-reduce a tensor to its mean over all ranks, in place and without a gradient; see `sum_over_ranks`."""
    return sum_over_ranks(values).div_(num_ranks()) if dist.is_initialized() else values


def mean_terms(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return named scalars as their means over all ranks, detached. A collective: all ranks need the same names."""
    if not dist.is_initialized():
        return dict(terms)
    values = mean_over_ranks(torch.stack([value.detach().float() for value in terms.values()]))
    return dict(zip(terms, values, strict=True))


def gather_rows(values: Tensor) -> Tensor:
    """All-gather rows `[B, ...]` to `[ranks * B, ...]` in rank order; gradients flow back to the rows of every rank.

    A collective: every rank has to have the same number of rows.
    """
    if not dist.is_initialized():
        return values
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(values.contiguous()))


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """All-reduce each gradient to its mean over all ranks.

    A parameter without a gradient on all ranks keeps none. One that only some ranks used counts as zero on the others,
    as the rows of those ranks would in one process.
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
        if len(bucket) == 1 and only is not None and only.is_contiguous():  # a large one is reduced without a copy
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
    """Group successive parameters of one type and device into buckets; one over the limit has a bucket of its own."""
    buckets: list[list[nn.Parameter]] = []
    kind: tuple[torch.dtype, torch.device] | None = None
    space_left = 0
    for parameter in parameters:
        if (parameter.dtype, parameter.device) != kind or space_left < parameter.numel():
            buckets.append([])
            kind, space_left = (parameter.dtype, parameter.device), _BUCKET_ELEMENTS
        buckets[-1].append(parameter)
        space_left -= parameter.numel()
    return buckets


def rows_of_ranks(num_rows: int, device: torch.device) -> tuple[int, int]:
    """Return the position of this rank's rows in the concatenation of all ranks' rows in rank order. A collective.

    Args:
        num_rows: number of rows of this rank; ranks may have different numbers.
        device: a device on which the process group can reduce.

    Returns:
        Position of this rank's first row, and the number of rows of all ranks.
    """
    if not dist.is_initialized():
        return 0, num_rows
    rank = dist.get_rank()
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=device)
    counts[rank] = num_rows
    dist.all_reduce(counts)
    return int(counts[:rank].sum()), int(counts.sum())
