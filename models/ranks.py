"""Sums over the processes of one training run, where there are several (`torch.distributed`)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


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
    return not dist.is_initialized() or dist.get_rank() == 0


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
