"""Small pre-norm transformer modules: a block, the decoder from codes to semantic features, attention projections.

Shape legend: B batch, T tokens, C channels, h w code grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from models.config import Config


class SemanticDecoderConfig(Config):
    """The transformer that maps quantized vectors back to the teacher's features (BEiT v2, section 3.1)."""

    width: PositiveInt = 768
    """Channels of the hidden states."""
    depth: NonNegativeInt = 3
    """Number of blocks."""
    heads: PositiveInt = 12
    """Number of attention heads, which divides `width`."""

    @model_validator(mode="after")
    def _check_heads(self) -> SemanticDecoderConfig:
        check_heads(self.width, self.heads)
        return self


def check_heads(width: int, heads: int) -> None:
    """Raise ValueError unless the channels of a transformer can be divided among its heads."""
    if width % heads:
        raise ValueError(f"width={width} cannot be divided equally among heads={heads}; make it a multiple")


class TransformerBlock(nn.Module):
    """Attention and MLP, each after a LayerNorm and with a skip connection: `[B, T, C]` -> the same shape."""

    def __init__(self, width: int, heads: int, mlp_ratio: int = 4, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, C / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class SemanticDecoder(nn.Module):
    """Predicts teacher features `[B, h, w, C_out]` from quantized vectors `[B, h, w, C_in]`."""

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


class AttentionProjection(nn.Module):
    """Attention that changes the number of channels: `[B, h, w, C_in]` -> `[B, h, w, C_out]`.

    Each head has the smaller of the two widths, and there are as many heads as fit into the larger one. To shrink,
    heads are averaged; to grow, they are concatenated. A linear skip connection is added to the attention, and a gated
    MLP of ratio 2 follows. Source: DualToken (arXiv 2503.14324), section 3.2, and its released code.
    """

    def __init__(self, in_dim: int, out_dim: int, *, mlp_norm: bool = False, causal: bool = False) -> None:
        """
        Args:
            in_dim: channels of the input.
            out_dim: channels of the result.
            mlp_norm: whether the MLP has a second LayerNorm before it, as in the released code.
            causal: whether attention is causal in row-major order, as after the quantizers of the released code.

        Raises:
            ValueError: neither width is a multiple of the other.
        """
        super().__init__()
        self.width, self.head_dim = max(in_dim, out_dim), min(in_dim, out_dim)
        if self.width % self.head_dim:
            raise ValueError(
                f"an attention projection from {in_dim} to {out_dim} channels needs one to be a multiple of the other; "
                f"change tokenizer.residual.code_dim or the layers that are read"
            )
        self.shrinks, self.causal = in_dim > out_dim, causal
        self.norm1 = nn.LayerNorm(in_dim)
        self.qkv = nn.Linear(in_dim, 3 * self.width)
        self.out = nn.Linear(out_dim, out_dim)
        self.norm_skip = nn.LayerNorm(in_dim)
        self.skip = nn.Linear(in_dim, out_dim)
        self.norm2 = nn.LayerNorm(out_dim)
        self.mlp_norm = nn.LayerNorm(out_dim, eps=1e-6) if mlp_norm else nn.Identity()
        self.gate, self.up = nn.Linear(out_dim, 2 * out_dim), nn.Linear(out_dim, 2 * out_dim)
        self.down = nn.Linear(2 * out_dim, out_dim)

    def forward(self, grid: Tensor) -> Tensor:
        x = grid.flatten(1, 2)  # [B, T, C_in]
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.width // self.head_dim, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, C_head]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        heads = mixed.mean(1) if self.shrinks else mixed.transpose(1, 2).reshape(batch, tokens, self.width)
        x = self.skip(self.norm_skip(x)) + self.out(heads)
        hidden = self.mlp_norm(self.norm2(x))
        x = x + self.down(F.gelu(self.gate(hidden), approximate="tanh") * self.up(hidden))
        return x.view(*grid.shape[:-1], -1)
