"""Several codes per position in a language model: projected code vectors in, one depth transformer per book out.

Source: DualToken (arXiv 2503.14324), section 3.3; the depth transformer is RQ-VAE's (arXiv 2203.01941, section 3.2).
Shape legend: V visual positions, N books, D depth, K codebook size, C channels of a code, H channels of the language
model, W width of a depth transformer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from models.config import Config
from models.language.sampling import SamplingConfig, guided, pick
from models.tokenizers.transformer import TransformerBlock, check_heads


class VisualCodesConfig(Config):
    """The depth transformers, which only tokenizers with several codes per position (`dualtoken`, `vila_u`) have."""

    width: PositiveInt = 1024
    """Channels of the hidden states."""
    layers: PositiveInt = 3
    """Number of blocks (DualToken: 3)."""
    heads: PositiveInt = 16
    """Number of attention heads, which divides `width`."""

    @model_validator(mode="after")
    def _check_heads(self) -> VisualCodesConfig:
        check_heads(self.width, self.heads)
        return self


class DepthHead(nn.Module):
    """Depth transformer: predicts the D codes of a position one by one from the language model's last hidden state.

    The first input is the hidden state at the position before; the input of depth d is the sum of the vectors of the
    codes before d.
    """

    codebook: Tensor
    positions: Tensor

    def __init__(self, config: VisualCodesConfig, hidden_size: int, codebook: Tensor, depth: int) -> None:
        """
        Args:
            config: size of the transformer.
            hidden_size: H.
            codebook: `[1, K, C]` if all depths share it, else `[D, K, C]`; it is not trained.
            depth: D.
        """
        super().__init__()
        _, size, code_dim = codebook.shape
        self.depth = depth
        self.register_buffer("codebook", codebook.clone())
        self.from_hidden = nn.Linear(hidden_size, config.width)
        self.from_code = nn.Linear(code_dim, config.width)
        self.positions = nn.Parameter(0.02 * torch.randn(depth, config.width))
        self.blocks = nn.Sequential(
            *[TransformerBlock(config.width, config.heads, causal=True) for _ in range(config.layers)]
        )
        self.norm = nn.LayerNorm(config.width)
        self.classify = nn.Linear(config.width, size)

    def vectors(self, codes: Tensor) -> Tensor:
        """Look up codes `[V, d]` of the first d depths; returns their vectors `[V, d, C]`."""
        books = [self.codebook[0 if len(self.codebook) == 1 else depth] for depth in range(codes.shape[1])]
        return torch.stack([book[codes[:, depth]] for depth, book in enumerate(books)], dim=1)

    def forward(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Compute the logits of each depth from the hidden state and the codes of the depths before it.

        Args:
            hidden: `[V, H]` hidden states.
            codes: `[V, d]` codes of the first d < D depths.

        Returns:
            `[V, d + 1, K]` logits of depths 0..d.
        """
        tokens = [self.from_hidden(hidden)[:, None]]
        if codes.shape[1]:
            tokens.append(self.from_code(self.vectors(codes).cumsum(1)))
        stacked = torch.cat(tokens, dim=1) + self.positions[: codes.shape[1] + 1]
        return self.classify(self.norm(self.blocks(stacked)))

    def losses(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Return the negative log-likelihood of all D codes `[V, D]` together, given states `[V, H]`; `[V]` nats."""
        logits = self(hidden, codes[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view(codes.shape).sum(1)

    def draw(self, hidden: Tensor, config: SamplingConfig, generator: torch.Generator) -> Tensor:
        """Sample the codes of each position, depth by depth.

        Args:
            hidden: `[V, H]` hidden states; with guidance `[2V, H]`, the conditional ones before the unconditional ones.
            config: sampling settings.
            generator: random generator on the CPU.

        Returns:
            `[V, D]` int64.
        """
        copies = 1 if config.guidance == 1.0 else 2
        drawn = torch.empty(len(hidden) // copies, 0, dtype=torch.long, device=hidden.device)
        for _ in range(self.depth):
            logits = self(hidden, drawn.repeat(copies, 1))[:, -1].float()
            drawn = torch.cat([drawn, pick(guided(logits, config), config, generator)[:, None]], dim=1)
        return drawn


class VisualCodes(nn.Module):
    """Input projections and output heads of a language model at positions that carry `N x D` codes."""

    def __init__(self, config: VisualCodesConfig, hidden_size: int, codebooks: list[Tensor], depth: int) -> None:
        """
        Args:
            config: size of the depth transformers.
            hidden_size: H.
            codebooks: the codebook of each book, as in `ImageTokenizer.codebooks`.
            depth: D.
        """
        super().__init__()
        self.config = config
        shares = [hidden_size // len(codebooks)] * len(codebooks)
        shares[0] += hidden_size - sum(shares)
        self.inputs = nn.ModuleList(
            nn.Sequential(nn.Linear(book.shape[-1], share), nn.GELU(), nn.Linear(share, share))
            for book, share in zip(codebooks, shares, strict=True)
        )
        self.heads = nn.ModuleList(DepthHead(config, hidden_size, book, depth) for book in codebooks)

    def head(self, book: int) -> DepthHead:
        """Return the depth transformer of a book."""
        head = self.heads[book]
        assert isinstance(head, DepthHead)
        return head

    def embed(self, codes: Tensor) -> Tensor:
        """Embed codes `[V, N, D]` as inputs of the language model `[V, H]`, one share of the channels for each book."""
        return torch.cat(
            [project(self.head(book).vectors(codes[:, book]).sum(1)) for book, project in enumerate(self.inputs)],
            dim=-1,
        )

    def losses(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Return the negative log-likelihood of the codes `[V, N, D]`, summed over books and depths; `[V]` nats."""
        books = range(len(self.heads))
        return torch.stack([self.head(book).losses(hidden, codes[:, book]) for book in books]).sum(0)

    def draw(self, hidden: Tensor, config: SamplingConfig, generator: torch.Generator) -> Tensor:
        """Sample the codes of each position, `[V, N, D]` int64; arguments as for `DepthHead.draw`."""
        books = range(len(self.heads))
        return torch.stack([self.head(book).draw(hidden, config, generator) for book in books], dim=1)
