"""Device and precision of a stage: its device, its autocast type, and the resolution of `precision: auto`.

`auto` is resolved once, before the action key is computed, so the key and the manifest contain the resolved value and
never `auto` itself.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from models.config import Config
from storage.manifest import Manifest

logger = logging.getLogger(__name__)

Precision = Literal["auto", "bf16", "fp32"]

_WORTHWHILE = 1.2
"""Speed-up from which bf16 is used on processors where it is measured, so that noise does not decide."""
_TOKENIZER_STAGE = "train_tokenizer"

C = TypeVar("C", bound=Config)


class PrecisionConfig(Config):
    """Configuration of a stage that computes under autocast."""

    precision: Precision = "auto"
    """Autocast type of forward passes; weights stay float32. `auto` is `bf16` on a GPU and on a CPU with bf16
    instructions (AVX512-BF16 or AMX), and `fp32` on other CPUs, where PyTorch emulates bf16 10 to 40 times slower. The
    action key and the manifest contain the resolved value."""

    def computes_on(self) -> str:
        """Return the type of the device, `cuda` or `cpu`."""
        raise NotImplementedError

    def native_precision(self) -> Precision:
        """Return what `auto` means on this machine, unless `needs_fp32` makes it `fp32` everywhere."""
        return native_precision(self.computes_on())

    def needs_fp32(self, inputs: Mapping[str, Manifest]) -> bool:
        """Return whether `auto` means `fp32` on every machine, since bf16 changed 6% of the codes of an imported VQ-16.

        Args:
            inputs: the stage's input artifacts by the name of the stage that made them.
        """
        return any(_is_imported_tokenizer(manifest) for manifest in inputs.values())


def with_precision(config: C, inputs: Mapping[str, Manifest]) -> C:
    """Return the config with `precision: auto` resolved for this machine; other configs are returned unchanged."""
    return acceptable_precisions(config, inputs)[0]


def acceptable_precisions(config: C, inputs: Mapping[str, Manifest]) -> list[C]:
    """Return the configs whose stored results are acceptable for this config, the one for this machine first.

    `auto` accepts the precision that suits any machine, so a result made in bf16 on a GPU is accepted on a laptop too.
    """
    if not isinstance(config, PrecisionConfig) or config.precision != "auto":
        return [config]
    if config.needs_fp32(inputs):
        names: tuple[Precision, ...] = ("fp32",)
    else:
        names = ("fp32", "bf16") if config.native_precision() == "fp32" else ("bf16", "fp32")
    return [config.model_copy(update={"precision": name}) for name in names]


def warn_of_emulation(config: Config, section: str) -> None:
    """Warn how much slower an explicit `bf16` is on a CPU that emulates it, which takes about a second to measure."""
    if not isinstance(config, PrecisionConfig) or config.precision != "bf16":
        return
    if config.computes_on() == "cpu" and native_precision("cpu") == "fp32":
        logger.warning(
            "%s.precision=bf16: this CPU has no bf16 instructions and emulates them, %.0f times slower than fp32 "
            "(measured now: a 3x3 convolution and a linear layer); leave precision out, or set it to auto or fp32",
            section,
            1 / bf16_speedup(),
        )


@functools.cache
def native_precision(device: str) -> Precision:
    """Return `bf16` if a device has bf16 instructions, else `fp32`.

    Args:
        device: `cpu` or `cuda`. If this process has no GPU, `cuda` means that of a remote worker, which is assumed to
            have bf16, as all have since Ampere (2020).
    """
    if device != "cpu":
        emulated = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
        return "fp32" if emulated else "bf16"
    has = torch.cpu.get_capabilities()
    if has.get("architecture") in ("x86_64", "amd64"):
        return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "fp32"
    return "bf16" if bf16_speedup() >= _WORTHWHILE else "fp32"  # other processors have no flag for it


@functools.cache
@torch.no_grad()
def bf16_speedup() -> float:
    """Measure the speed-up of bf16 autocast over float32 on this CPU, with a convolution and a linear layer."""
    layers = (
        (nn.Conv2d(64, 64, 3, padding=1), torch.zeros(1, 64, 32, 32)),
        (nn.Linear(256, 768), torch.zeros(512, 256)),
    )

    def seconds(precision: Precision) -> float:
        fastest = float("inf")
        with autocast(torch.device("cpu"), precision):
            for _ in range(4):  # the first run also selects kernels
                start = time.perf_counter()
                for layer, images in layers:
                    layer(images)
                fastest = min(fastest, time.perf_counter() - start)
        return fastest

    return seconds("fp32") / seconds("bf16")


def resolve_device(name: str) -> torch.device:
    """Resolve `auto` to this process's current GPU (by default the first) if there is one, else to the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return a context with bf16 autocast on `device`, or without autocast for fp32.

    Args:
        device: device of the forward pass.
        precision: `bf16` or `fp32`; `auto` has to be resolved before (`with_precision`).
    """
    assert precision != "auto", "precision is resolved before a stage starts"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _is_imported_tokenizer(manifest: Manifest) -> bool:
    return manifest.stage == _TOKENIZER_STAGE and manifest.config.get("steps") == 0
