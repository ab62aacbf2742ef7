"""Vector quantizers: nearest neighbour or residual, with codebooks learned by EMA or gradient, and code restarts.

Shape legend: V vectors, C channels of a code, K codebook size, D depth.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from models.config import Config, Fraction
from models.ranks import is_first_rank, rows_of_ranks, sum_over_ranks, take_from_first_rank

_CHUNK_ELEMENTS = 1 << 22
"""Largest number of entries of the similarity matrix of vectors and codes at a time (16 MiB of float32)."""
_FORGOTTEN = 1e-6
"""A code whose EMA count is below this keeps its vector, as the ratio of sums and counts near 0 is noise."""


class CodebookConfig(Config):
    """The size of a codebook and how it is learned."""

    codebook_size: PositiveInt = 32_768
    """Number of codes."""
    code_dim: PositiveInt = 8
    """Channels of a code."""
    l2_normalised: bool = True
    """Whether vectors and codes are scaled to unit length, so that directions are compared (ViT-VQGAN; LlamaGen, table
    'codebook')."""
    update: Literal["ema", "gradient"] = "ema"
    """`ema`: codes are exponential moving averages of their vectors; `gradient`: codes are trained with the codebook
    loss (VQ-VAE, eq. 3)."""
    ema_decay: Fraction = 0.99
    """Decay of the exponential moving averages per step (`ema` only)."""
    dead_threshold: NonNegativeFloat = 0.05
    """A code whose EMA count falls below this is restarted at a vector of the batch (`ema` only); 0: never. The
    released code of RQ-VAE, which VILA-U and DualToken use, has 1: each code must be chosen once per batch on
    average."""
    commitment_weight: NonNegativeFloat = 0.25
    """Weight of the commitment loss, which pulls vectors to their codes (VQ-VAE, beta)."""
    codebook_weight: NonNegativeFloat = 1.0
    """Weight of the codebook loss, which pulls codes to their vectors (`gradient` only)."""


class VectorQuantizerConfig(CodebookConfig):
    """A quantizer that takes the nearest code of one codebook."""

    kind: Literal["nearest"] = "nearest"
    """The kind of quantizer."""

    def build(self) -> VectorQuantizer:
        """Build the quantizer, untrained."""
        return VectorQuantizer(self)


class ResidualQuantizerConfig(CodebookConfig):
    """Residual quantizers: one for each book of `dualtoken`, the only one of `vila_u`."""

    codebook_size: PositiveInt = 16_384
    """Number of codes of each codebook."""
    code_dim: PositiveInt = 32
    """Channels of a code."""
    l2_normalised: Literal[False] = False
    """Positions are compared, because residuals have no fixed length."""
    depth: PositiveInt = 8
    """Number of codes per vector: 8 for 27x27 codes, 4 for 16x16 (DualToken)."""
    shared: bool = True
    """Whether all depths share one codebook instead of having one each."""


class Quantized(NamedTuple):
    """Result of quantizing vectors."""

    vectors: Tensor
    """`[..., C]` quantized vectors, with the straight-through gradient to the input."""
    codes: Tensor
    """`[...]` int64 code indices in 0..K-1; of a residual quantizer `[..., D]`."""
    loss: Tensor
    """Weighted commitment loss, plus the weighted codebook loss if the codebook is learned by gradient; a scalar."""


class Quantizer(nn.Module):
    """Quantizes vectors with one code each; its config class has `codebook_size`, `code_dim` and `build()`."""

    def forward(self, vectors: Tensor) -> Quantized:
        """Quantize vectors `[..., C]`.

        Raises:
            ValueError: the last axis is not `code_dim`.
        """
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        """Look up codes `[...]` int64; returns their vectors `[..., C]`."""
        raise NotImplementedError


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest code of each vector by Euclidean distance.

    The V x K matrix is computed in chunks. Distances are float32 even under autocast, since bf16 has 8 bits of mantissa
    and turns neighbouring codes of a normalised codebook into ties.

    Args:
        vectors: `[V, C]`.
        codebook: `[K, C]`.

    Returns:
        `[V]` int64.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        vectors, codebook = vectors.float(), codebook.float()
        half_norms = codebook.square().sum(1) / 2  # [K]; argmin |v - c|^2 = argmax v.c - |c|^2 / 2
        rows = max(1, _CHUNK_ELEMENTS // codebook.shape[0])
        best = torch.empty(len(vectors), dtype=torch.long, device=vectors.device)
        # One buffer for all chunks: otherwise malloc may not reuse a freed chunk for the next one and keep them all.
        buffer = vectors.new_empty(min(rows, len(vectors)), len(codebook))
        for chunk, found in zip(vectors.split(rows), best.split(rows), strict=True):
            similarity = torch.addmm(-half_norms, chunk, codebook.T, out=buffer[: len(chunk)])
            torch.argmax(similarity, dim=1, out=found)
        return best


def _flattened(vectors: Tensor, code_dim: int) -> Tensor:
    """Flatten `[..., C]` to float32 `[V, C]`; raise ValueError if C is not `code_dim`."""
    if vectors.shape[-1] != code_dim:
        raise ValueError(f"vectors have {vectors.shape[-1]} channels; the codebook has code_dim={code_dim}")
    return vectors.reshape(-1, code_dim).float()


class VectorQuantizer(Quantizer):
    """Nearest-neighbour quantizer with one codebook.

    Source: VQ-VAE (arXiv 1711.00937) sections 3.1-3.2 and appendix A.1 (EMA); MUSE-VL section 3.1 (`L_vq`).
    """

    codebook: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
    initialised: Tensor

    def __init__(self, config: CodebookConfig, *, parts: tuple[int, ...] | None = None) -> None:
        """
        Args:
            config: size, channels and learning of the codebook.
            parts: numbers of channels of the parts of a code that are normalised separately; None means a single part.

        Raises:
            ValueError: the parts do not add up to the code's channels.
        """
        super().__init__()
        self.config = config
        self.parts = parts or (config.code_dim,)
        if sum(self.parts) != config.code_dim:
            raise ValueError(f"parts of {self.parts} channels do not add up to code_dim={config.code_dim}")
        weight = self._normalised(torch.randn(config.codebook_size, config.code_dim))
        if config.update == "gradient":
            self.codebook = nn.Parameter(weight)
        else:
            self.register_buffer("codebook", weight)
            self.register_buffer("ema_counts", torch.ones(config.codebook_size))
            self.register_buffer("ema_sums", weight.clone())
            self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def lookup(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self._normalised(self.codebook))

    def forward(self, vectors: Tensor) -> Quantized:
        """Quantize vectors `[..., C]`; in training mode an EMA codebook is also updated from the batch.

        Raises:
            ValueError: the last axis is not `code_dim`.
        """
        flat = self._normalised(_flattened(vectors, self.config.code_dim))  # [V, C]
        self.start(flat.detach())
        codes = self.nearest(flat.detach())  # [V]
        chosen = self.lookup(codes)  # [V, C]
        loss = self.config.commitment_weight * F.mse_loss(flat, chosen.detach())
        if self.config.update == "gradient":
            loss = loss + self.config.codebook_weight * F.mse_loss(chosen, flat.detach())
        self.learn(flat.detach(), codes)
        straight_through = flat + (chosen - flat).detach()
        return Quantized(straight_through.view_as(vectors), codes.view(vectors.shape[:-1]), loss)

    def nearest(self, flat: Tensor) -> Tensor:
        """Return the nearest codes, `[V]` int64, of vectors `[V, C]`, which are normalised if the codebook is."""
        return nearest_codes(flat, self._normalised(self.codebook).detach())

    @torch.no_grad()
    def start(self, flat: Tensor) -> None:
        """In training mode, initialise an EMA codebook with vectors `[V, C]` of the first batch.

        Most randomly initialised codes would never be the nearest to any vector.
        """
        if not self._learns_by_ema or bool(self.initialised):
            return
        self.codebook.copy_(self._draw(flat, self.config.codebook_size))
        self.ema_sums.copy_(self.codebook)
        self.ema_counts.fill_(1.0)
        self.initialised.fill_(True)

    @torch.no_grad()
    def learn(self, flat: Tensor, codes: Tensor) -> None:
        """In training mode, update the EMA statistics and codes from a batch, and restart dead codes.

        Args:
            flat: `[V, C]` vectors, or `[D, V, C]` for a codebook that several depths share.
            codes: `[V]` or `[D, V]` codes of the vectors.
        """
        if not self._learns_by_ema:
            return
        decay = self.config.ema_decay
        counts = torch.bincount(codes.flatten(), minlength=self.config.codebook_size).to(self.ema_counts.dtype)
        counts = sum_over_ranks(counts)
        sums = torch.zeros_like(self.ema_sums).index_add_(0, codes.flatten(), flat.flatten(0, -2))
        sums = sum_over_ranks(sums)
        self.ema_counts.lerp_(counts, 1 - decay)
        self.ema_sums.lerp_(sums, 1 - decay)
        dead = self.ema_counts < self.config.dead_threshold
        num_dead = int(dead.sum())
        if num_dead:
            self.ema_sums[dead] = self._draw(flat, num_dead)
            self.ema_counts[dead] = 1.0
        means = self._normalised(self.ema_sums / self.ema_counts.clamp_min(_FORGOTTEN)[:, None])
        # an unused code that is never restarted keeps its vector, instead of shrinking to zero with its statistics
        self.codebook.copy_(torch.where((self.ema_counts < _FORGOTTEN)[:, None], self.codebook, means))

    @property
    def _learns_by_ema(self) -> bool:
        return self.training and self.config.update == "ema"

    def _normalised(self, vectors: Tensor) -> Tensor:
        if not self.config.l2_normalised:
            return vectors
        return torch.cat([F.normalize(part, dim=-1) for part in vectors.split(self.parts, dim=-1)], dim=-1)

    def _draw(self, flat: Tensor, count: int) -> Tensor:
        """Sample `count` vectors of a batch `[..., V, C]` with a little noise, without repetitions if there are enough.

        The result is the same on every rank. With several ranks, V runs over the vectors of all of them in rank order,
        so the result equals that of one process with the whole batch and the generator of rank 0. Each rank contributes
        the vectors that it holds to an all-reduce, whose sum is exact because all other terms are zero.
        """
        depths = flat.reshape(-1, *flat.shape[-2:])  # [D, V, C]
        first, num_vectors = rows_of_ranks(depths.shape[1], flat.device)
        total = len(depths) * num_vectors
        picks = torch.randint(total, (count,), device=flat.device)
        if count <= total:
            picks = torch.randperm(total, device=flat.device)[:count]
        noise = 1e-3 * torch.randn(count, flat.shape[-1], device=flat.device)
        picks = take_from_first_rank(picks)
        depth, row = picks // num_vectors, picks % num_vectors - first
        mine = (row >= 0) & (row < depths.shape[1])
        drawn = torch.zeros_like(noise)
        drawn[mine] = depths[depth[mine], row[mine]]
        return self._normalised(sum_over_ranks(drawn + noise if is_first_rank() else drawn))


class ResidualQuantizer(nn.Module):
    """Residual quantizer: each depth quantizes the residual of the depths before it; a vector is the sum of its codes.

    Source: RQ-VAE (arXiv 2203.01941), section 3.1. Its commitment loss compares the vector with each partial sum of
    codes; here it is the mean over depths. If all depths share one codebook (RQ-VAE, DualToken), its EMA statistics are
    those of all depths together, updated once per batch.
    """

    def __init__(self, config: ResidualQuantizerConfig) -> None:
        super().__init__()
        self.config, self.depth, self.shared = config, config.depth, config.shared
        self.books = nn.ModuleList(VectorQuantizer(config) for _ in range(1 if config.shared else config.depth))

    @property
    def codebooks(self) -> Tensor:
        """Vectors of the codes: `[1, K, C]` if all depths share them, else `[D, K, C]`."""
        every = torch.arange(self.config.codebook_size, device=self.book(0).codebook.device)
        return torch.stack([self.book(depth).lookup(every) for depth in range(len(self.books))]).detach()

    def book(self, depth: int) -> VectorQuantizer:
        """Return the codebook of a depth, counted from 0."""
        book = self.books[0 if self.shared else depth]
        assert isinstance(book, VectorQuantizer)
        return book

    def lookup_depths(self, codes: Tensor) -> Tensor:
        """Look up codes `[..., D]` int64; returns the vector of each, `[..., D, C]`."""
        return torch.stack([self.book(depth).lookup(codes[..., depth]) for depth in range(self.depth)], dim=-2)

    def lookup(self, codes: Tensor) -> Tensor:
        """Look up codes `[..., D]` int64; returns the sums over depths, `[..., C]`."""
        return self.lookup_depths(codes).sum(-2)

    def forward(self, vectors: Tensor) -> Quantized:
        """Quantize vectors `[..., C]`; in training mode EMA codebooks are also updated from the batch.

        Raises:
            ValueError: the last axis is not `code_dim`.
        """
        flat = _flattened(vectors, self.config.code_dim)  # [V, C]
        left, total = flat.detach(), torch.zeros_like(flat)
        lefts: list[Tensor] = []
        picks: list[Tensor] = []
        loss = flat.new_zeros(())
        for depth in range(self.depth):
            book = self.book(depth)
            book.start(left)
            codes = book.nearest(left)  # [V]
            chosen = book.lookup(codes)  # [V, C]
            total = total + chosen
            loss = loss + self.config.commitment_weight * F.mse_loss(flat, total.detach())
            if self.config.update == "gradient":
                loss = loss + self.config.codebook_weight * F.mse_loss(total, flat.detach())
            lefts.append(left)
            picks.append(codes)
            left = left - chosen.detach()
        if self.shared:
            self.book(0).learn(torch.stack(lefts), torch.stack(picks))
        else:
            for depth in range(self.depth):
                self.book(depth).learn(lefts[depth], picks[depth])
        straight_through = flat + (total - flat).detach()
        codes = torch.stack(picks, dim=1)  # [V, D]
        return Quantized(
            straight_through.view_as(vectors), codes.view(*vectors.shape[:-1], self.depth), loss / self.depth
        )
