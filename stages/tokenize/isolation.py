"""Images that the encoder cannot take: found by bisection, in a child process where they bring it down."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from stages.runtime.child_process import TRIES, ChildCannotStart, ChildDied, ChildProcess, described
from stages.tokenize.encoding import Batch, Codes, Pixels, Scores

logger = logging.getLogger(__name__)

SYSTEMIC = 4
"""So many different images, and no other in the batch, and the fault is not theirs."""
CRASHED, FAILED = "crashed_encoder", "failed_to_encode"
_LONGEST_ERROR = 200
_T = TypeVar("_T")


class Encodes(Protocol):
    """What a factory makes; see `stages.tokenize.encoding.Encoder`."""

    def encode(self, batch: Batch, slots: list[int]) -> Codes:
        """Codes of the images in these places."""
        ...

    def scores(self, pixels: Pixels, captions: list[str], slots: list[int]) -> Scores:
        """How well the images in these places fit their captions."""
        ...


class EncoderCrashed(RuntimeError):
    """The process that held the encoder died."""


class EncoderUnusable(ValueError):
    """Not one image of a batch can be encoded, or the encoder not even loaded, so the images are not the cause."""


@dataclass(frozen=True)
class Isolated(Generic[_T]):
    """What became of a batch."""

    results: list[_T]
    """Of the images that gave one, in their order."""
    slots: list[int]
    """Their places."""
    failures: dict[int, tuple[str, str]]
    """Status and error of the others, by place."""


def isolate(work: Callable[[list[int]], Iterable[_T]], keys: Sequence[str]) -> Isolated[_T]:
    """Work on a batch; where that fails, halve it until the images that cause it are alone.

    Args:
        work: gives a result for each of some places of the batch; raises EncoderCrashed, or any exception, for images
            that it cannot take.
        keys: of the images, at least one.

    Raises:
        EncoderUnusable: no image of a batch of SYSTEMIC or more can be encoded.
        MemoryError: there is too little of it, for a batch that is of the same size whatever images are in it.
        RuntimeError: the device can no longer be used in this process (`loses_device`).
    """
    failures: dict[int, tuple[str, str]] = {}

    def solve(slots: list[int]) -> list[tuple[int, _T]]:
        for _ in range(TRIES if len(slots) == 1 else 1):
            try:
                return list(zip(slots, work(slots), strict=True))
            except Exception as error:  # recorded below; a bug that hits every image is raised at the end
                if isinstance(error, (EncoderUnusable, MemoryError)) or loses_device(error):
                    raise
                if _out_of_memory(error):
                    raise _memory_error(error) from error
                caught = error
        if len(slots) == 1:
            status = CRASHED if isinstance(caught, EncoderCrashed) else FAILED
            failures[slots[0]] = (status, described(caught)[:_LONGEST_ERROR])
            logger.warning("image %s cannot be encoded: %s", keys[slots[0]], failures[slots[0]][1])
            if len(failures) == len(keys) and len(set(keys)) >= SYSTEMIC:
                raise EncoderUnusable(
                    f"none of {len(keys)} images can be encoded, first {keys[0]}: {failures[0][1]}; check the "
                    "tokenizer, memory and tokenize.batch_size"
                ) from caught
            return []
        middle = len(slots) // 2
        return solve(slots[:middle]) + solve(slots[middle:])

    solved = solve(list(range(len(keys))))
    return Isolated([result for _, result in solved], [slot for slot, _ in solved], failures)


def loses_device(error: Exception) -> bool:
    """Whether the process that saw this error can no longer use its GPU.

    After a failed assertion or an illegal access in a kernel, every later call fails with the same words, whichever
    image it is for: only another process can tell which one it was.
    """
    if _out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in str(error)


def _memory_error(error: Exception) -> MemoryError:
    return MemoryError(f"{error}; lower tokenize.batch_size or tokenize.num_workers")


class Sandbox:
    """An encoder in a child process, started when needed and again after it died.

    Args:
        factory: picklable; makes the encoder in the child.
    """

    def __init__(self, factory: Callable[[], Encodes]) -> None:
        self._child = ChildProcess(_Caller(factory))

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child; the sandbox can be used again and then starts another."""
        self._child.close()

    def encode(self, batch: Batch, slots: list[int]) -> Codes:
        """As the encoder's own.

        Raises:
            EncoderCrashed: the child died of it.
            EncoderUnusable: the child died before.
        """
        codes: Codes = self._call("encode", batch, slots)
        return codes

    def scores(self, pixels: Pixels, captions: list[str], slots: list[int]) -> Scores:
        """As the encoder's own; raises as `encode` does."""
        scores: Scores = self._call("scores", pixels, captions, slots)
        return scores

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return self._child(method, *arguments)
        except ChildDied as error:
            logger.warning("the encoder's process died: %s", error)
            # The exit code is not part of the message, which ends up in the artifact: it may differ from run to run
            raise EncoderCrashed("the encoder's process died of this image") from None
        except ChildCannotStart as error:
            raise EncoderUnusable(
                f"the encoder cannot be loaded to look for a bad image: {error}; it needs memory for a second one: "
                "lower tokenize.num_workers"
            ) from None


@dataclass(frozen=True)
class _Caller:
    """Makes, in the child, the function that calls the encoder's methods."""

    factory: Callable[[], Encodes]

    def __call__(self) -> Callable[..., Any]:
        encoder = self.factory()

        def call(method: str, *arguments: Any) -> Any:
            try:
                return getattr(encoder, method)(*arguments)
            except Exception as error:
                if _out_of_memory(error):
                    raise _memory_error(error) from error
                if loses_device(error):
                    # as good as dead, and seen as such by the parent: the next images get a process that works
                    sys.stderr.write(f"{described(error)}\n")
                    sys.stderr.flush()
                    os._exit(1)
                raise

        return call
