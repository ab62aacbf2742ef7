"""Search for inputs of a shard that cannot be processed, by bisection, in a child process if they kill a process."""

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
"""If so many different inputs of a batch fail, and none succeeds, the inputs are not treated as the cause."""
_LONGEST_ERROR = 200
_T = TypeVar("_T")


class InputCrashed(RuntimeError):
    """Raised if an input has killed the child process."""


class Unusable(ValueError):
    """Raised if no input of a batch succeeds, or the worker cannot be loaded, so that inputs are not the cause."""


@dataclass(frozen=True)
class Wording:
    """The words of a stage's work in messages."""

    input: str
    """Name of one input, such as `image`."""
    done: str
    """Participle of what is done with it, such as `encoded`."""
    worker: str
    """Name of what processes it, such as `encoder`."""
    remedy: str
    """What to check if every input fails."""
    memory_remedy: str
    """What to change if there is not enough memory."""


@dataclass(frozen=True)
class InputFailure:
    """The reason for which an input has no result."""

    crashed: bool
    """Whether the process that processed it died."""
    error: str
    """The reason, on one line."""


@dataclass(frozen=True)
class Isolated(Generic[_T]):
    """The results and failures of a batch."""

    results: list[_T]
    """Results of the inputs that succeeded, in their order."""
    slots: list[int]
    """Positions of these inputs in the batch."""
    failures: dict[int, InputFailure]
    """Failures of the other inputs by position."""


def isolate(
    work: Callable[[list[int]], Iterable[_T]],
    keys: Sequence[str],
    wording: Wording,
    causes: type[Exception] = Exception,
) -> Isolated[_T]:
    """Process a batch; if that fails, halve it until the inputs that cause the failure are isolated.

    Args:
        work: returns one result for each of some positions of the batch; raises InputCrashed, or another exception, for
            inputs that it cannot process.
        keys: keys of the inputs, at least one.
        wording: words for messages.
        causes: exceptions that an input can cause; others are not caught.

    Raises:
        Unusable: no input of a batch of SYSTEMIC or more succeeds.
        MemoryError: there is not enough memory, for a batch whose size does not depend on its inputs.
        RuntimeError: the device has become unusable in this process (`loses_device`).
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
    """Return whether the process that raised this error can no longer use its GPU.

    After a failed assertion or an illegal access in a kernel, every later call fails with the same error for any input,
    so only another process can find out which input caused it.
    """
    if _out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in str(error)


class Sandbox:
    """An object in a child process, whose methods inputs may crash; it is started on first use and after it died.

    Args:
        factory: picklable; builds the object in the child process.
        wording: words for messages.
    """

    def __init__(self, factory: Callable[[], Any], wording: Wording) -> None:
        self._child = ChildProcess(_Caller(factory, wording.memory_remedy))
        self._wording = wording

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child process; the sandbox can be used again and then starts another one."""
        self._child.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object in the child process and return its result.

        Raises:
            InputCrashed: the child process died during the call.
            Unusable: the child process died before.
            MemoryError: the method raised MemoryError.
            RaisedInChild: the method raised another exception.
        """
        worker = self._wording.worker
        try:
            return self._child(method, *arguments)
        except ChildDied as error:
            logger.warning("the %s's process died: %s", worker, error)
            # The message enters the artifact, so it has no exit code, which may differ from run to run
            raise InputCrashed(f"the {worker}'s process died of this {self._wording.input}") from None
        except ChildCannotStart as error:
            raise Unusable(
                f"the {worker} cannot be loaded to look for a bad {self._wording.input}: {error}; it needs memory for "
                f"a second one: {self._wording.memory_remedy}"
            ) from None


@dataclass(frozen=True)
class _Caller:
    """Builds, in the child process, the function that calls the object's methods."""

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
                    # treated as dead by the parent, so that the next inputs get a working process
                    sys.stderr.write(f"{described(error)}\n")
                    sys.stderr.flush()
                    os._exit(1)
                raise

        return call
