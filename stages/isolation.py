"""Images that the encoder cannot take: found by bisection, in a child process where they bring it down.

python -m stages.isolation < pickled factory and batches > pickled codes
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, Protocol

import numpy as np
import torch

from stages.encoding import Batch, Codes

logger = logging.getLogger(__name__)

TRIES = 2
"""How often an image is encoded alone before it is taken for the cause; what struck once may have been chance."""
SYSTEMIC = 4
"""So many different images, and no other in the batch, and the fault is not theirs."""
_PATIENCE_S = 10
"""Seconds that a child has to end by itself."""
CRASHED, FAILED = "crashed_encoder", "failed_to_encode"

Encode = Callable[[Batch, list[int]], Codes]


class Encodes(Protocol):
    """What a factory makes."""

    def encode(self, batch: Batch, slots: list[int]) -> Codes:
        """Codes of the images in these places."""
        ...


class EncoderCrashed(RuntimeError):
    """The process that held the encoder died."""


class EncoderUnusable(ValueError):
    """Not one image of a batch can be encoded, or the encoder not even loaded, so the images are not the cause."""


@dataclass(frozen=True)
class Isolated:
    """What became of a batch."""

    codes: Codes
    """Of the images that could be encoded, in their order: `[len(slots), N, D, h, w]`."""
    slots: list[int]
    """Their places."""
    failures: dict[int, tuple[str, str]]
    """Status and error of the others, by place."""


def encode_or_isolate(encode: Encode, batch: Batch) -> Isolated:
    """Encode a batch; where that fails, halve it until the images that cause it are alone.

    Args:
        encode: raises EncoderCrashed, or any exception, for images that it cannot take.
        batch: not empty.

    Raises:
        EncoderUnusable: no image of a batch of SYSTEMIC or more can be encoded.
        MemoryError: there is too little of it, for a batch that is of the same size whatever images are in it.
    """
    failures: dict[int, tuple[str, str]] = {}

    def solve(slots: list[int]) -> list[tuple[int, Any]]:
        for _ in range(TRIES if len(slots) == 1 else 1):
            try:
                return list(zip(slots, encode(batch, slots), strict=True))
            except (EncoderUnusable, MemoryError):
                raise
            except torch.OutOfMemoryError as error:
                raise MemoryError(f"{error}; lower tokenize.batch_size or tokenize.num_workers") from error
            except Exception as error:  # recorded below; a bug that hits every image is raised at the end
                caught = error
        if len(slots) == 1:
            status = CRASHED if isinstance(caught, EncoderCrashed) else FAILED
            failures[slots[0]] = (status, " ".join(f"{type(caught).__name__}: {caught}".split())[:200])
            logger.warning("image %s cannot be encoded: %s", batch.keys[slots[0]], failures[slots[0]][1])
            if len(failures) == len(batch) and len(set(batch.keys)) >= SYSTEMIC:
                raise EncoderUnusable(
                    f"none of {len(batch)} images can be encoded, first {batch.keys[0]}: {failures[0][1]}; check the "
                    "tokenizer, memory and tokenize.batch_size"
                ) from caught
            return []
        middle = len(slots) // 2
        return solve(slots[:middle]) + solve(slots[middle:])

    solved = solve(list(range(len(batch))))
    codes = np.stack([codes for _, codes in solved]) if solved else np.zeros((0,), np.int64)
    return Isolated(codes, [slot for slot, _ in solved], failures)


class Sandbox:
    """An encoder in a child process, started when needed and again after it died.

    Args:
        factory: picklable; makes the encoder in the child.
    """

    def __init__(self, factory: Callable[[], Encodes]) -> None:
        self._factory = factory
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def encode(self, batch: Batch, slots: list[int]) -> Codes:
        """As the encoder's own.

        Raises:
            EncoderCrashed: the child died of it.
            EncoderUnusable: the child died before.
        """
        child = self._child or self._start()
        assert child.stdin is not None and child.stdout is not None
        try:
            pickle.dump((batch, slots), child.stdin)
            child.stdin.flush()
            answer = pickle.load(child.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._end()
            logger.warning("the encoder's process died with exit code %s on %d images", code, len(slots))
            # The code is not part of the message, which ends up in the artifact: it may differ from run to run
            raise EncoderCrashed("the encoder's process died of this image") from None
        if isinstance(answer, Exception):
            raise answer
        codes: Codes = answer
        return codes

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "stages.isolation"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self._child.stdin is not None and self._child.stdout is not None
        child = self._child
        try:
            pickle.dump(self._factory, self._child.stdin)
            self._child.stdin.flush()
            pickle.load(self._child.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise EncoderUnusable(
                f"the process that was to look for a bad image ended with exit code {self._end()} before it had loaded "
                "the encoder; it needs memory for a second one: lower tokenize.num_workers"
            ) from None
        return child

    def _end(self) -> int | None:
        if self._child is None:
            return None
        child, self._child = self._child, None
        assert child.stdin is not None and child.stdout is not None
        with suppress(BrokenPipeError):
            child.stdin.close()  # it ends by itself when there are no more batches
        try:
            child.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()
        return child.returncode


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Be the child: make the encoder, then answer batch after batch until there are no more."""
    encoder = pickle.load(requests)()
    pickle.dump("ready", answers)
    answers.flush()
    while True:
        try:
            batch, slots = pickle.load(requests)
        except EOFError:
            return
        answer: Codes | Exception
        try:
            answer = encoder.encode(batch, slots)
        except (MemoryError, torch.OutOfMemoryError) as error:
            answer = MemoryError(f"{type(error).__name__}: {error}")
        except Exception as error:  # raised again in the parent
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


def main() -> None:
    """Serve on stdin and stdout; whatever else prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
