"""The engine of mapped stages: workers make the shards of an action, each finished once its receipt is in the store.

A stage gives it the shards of its plan and a worker that makes one of them. The engine reads the receipts of finished
shards, maps the others over the executor's workers, marks a shard while a worker processes it, and tells the worker if
earlier ones died of the shard, so that it searches for the input that kills them. Receipts are typed, and yielded one
by one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from stages.protocol import StageContext
from stages.runtime.child_process import DEATHS_BEFORE_ISOLATION
from stages.runtime.progress import progress
from storage.manifest import FileEntry
from storage.store import Store

logger = logging.getLogger(__name__)

_EXAMPLES = 3
"""Number of failures that an error message names."""


class _Json:
    """Base of dataclasses that are written to JSON and read back with validation of their fields' types."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON, without those that have their default."""
        values: dict[str, Any] = _adapter(type(self)).dump_python(self, mode="json", exclude_defaults=True)
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read the values that `to_json` returned; raise ValueError if they do not fit this class."""
        found: Self = _adapter(cls).validate_python(values)
        return found


@dataclass(frozen=True)
class Shard(_Json):
    """What a worker needs to know to make a shard; a stage adds fields."""

    shard: str
    """Name of the shard: letters, digits, '.', '_' and '-'."""


@dataclass(frozen=True)
class Receipt(_Json):
    """The record of a finished shard; a stage adds fields."""

    files: tuple[FileEntry, ...]
    """The shard's files, which are in the store."""


@dataclass(frozen=True)
class LeftOut(_Json):
    """An input of a shard without a result."""

    key: str
    status: str
    error: str
    """The reason, on one line."""


S = TypeVar("S", bound=Shard)
S_contra = TypeVar("S_contra", bound=Shard, contravariant=True)
R = TypeVar("R", bound=Receipt)
R_co = TypeVar("R_co", bound=Receipt, covariant=True)


class MakesShards(Protocol[S_contra, R_co]):
    """The interface of a stage's worker."""

    def make(self, shard: S_contra, *, isolated: bool) -> R_co:
        """Store the files of one shard and return its receipt.

        Args:
            shard: shard of the plan.
            isolated: whether workers died of this shard before. Inputs are then to be processed in a child process, and
                an input that kills it is left out (`stages.mapped.isolation`).
        """
        ...


class Finished(NamedTuple, Generic[R]):
    """A finished shard and its receipt."""

    shard: str
    receipt: R


@dataclass(frozen=True)
class Job(Generic[S, R]):
    """Description of how the shards of a stage are made, which is pickled for the workers."""

    make_worker: Callable[[], MakesShards[S, R]]
    """Picklable; called once in each worker process, where it loads what all shards need."""
    shard_class: type[S]
    receipt_class: type[R]
    label: str
    """Label of the progress bar: verb and noun, such as `tokenize shards`."""
    unit: str
    """Unit of the rate, such as `images`."""
    count: Callable[[R], int]
    """Returns the number of units of a receipt."""


def finish_shards(
    context: StageContext[Any],
    shards: Sequence[S],
    job: Job[S, R],
    *,
    num_workers: int,
    num_gpus: float = 0.0,
    prepare: Callable[[list[S]], list[S]] = lambda left: left,
) -> Generator[Finished[R], None, None]:
    """Yield every shard of a plan when it is finished: first those that are finished already, the others in any order.

    Close the generator if it is not exhausted, since its workers run as long as it exists.

    Args:
        context: context of the stage.
        shards: shards of the plan.
        job: describes how they are made.
        num_workers: largest number of workers at a time.
        num_gpus: number of GPUs, or fraction of a GPU, that each worker reserves.
        prepare: called with the remaining shards before any worker starts; returns them with what the plan lacks.

    Raises:
        ValueError: a receipt was written by another version of the stage's code.
    """
    finished: set[str] = set()
    for name, values in context.store.work(context.action_key).receipts([shard.shard for shard in shards]):
        finished.add(name)
        yield Finished(name, _read_receipt(job.receipt_class, values, context.action_key, name))
    left = [shard for shard in shards if shard.shard not in finished]
    if left:
        items = [shard.to_json() for shard in prepare(left)]
        factory = _ShardWorkerFactory(job, context.store, context.action_key)
        mapped = context.executor.map(factory, items, num_workers=num_workers, num_gpus=num_gpus)
        start, counted = time.monotonic(), 0
        with progress(len(left), job.label) as bar:
            for result in mapped:
                receipt = _read_receipt(job.receipt_class, result["receipt"], context.action_key, result["shard"])
                finished.add(result["shard"])
                counted += job.count(receipt)
                rate = counted / max(time.monotonic() - start, 1e-9)
                bar.set_postfix_str(f"{rate:.1f} {job.unit}/s", refresh=False)
                bar.update()
                yield Finished(result["shard"], receipt)
    missing = [shard.shard for shard in shards if shard.shard not in finished]
    assert not missing, f"every shard was mapped, yet {missing} have no receipt"


