"""Inputs of a shard that cannot be worked on: found by bisection, in a child process where they end a process."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from stages.runtime.child_process import TRIES, ChildCannotStart, ChildDied, ChildProcess, described

logger = logging.getLogger(__name__)

SYSTEMIC = 4
"""If so many different inputs fail, and no other of the batch succeeds, then they are not the cause."""
_LONGEST_ERROR = 200
_T = TypeVar("_T")


class InputCrashed(RuntimeError):
    """The child process died of an input."""


class Unusable(ValueError):
    """Not one input of a batch succeeds, or the worker cannot even be loaded, so the inputs are not the cause."""


@dataclass(frozen=True)
class Wording:
    """How messages name what is done."""

    input: str
    """One of the inputs, such as `image`."""
    done: str
    """What is done with it, such as `encoded`."""
    worker: str
    """What does it, such as `encoder`."""
    remedy: str
    """What to check where every input fails."""
    memory_remedy: str
    """What to change where memory does not suffice."""


@dataclass(frozen=True)
class InputFailure:
    """Why an input has no result."""

    crashed: bool
    """Whether the process that worked on it died."""
    error: str
    """One line."""


@dataclass(frozen=True)
class Isolated(Generic[_T]):
    """What became of a batch."""

    results: list[_T]
    """Of the inputs that gave one, in their order."""
    slots: list[int]
    """Positions in the batch of these inputs."""
    failures: dict[int, InputFailure]
    """The other inputs, by position."""


def isolate(
    work: Callable[[list[int]], Iterable[_T]],
    keys: Sequence[str],
    wording: Wording,
    causes: type[Exception] = Exception,
) -> Isolated[_T]:
    """Work on a batch; where that fails, halve it until the inputs that cause it are alone.

    Args:
        work: gives one result for each of some positions of the batch; raises InputCrashed, or another exception, for
            inputs that it cannot take.
        keys: of the inputs, at least one.
        wording: of messages.
        causes: exceptions that an input can cause; any other is raised.

    Raises:
        Unusable: no input of a batch of SYSTEMIC or more succeeds.
        MemoryError: there is too little of it, for a batch that is of the same size whatever inputs are in it.
        RuntimeError: the device can no longer be used in this process (`loses_device`).
    """
    failures: dict[int, InputFailure] = {}

    def solve(slots: list[int]) -> list[tuple[int, _T]]:
        for _ in range(TRIES if len(slots) == 1 else 1):
            try:
                return list(zip(slots, work(slots), strict=True))
            except causes as error:  # recorded below; a bug that hits every input is raised at the end
                if isinstance(error, (Unusable, MemoryError)) or loses_device(error):
                    raise
                if _out_of_memory(error):
                    raise MemoryError(f"{error}; {wording.memory_remedy}") from error
                caught = error
        if len(slots) == 1:
            failures[slots[0]] = InputFailure(isinstance(caught, InputCrashed), described(caught)[:_LONGEST_ERROR])
            logger.warning("%s %s cannot be %s: %s", wording.input, keys[slots[0]], wording.done, described(caught))
            if len(failures) == len(keys) and len(set(keys)) >= SYSTEMIC:
                raise Unusable(
                    f"none of {len(keys)} {wording.input}s can be {wording.done}, first {keys[0]}: "
                    f"{failures[0].error}; {wording.remedy}"
                ) from caught
            return []
        middle = len(slots) // 2
        return solve(slots[:middle]) + solve(slots[middle:])

    solved = solve(list(range(len(keys))))
    return Isolated([result for _, result in solved], [slot for slot, _ in solved], failures)


def loses_device(error: Exception) -> bool:
    """Whether the process that saw this error can no longer use its GPU.

    After a failed assertion or an illegal access in a kernel, every later call fails with the same words, whichever
    input it is for: only another process can tell which one it was.
    """
    if _out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in str(error)


class Sandbox:
    """An object in a child process, whose methods inputs may bring down; started when needed and again after it died.

    Args:
        factory: picklable; makes the object in the child.
        wording: of messages.
    """

    def __init__(self, factory: Callable[[], Any], wording: Wording) -> None:
        self._child = ChildProcess(_Caller(factory, wording.memory_remedy))
        self._wording = wording

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child; the sandbox can be used again and then starts another."""
        self._child.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """Return what a method of the object in the child returns.

        Raises:
            InputCrashed: the child died of it.
            Unusable: the child died before.
            MemoryError: as in the child.
            RaisedInChild: any other exception there.
        """
        worker = self._wording.worker
        try:
            return self._child(method, *arguments)
        except ChildDied as error:
            logger.warning("the %s's process died: %s", worker, error)
            # The exit code is not part of the message, which ends up in the artifact: it may differ from run to run
            raise InputCrashed(f"the {worker}'s process died of this {self._wording.input}") from None
        except ChildCannotStart as error:
            raise Unusable(
                f"the {worker} cannot be loaded to look for a bad {self._wording.input}: {error}; it needs memory for "
                f"a second one: {self._wording.memory_remedy}"
            ) from None


@dataclass(frozen=True)
class _Caller:
    """Makes, in the child, the function that calls the object's methods."""

    factory: Callable[[], Any]
    memory_remedy: str

    def __call__(self) -> Callable[..., Any]:
        held = self.factory()

        def call(method: str, *arguments: Any) -> Any:
            try:
                return getattr(held, method)(*arguments)
            except Exception as error:
                if _out_of_memory(error):
                    raise MemoryError(f"{error}; {self.memory_remedy}") from error
                if loses_device(error):
                    # as good as dead, and seen as such by the parent: the next inputs get a process that works
                    sys.stderr.write(f"{described(error)}\n")
                    sys.stderr.flush()
                    os._exit(1)
                raise

        return call
