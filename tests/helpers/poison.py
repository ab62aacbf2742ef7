"""Tokenize with an encoder that some images bring down, as a child process.

    python -m tests.helpers.poison RECIPE STORE EXECUTOR KEY,KEY,... [crash | raise | device]

They crash it (default), make it raise an exception, or leave it without its device: then it also fails on every image
that comes after, as long as its process lives.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass

import torch

from stages.pipeline.command import run_one_stage
from stages.tokenize import stage as tokenize
from stages.tokenize.encoding import CodeArray, Encoder, EncoderFactory, ImageBatch, Pixels, Scores

LOST = "CUDA error: device-side assert triggered"


class PoisonableEncoder(Encoder):
    """Cannot take images with these keys."""

    poison: tuple[str, ...] = ()
    effect: str = "crash"
    lost: bool = False

    def encode(self, batch: ImageBatch, slots: list[int]) -> CodeArray:
        if {batch.keys[slot] for slot in slots} & set(self.poison):
            if self.effect == "raise":
                raise ValueError("cannot take this one")
            if self.effect == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            self.lost = True
        self._check_device()
        return super().encode(batch, slots)

    def scores(self, pixels: Pixels, captions: list[str], slots: list[int]) -> Scores:
        self._check_device()
        return super().scores(pixels, captions, slots)

    def _check_device(self) -> None:
        if self.lost:
            raise torch.AcceleratorError(LOST)


@dataclass(frozen=True)
class PoisonableFactory(EncoderFactory):
    """Takes its poison from the environment, which workers inherit."""

    def __call__(self) -> Encoder:
        encoder = PoisonableEncoder(self)
        encoder.poison = tuple(os.environ["TEST_POISON"].split(","))
        encoder.effect = os.environ["TEST_POISON_EFFECT"]
        return encoder


def main() -> None:
    recipe, store, executor, poison, *effect = sys.argv[1:]
    os.environ["TEST_POISON"], os.environ["TEST_POISON_EFFECT"] = poison, (effect or ["crash"])[0]
    tokenize.EncoderFactory = PoisonableFactory  # type: ignore[misc]
    run_one_stage("tokenize", recipe, store, executor)  # type: ignore[arg-type]


if __name__ == "__main__":
    from tests.helpers import poison

    poison.main()  # under its own name, so that what it pickles can be found