@dataclass(frozen=True)
class FailureLimit:
    """The largest fraction of a stage's inputs that may fail before the stage stops."""

    field: str
    """Name of the config's field, such as `tokenize.max_failed_fraction`."""
    fraction: float
    total: int
    """Number of inputs of all shards."""
    what: str
    """The inputs and the failure in messages, such as `images could not be tokenized`."""

    def is_passed(self, num_failed: int) -> bool:
        """Return whether so many failures exceed the limit, whatever the remaining inputs give."""
        return num_failed > self.fraction * self.total

    def error(self, num_failed: int, examples: str, remedy: str, *, to_come: int = 0) -> ValueError:
        """Build the error that ends the stage.

        Args:
            num_failed: number of failed inputs.
            examples: which inputs failed, and why.
            remedy: what the user can do.
            to_come: number of inputs whose result is not known yet.
        """
        more = f" with {to_come} still to come" if to_come else ""
        return ValueError(
            f"{num_failed} of {self.total} {self.what}{more}, more than {self.field}={self.fraction} ({examples}); "
            f"{remedy}"
        )


def gather_receipts(
    finished: Generator[Finished[R], None, None],
    limit: FailureLimit,
    failures_of: Callable[[R], Iterable[LeftOut]],
    remedy: str,
) -> dict[str, R]:
    """Wait for every shard of `finish_shards`, unless it is certain that too many inputs fail.

    Args:
        finished: the generator of `finish_shards`, which is closed in any case.
        limit: limit on failures.
        failures_of: returns the failed inputs of a shard.
        remedy: what the user can do about them, for the error.

    Returns:
        Receipts by name of the shard.

    Raises:
        ValueError: too many inputs failed.
    """
    receipts: dict[str, R] = {}
    failures: list[LeftOut] = []
    with closing(finished):
        for shard, receipt in finished:
            receipts[shard] = receipt
            failures += failures_of(receipt)
            if limit.is_passed(len(failures)):
                first = "; ".join(f"{failure.key}: {failure.error}" for failure in failures[:_EXAMPLES])
                raise limit.error(len(failures), f"first: {first}", remedy)
    return receipts


@dataclass(frozen=True)
class _ShardWorkerFactory(Generic[S, R]):
    """Picklable description of a worker; calling it in the worker process builds the worker."""

    job: Job[S, R]
    store: Store
    action_key: str

    def __call__(self) -> _ShardWorker[S, R]:
        return _ShardWorker(self)


class _ShardWorker(Generic[S, R]):
    """Makes shards in a worker process and writes their receipts."""

    def __init__(self, factory: _ShardWorkerFactory[S, R]) -> None:
        self._job = factory.job
        self._work = factory.store.work(factory.action_key)
        self._maker = factory.job.make_worker()

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        shard = self._job.shard_class.from_json(item)
        if (found := self._work.receipt(shard.shard)) is not None:
            # Another run made it, or the previous worker died between writing its receipt and returning it
            return {"shard": shard.shard, "receipt": found}
        with self._work.mark(shard.shard) as deaths:
            isolated = deaths >= DEATHS_BEFORE_ISOLATION
            if isolated:
                logger.warning("%d workers died on shard %s: looking for the input that did it", deaths, shard.shard)
            receipt = self._work.write_receipt(shard.shard, self._maker.make(shard, isolated=isolated).to_json())
        if deaths:
            self._work.forget_marks(shard.shard)
        return {"shard": shard.shard, "receipt": receipt}


def _read_receipt(receipt_class: type[R], values: dict[str, Any], action_key: str, shard: str) -> R:
    try:
        return receipt_class.from_json(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(
            f"the receipt of shard {shard} is of another version of musevl ({problem['msg']}: "
            f"{'.'.join(map(str, problem['loc']))}); remove receipts/{action_key}/ from the store to make the shards "
            "again"
        ) from error


_adapters: dict[type[Any], TypeAdapter[Any]] = {}


def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    if cls not in _adapters:
        _adapters[cls] = TypeAdapter(cls)
    return _adapters[cls]
