"""The loop of every training stage: seeded by step, checkpointed, and bit-exact when resumed.

All randomness (the order of the data, augmentation, dropout, restarts of codes) is a function of (seed, step). So a
checkpoint needs no generator state, and a run that is killed and resumed takes the same steps as an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pyarrow as pa
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from models.config import BelowOne, Config, Fraction
from models.ranks import average_gradients, gather_objects, is_first_rank
from stages.protocol import Device, RuntimeInt, RuntimeStr, StageContext
from stages.runtime.devices import PrecisionConfig, resolve_device
from stages.runtime.progress import progress
from stages.runtime.seeds import mix_seed
from storage.manifest import FileEntry
from storage.tables import write_table

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CHECKPOINT = "checkpoint.pt"


class OptimiserConfig(Config):
    """AdamW with a learning-rate schedule of linear warm-up and cosine decay."""

    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate."""
    final_learning_rate_fraction: Fraction = 0.05
    """Learning rate at the last step, as a fraction of the peak."""
    warmup_steps: NonNegativeInt = 100
    """Number of steps of linear warm-up from zero to the peak."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Decay rates of Adam's moving averages."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled weight decay of matrices and kernels; biases, norms and other vectors have none."""
    gradient_clip: PositiveFloat | None = 1.0
    """Largest gradient norm; `null` turns clipping off."""


class LoopConfig(PrecisionConfig):
    """Length of a training stage and what it records."""

    steps: PositiveInt = 1000
    """Number of optimiser steps."""
    batch_size: PositiveInt = 32
    """Number of samples per step, over all workers."""
    optimiser: OptimiserConfig = OptimiserConfig()
    """Optimiser and learning-rate schedule."""
    cpu_threads: PositiveInt = 2
    """Number of threads of PyTorch on the CPU. The last bits of the result depend on it, because sums are split over
    threads. So it is a setting and not the number of cores, and a recipe gives the same result on a larger machine."""
    log_every: PositiveInt = 20
    """Number of steps between points of the loss curves; a point is the mean since the previous one."""
    checkpoint_every: RuntimeInt = 200
    """Number of steps between checkpoints."""
    device: Device = "auto"
    """`auto` (a GPU if there is one), `cpu` or `cuda`."""
    tensorboard: RuntimeStr = ""
    """Folder for TensorBoard events of this stage (loss curves and images); empty writes none."""
    pictures_every: RuntimeInt = 500
    """Number of steps between images in TensorBoard; only tokenizer training has images."""

    def computes_on(self) -> str:
        return resolve_device(self.device).type


class Trainable(Protocol):
    """The interface of what the loop trains."""

    def step(self, step: int) -> dict[str, Tensor]:
        """Take one optimiser step and return its scalar loss terms."""
        ...

    def batch_keys(self, step: int) -> list[str]:
        """Return the keys of the samples of a step, for error messages."""
        ...

    def pictures(self) -> dict[str, Tensor]:
        """Return images for TensorBoard, uint8 `[3, H, W]` by name, without changing any state or random numbers."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the complete state of the training: weights, buffers, optimiser state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned."""
        ...


class History:
    """The points of the loss curves: (step, name, value)."""

    def __init__(self) -> None:
        self.points: list[tuple[int, str, float]] = []

    def add(self, step: int, name: str, value: float) -> None:
        """Add one point."""
        self.points.append((step, name, value))

    def last(self, name: str) -> float:
        """Return the last value of a name."""
        return next(value for _, recorded, value in reversed(self.points) if recorded == name)

    def save(self, context: StageContext[Any]) -> FileEntry:
        """Write `history.parquet` (step, name, value) into the store."""
        steps, names, values = zip(*self.points, strict=True) if self.points else ((), (), ())
        table = pa.table(
            {
                "step": pa.array(steps, pa.int64()),
                "name": pa.array(names, pa.string()),
                "value": pa.array(values, pa.float64()),
            }
        )
        path = context.scratch / "history.parquet"
        write_table(table, path)
        return context.store.put_file(path, "history.parquet")


def train(context: StageContext[Any], trainable: Trainable, config: LoopConfig) -> History:
    """Run the loop from the latest checkpoint, if any, to the last step.

    With several ranks all take the same steps; only rank 0 writes checkpoints and TensorBoard events.

    Raises:
        ValueError: a loss is not finite; the message names the step, the term and the batch's keys.
    """
    history, pending = History(), dict[str, list[float]]()
    done = _restore(context, trainable, history, pending)
    writer = _tensorboard(config.tensorboard, done) if config.tensorboard and is_first_rank() else None
    with progress(config.steps, f"{context.action_key[:6]} training", initial=done) as bar:
        for step in range(done, config.steps):
            torch.manual_seed(mix_seed(context.seed, "step", step))
            for name, value in _finite(trainable.step(step), step, trainable).items():
                pending.setdefault(name, []).append(value)
            bar.update()
            last = step + 1 == config.steps
            if (step + 1) % config.log_every == 0 or last:
                for name, values in pending.items():
                    history.add(step + 1, name, sum(values) / len(values))
                    if writer:
                        writer.add_scalar(name, history.points[-1][2], step + 1)
                bar.set_postfix({name: f"{values[-1]:.3f}" for name, values in list(pending.items())[:3]})
                pending.clear()
            if writer and ((step + 1) % config.pictures_every == 0 or last):
                for name, picture in trainable.pictures().items():
                    writer.add_image(name, picture, step + 1)
            if (step + 1) % config.checkpoint_every == 0 and not last and is_first_rank():
                _save(context, trainable, history, pending, step + 1)
    if writer:
        writer.close()
    return history


