"""LlamaGen's tokenizer at a small size, written out under the names of its checkpoints (arXiv 2406.06525)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, MULTIPLIERS, LATENT, CODES, DIM = 32, (1, 2, 2), 16, 24, 4


class Reference:
    """The network as plain function calls on a state dict with random weights, and images that it has seen."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(2, 3, 16, 16, generator=self.generator) * 2 - 1
        self.decode(self.encode(self.images))

    def _random(self, name: str, *shape: int) -> Tensor:
        if name not in self.state:
            fan = max(1, torch.Size(shape[1:]).numel())
            self.state[name] = torch.randn(*shape, generator=self.generator) / fan**0.5
        return self.state[name]

    def conv(
        self, x: Tensor, name: str, width: int, size: int = 3, stride: int = 1, padding: int | None = None
    ) -> Tensor:
        weight = self._random(f"{name}.weight", width, x.shape[1], size, size)
        bias = self._random(f"{name}.bias", width)
        return F.conv2d(x, weight, bias, stride=stride, padding=size // 2 if padding is None else padding)

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._random(f"{name}.weight", x.shape[1]), self._random(f"{name}.bias", x.shape[1])
        return F.group_norm(x, min(32, x.shape[1] // 4), weight, bias, eps=1e-6)

    def res(self, x: Tensor, name: str, width: int) -> Tensor:
        hidden = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1", width)
        hidden = self.conv(F.silu(self.norm(hidden, f"{name}.norm2")), f"{name}.conv2", width)
        return hidden + (x if x.shape[1] == width else self.conv(x, f"{name}.nin_shortcut", width, 1))

    def attention(self, x: Tensor, name: str) -> Tensor:
        normed, width = self.norm(x, f"{name}.norm"), x.shape[1]
        q, k, v = (self.conv(normed, f"{name}.{part}", width, 1).flatten(2) for part in "qkv")
        weights = (torch.einsum("bcq,bck->bqk", q, k) * width**-0.5).softmax(-1)
        mixed = torch.einsum("bqk,bck->bcq", weights, v).view_as(x)
        return x + self.conv(mixed, f"{name}.proj_out", width, 1)

    def middle(self, x: Tensor, side: str) -> Tensor:
        x = self.res(x, f"{side}.mid.0", x.shape[1])
        return self.res(self.attention(x, f"{side}.mid.1"), f"{side}.mid.2", x.shape[1])

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv(x, "encoder.conv_in", WIDTH)
        for level, multiplier in enumerate(MULTIPLIERS):
            lowest = level == len(MULTIPLIERS) - 1
            for block in range(2):
                x = self.res(x, f"encoder.conv_blocks.{level}.res.{block}", WIDTH * multiplier)
                x = self.attention(x, f"encoder.conv_blocks.{level}.attn.{block}") if lowest else x
            if not lowest:
                padded = F.pad(x, (0, 1, 0, 1))
                x = self.conv(padded, f"encoder.conv_blocks.{level}.downsample.conv", x.shape[1], stride=2, padding=0)
        x = F.silu(self.norm(self.middle(x, "encoder"), "encoder.norm_out"))
        z = self.conv(self.conv(x, "encoder.conv_out", LATENT), "quant_conv", DIM, 1)
        codebook = F.normalize(self._random("quantize.embedding.weight", CODES, DIM), dim=1)
        return torch.einsum("bchw,kc->bhwk", F.normalize(z, dim=1), codebook).argmax(-1)

    def decode(self, codes: Tensor) -> Tensor:
        z = F.normalize(self.state["quantize.embedding.weight"], dim=1)[codes].permute(0, 3, 1, 2)
        x = self.conv(self.conv(z, "post_quant_conv", LATENT, 1), "decoder.conv_in", WIDTH * MULTIPLIERS[-1])
        x = self.middle(x, "decoder")
        for level, multiplier in enumerate(reversed(MULTIPLIERS)):
            for block in range(3):
                x = self.res(x, f"decoder.conv_blocks.{level}.res.{block}", WIDTH * multiplier)
                x = self.attention(x, f"decoder.conv_blocks.{level}.attn.{block}") if level == 0 else x
            if level < len(MULTIPLIERS) - 1:
                grown = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(grown, f"decoder.conv_blocks.{level}.upsample.conv", x.shape[1])
        return self.conv(F.silu(self.norm(x, "decoder.norm_out")), "decoder.conv_out", 3)
