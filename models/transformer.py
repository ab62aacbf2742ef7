"""A small pre-norm transformer encoder, and the ViT that turns codes back into semantic features.

Shape legend: B batch, T tokens, C channels, h w code grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from models.config import Config


class SemanticDecoderConfig(Config):
    """The ViT that maps quantized vectors back to the teacher's features (BEiT v2, section 3.1)."""

    width: PositiveInt = 768
    """Channels."""
    depth: NonNegativeInt = 3
    """Blocks."""
    heads: PositiveInt = 12
    """Attention heads."""


class TransformerBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm: `[B, T, C]` -> the same shape."""

    def __init__(self, width: int, heads: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, C / heads]
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class SemanticDecoder(nn.Module):
    """Quantized vectors `[B, h, w, C_in]` -> predicted teacher features `[B, h, w, C_out]`."""

    def __init__(self, config: SemanticDecoderConfig, in_dim: int, out_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.project_in = nn.Linear(in_dim, config.width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, grid[0] * grid[1], config.width))
        self.blocks = nn.Sequential(*[TransformerBlock(config.width, config.heads) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.width)
        self.project_out = nn.Linear(config.width, out_dim)

    def forward(self, vectors: Tensor) -> Tensor:
        batch, height, width, _ = vectors.shape
        tokens = self.project_in(vectors.flatten(1, 2)) + self.positions
        return self.project_out(self.norm(self.blocks(tokens))).view(batch, height, width, -1)
