"""Tokenize with an encoder that some images bring down, as a child process.

    python -m tests.poison RECIPE STORE EXECUTOR KEY,KEY,... [raise]

With `raise` the encoder fails with an exception in place of a crash.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass

from stages import tokenize
from stages.encoding import Batch, Codes, Encoder, EncoderFactory
from stages.standalone import run_one_stage


class PoisonableEncoder(Encoder):
    """Segfaults on images with these keys."""

    poison: tuple[str, ...] = ()
    by_exception: bool = False

    def encode(self, batch: Batch, slots: list[int]) -> Codes:
        if {batch.keys[slot] for slot in slots} & set(self.poison):
            if self.by_exception:
                raise ValueError("cannot take this one")
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().encode(batch, slots)


@dataclass(frozen=True)
class PoisonableFactory(EncoderFactory):
    poison: tuple[str, ...] = ()
    by_exception: bool = False

    def __call__(self) -> Encoder:
        encoder = PoisonableEncoder(self)
        encoder.poison, encoder.by_exception = self.poison, self.by_exception
        return encoder


@dataclass(frozen=True)
class PoisonableWorkers(tokenize.WorkerFactory):
    """Takes its settings from the environment, which workers inherit."""

    def encoder(self) -> EncoderFactory:
        plain = super().encoder()
        fields = {name: getattr(plain, name) for name in EncoderFactory.__dataclass_fields__}
        poison = tuple(os.environ["TEST_POISON"].split(","))
        return PoisonableFactory(**fields, poison=poison, by_exception="TEST_POISON_RAISES" in os.environ)


def main() -> None:
    recipe, store, executor, poison, *rest = sys.argv[1:]
    os.environ["TEST_POISON"] = poison
    if rest:
        os.environ["TEST_POISON_RAISES"] = "1"
    tokenize.WorkerFactory = PoisonableWorkers  # type: ignore[misc]
    run_one_stage("tokenize", recipe, store, executor)  # type: ignore[arg-type]


if __name__ == "__main__":
    from tests import poison

    poison.main()  # under its own name, so that what it pickles can be found
