"""Forward and EMA update of a quantizer against vector-quantize-pytorch (Phil Wang), same inputs, one process.

    .venv/bin/pip install -c requirements.lock -e '.[benchmarks]'
    python -m tests.benchmarks.bench_quantizer [--device cuda] [--scale 1.0]

Sizes are those of MUSE-VL (32,768 codes x 8) and DualToken (depth 8, 16,384 codes x 32) on 32 images of 27 x 27 codes.
Each case prints a line for time and one for memory, and how many codes both sides agree on, which shows that they did
the same work. Two more lines set our time against what the device can do, measured in the same run: its distances as
multiplications at the rate of a large float32 product, and as bytes if the matrix of distances were written and read
once at the rate of a large copy. There `ratio` is the share of that ceiling; chunks that stay in a cache
pass the second.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualVQ, VectorQuantize

from models.tokenizers.quantizers import (
    ResidualQuantizer,
    ResidualQuantizerConfig,
    VectorQuantizer,
    VectorQuantizerConfig,
)
from tests.benchmarks.measuring import measure, report

NUM_VECTORS = 32 * 27 * 27
DECAY = 0.99


def main() -> None:
    """Run both cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the vectors, for machines with less memory")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device, count = torch.device(arguments.device), int(NUM_VECTORS * arguments.scale)
    _single(device, count, arguments.repeats)
    _residual(device, count, arguments.repeats)


def _single(device: torch.device, count: int, repeats: int) -> None:
    config = VectorQuantizerConfig(
        codebook_size=32_768, code_dim=8, l2_normalised=True, ema_decay=DECAY, dead_threshold=0
    )
    ours = VectorQuantizer(config).to(device).train()
    ours.initialised.fill_(True)
    peer = VectorQuantize(dim=8, codebook_size=32_768, decay=DECAY, use_cosine_sim=True, commitment_weight=0.25)
    peer = peer.to(device).train()
    peer._codebook.embed.data.copy_(ours.codebook[None])
    vectors = torch.randn(1, count, 8, device=device)
    _compare("quantizer 32768x8", ours, peer, vectors, count * 32_768, repeats)


def _residual(device: torch.device, count: int, repeats: int) -> None:
    config = ResidualQuantizerConfig(codebook_size=16_384, code_dim=32, depth=8, ema_decay=DECAY, dead_threshold=0)
    ours = ResidualQuantizer(config).to(device).train()
    ours.book(0).initialised.fill_(True)
    peer = ResidualVQ(
        dim=32, num_quantizers=8, codebook_size=16_384, shared_codebook=True, decay=DECAY, commitment_weight=0.25
    )
    peer = peer.to(device).train()
    for layer in peer.layers:
        layer._codebook.embed.data.copy_(ours.book(0).codebook[None])
    vectors = torch.randn(1, count, 32, device=device)
    _compare("quantizer residual 8x16384x32", ours, peer, vectors, 8 * count * 16_384, repeats)


def _compare(name: str, ours: nn.Module, peer: nn.Module, vectors: Tensor, num_distances: int, repeats: int) -> None:
    device = vectors.device
    name = f"{name}, {vectors.shape[1]} vectors, {_name_of(device)}"
    same = _codes(ours.eval(), vectors) == _codes(peer.eval(), vectors)
    report(f"{name}: codes that agree", float(same.float().mean()), 1.0, "part")
    own = measure(_training_call(ours, vectors), device, repeats=repeats)
    other = measure(_training_call(peer, vectors), device, repeats=repeats)
    report(f"{name}: time", own.seconds, other.seconds, "s")
    report(f"{name}: extra memory", own.extra_bytes / 2**20, other.extra_bytes / 2**20, "MiB")
    limit = 2 * num_distances * vectors.shape[2] / _flops(device)
    report(f"{name}: time against its multiplications at the device's rate", own.seconds, limit, "s")
    limit = 2 * num_distances * vectors.element_size() / _bandwidth(device)
    report(f"{name}: time against its distances written and read once", own.seconds, limit, "s")


def _flops(device: torch.device) -> float:
    """Floating-point operations a second of a large float32 product."""
    side = 8192 if device.type == "cuda" else 2048
    one = torch.randn(side, side, device=device)
    return 2 * side**3 / measure(lambda: one @ one, device, repeats=5).seconds


def _bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.zeros(2**30 // 4, device=device)
    target = torch.empty_like(source)
    return 2 * 2**30 / measure(lambda: target.copy_(source), device, repeats=5).seconds


@torch.no_grad()
def _codes(quantizer: nn.Module, vectors: Tensor) -> Tensor:
    codes: Tensor = quantizer(vectors)[1]
    return codes


def _training_call(quantizer: nn.Module, vectors: Tensor) -> Callable[[], object]:
    quantizer.train()
    learnt_from = vectors.clone().requires_grad_()
    return lambda: quantizer(learnt_from)


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


if __name__ == "__main__":
    main()