def _tensorboard(folder: str, done: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # imported here because it takes half a second

    # discard events that a killed run has written after its checkpoint, since those steps are repeated
    return SummaryWriter(folder, purge_step=done + 1)


class EpochSampler:
    """Sampler of batches: every epoch is a permutation of all samples that depends on (seed, epoch) alone."""

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def batch(self, step: int) -> list[int]:
        """Return the sample indices of batch number `step`; a batch may span two epochs."""
        start = step * self.batch_size
        return [self._at(position) for position in range(start, start + self.batch_size)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_samples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(self.num_samples, generator=generator)
        return int(self._order[offset])


def build_optimiser(
    module: nn.Module, config: OptimiserConfig, fractions: Mapping[str, float] = MappingProxyType({})
) -> torch.optim.AdamW:
    """Build AdamW for the parameters that require gradients, with weight decay for matrices and kernels only.

    Args:
        module: the module to train.
        config: learning rate, weight decay and schedule.
        fractions: fraction of the learning rate by attribute name of submodules at any level; 1 for all others.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            fraction = next((part for inner, part in fractions.items() if inner in name.split(".")), 1.0)
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((fraction, decay), []).append(parameter)
    described = [
        {"params": group, "weight_decay": decay, "fraction": fraction} for (fraction, decay), group in groups.items()
    ]
    return torch.optim.AdamW(described, lr=config.learning_rate, betas=config.betas, fused=True)


def optimise(
    losses: Iterable[Tensor],
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    config: OptimiserConfig,
    step: int,
    steps: int,
) -> Tensor:
    """Take one optimiser step: backward, all-reduce of gradients, clipping, learning-rate schedule, update.

    Args:
        losses: terms of a sum (gradient accumulation); each is back-propagated before the next one is computed, so that
            only one graph is in memory.
        module: the module to train.
        optimiser: its optimiser.
        config: gradient clipping and learning-rate schedule.
        step: number of this step.
        steps: number of steps of the whole training.

    Returns:
        The gradient norm before clipping.
    """
    optimiser.zero_grad(set_to_none=True)
    for loss in losses:
        loss.backward()
    average_gradients(module)
    norm = nn.utils.clip_grad_norm_(module.parameters(), config.gradient_clip or math.inf)
    for group in optimiser.param_groups:
        group["lr"] = config.learning_rate * group["fraction"] * schedule(step, steps, config)
    optimiser.step()
    return norm.detach()


def schedule(step: int, steps: int, config: OptimiserConfig) -> float:
    """Return the learning rate of a step as a fraction of the peak: linear warm-up, then cosine decay."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progressed = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    final = config.final_learning_rate_fraction
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progressed)))


@contextmanager
def thread_count(config: Config) -> Iterator[None]:
    """Set PyTorch's number of threads to that of a training stage's config, and restore it afterwards.

    The result must not depend on what ran in this process before.
    """
    before = torch.get_num_threads()
    try:
        if isinstance(config, LoopConfig):
            torch.set_num_threads(config.cpu_threads)
        yield
    finally:
        torch.set_num_threads(before)


def _finite(terms: dict[str, Tensor], step: int, trainable: Trainable) -> dict[str, float]:
    values = {name: float(value.detach()) for name, value in terms.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            keys = ", ".join(trainable.batch_keys(step)[:8])
            raise ValueError(
                f"training step {step}: {name} is {value} (batch keys: {keys}, ...); lower the learning rate, or use "
                f"precision=fp32 if it only happens in bf16"
            )
    return values


def _save(
    context: StageContext[Any], trainable: Trainable, history: History, pending: dict[str, list[float]], step: int
) -> None:
    folder = context.scratch / f"checkpoint-{step}"
    folder.mkdir()
    state = {"trainable": trainable.state_dict(), "history": history.points, "pending": pending}
    torch.save(state, folder / _CHECKPOINT)
    context.store.work(context.action_key).save_checkpoint(step, folder)
    (folder / _CHECKPOINT).unlink()


def _restore(
    context: StageContext[Any], trainable: Trainable, history: History, pending: dict[str, list[float]]
) -> int:
    folder: Path = context.scratch / "restored"
    folder.mkdir()
    step = context.store.work(context.action_key).load_checkpoint(folder)
    if len(set(gather_objects(step))) > 1:
        raise ValueError(
            f"the workers found different checkpoints in the store {context.store.uri}; all of them have to reach the "
            "same store: a folder that every machine has, or s3://"
        )
    if step is None:
        return 0
    state = torch.load(folder / _CHECKPOINT, weights_only=True, map_location="cpu", mmap=True)
    (folder / _CHECKPOINT).unlink()
    trainable.load_state_dict(state["trainable"])
    history.points = [tuple(point) for point in state["history"]]
    pending.update(state["pending"])
    if is_first_rank():
        logger.info("resuming at step %d", step)
    return step
