"""Several codes a position in a language model: projected code vectors in, one depth transformer a book out.

Source: DualToken (arXiv 2503.14324), section 3.3; the depth transformer is RQ-VAE's (arXiv 2203.01941, section 3.2).
Shape legend: V visual positions, N books, D depth, K codebook size, C channels of a code, H channels of the language
model, W width of a depth transformer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from models.config import Config
from models.language.sampling import SamplingConfig, guided, pick
from models.tokenizers.transformer import TransformerBlock


class VisualCodesConfig(Config):
    """The depth transformers; only tokenizers with several codes a position (`dualtoken`, `vila_u`) have them."""

    width: PositiveInt = 1024
    """Channels."""
    layers: PositiveInt = 3
    """Blocks (DualToken: 3)."""
    heads: PositiveInt = 16
    """Attention heads."""


class DepthHead(nn.Module):
    """Predicts the D codes of a position one after another from the language model's state at the position before.

    The first input is that state; the input of depth d is the sum of the vectors of the codes before d.
    """

    codebook: Tensor
    positions: Tensor

    def __init__(self, config: VisualCodesConfig, hidden_size: int, codebook: Tensor, depth: int) -> None:
        """
        Args:
            config: size of the transformer.
            hidden_size: H.
            codebook: `[1, K, C]` where all depths share it, else `[D, K, C]`; it stays as it is.
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
        """Codes `[V, d]` of the first d depths to their vectors `[V, d, C]`."""
        books = [self.codebook[0 if len(self.codebook) == 1 else depth] for depth in range(codes.shape[1])]
        return torch.stack([book[codes[:, depth]] for depth, book in enumerate(books)], dim=1)

    def forward(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Logits of the next depth after each of those given.

        Args:
            hidden: `[V, H]`.
            codes: `[V, d]` with d < D, the codes of the first depths.

        Returns:
            `[V, d + 1, K]`.
        """
        tokens = [self.from_hidden(hidden)[:, None]]
        if codes.shape[1]:
            tokens.append(self.from_code(self.vectors(codes).cumsum(1)))
        stacked = torch.cat(tokens, dim=1) + self.positions[: codes.shape[1] + 1]
        return self.classify(self.norm(self.blocks(stacked)))

    def losses(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Negative log-likelihood of all D codes `[V, D]` together, given `[V, H]`; `[V]` nats."""
        logits = self(hidden, codes[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view(codes.shape).sum(1)

    def draw(self, hidden: Tensor, config: SamplingConfig, generator: torch.Generator) -> Tensor:
        """Draw the codes of each position, depth by depth.

        Args:
            hidden: `[V, H]`; with guidance `[2V, H]`, the unconditional states after the conditional ones.
            config: sampling settings.
            generator: source of randomness, on the CPU.

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
    """Both ends of a language model at positions that carry `N x D` codes."""

    def __init__(self, config: VisualCodesConfig, hidden_size: int, codebooks: list[Tensor], depth: int) -> None:
        """
        Args:
            config: size of the depth transformers.
            hidden_size: H.
            codebooks: of each book, as `ImageTokenizer.codebooks`.
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
        """The depth transformer of a book."""
        head = self.heads[book]
        assert isinstance(head, DepthHead)
        return head

    def embed(self, codes: Tensor) -> Tensor:
        """Codes `[V, N, D]` -> inputs of the language model `[V, H]`: the books side by side on the channel axis."""
        return torch.cat(
            [project(self.head(book).vectors(codes[:, book]).sum(1)) for book, project in enumerate(self.inputs)],
            dim=-1,
        )

    def losses(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Negative log-likelihood of the codes `[V, N, D]`, summed over books and depths; `[V]` nats."""
        books = range(len(self.heads))
        return torch.stack([self.head(book).losses(hidden, codes[:, book]) for book in books]).sum(0)

    def draw(self, hidden: Tensor, config: SamplingConfig, generator: torch.Generator) -> Tensor:
        """Draw the codes of each position; arguments as `DepthHead.draw`. `[V, N, D]` int64."""
        books = range(len(self.heads))
        return torch.stack([self.head(book).draw(hidden, config, generator) for book in books], dim=1)
