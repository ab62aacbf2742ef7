"""Forward and EMA update of a quantizer against vector-quantize-pytorch (Phil Wang), same inputs, one process.

    uv pip install -c requirements.lock -e '.[benchmarks]'
    python -m tests.benchmarks.bench_quantizer [--device cuda] [--scale 1.0]

Sizes are those of MUSE-VL (32,768 codes x 8) and DualToken (depth 8, 16,384 codes x 32) on 32 images of 27 x 27 codes.
Each case prints a line for time and one for memory, and how many codes both sides agree on, which shows that they did
the same work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualVQ, VectorQuantize

from models.quantizers import QuantizerConfig, ResidualQuantizer, ResidualQuantizerConfig, VectorQuantizer
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
    config = QuantizerConfig(codebook_size=32_768, code_dim=8, l2_normalised=True, ema_decay=DECAY, dead_threshold=0)
    ours = VectorQuantizer(config).to(device).train()
    ours.initialised.fill_(True)
    peer = VectorQuantize(dim=8, codebook_size=32_768, decay=DECAY, use_cosine_sim=True, commitment_weight=0.25)
    peer = peer.to(device).train()
    peer._codebook.embed.data.copy_(ours.codebook[None])
    vectors = torch.randn(1, count, 8, device=device)
    _compare("quantizer 32768x8", ours, peer, vectors, device, repeats)


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
    _compare("quantizer residual 8x16384x32", ours, peer, vectors, device, repeats)


def _compare(name: str, ours: nn.Module, peer: nn.Module, vectors: Tensor, device: torch.device, repeats: int) -> None:
    name = f"{name}, {vectors.shape[1]} vectors, {_name_of(device)}"
    same = _codes(ours.eval(), vectors) == _codes(peer.eval(), vectors)
    report(f"{name}: codes that agree", float(same.float().mean()), 1.0, "part")
    own = measure(_training_call(ours, vectors), device, repeats=repeats)
    other = measure(_training_call(peer, vectors), device, repeats=repeats)
    report(f"{name}: time", own.seconds, other.seconds, "s")
    report(f"{name}: extra memory", own.extra_bytes / 2**20, other.extra_bytes / 2**20, "MiB")


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
