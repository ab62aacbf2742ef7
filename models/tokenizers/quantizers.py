"""Vector quantization: nearest neighbour or residual, an EMA or a gradient codebook, restarts of dead codes.

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
"""Upper bound on the entries of the vectors x codes similarity matrix that exist at a time (16 MiB of float32)."""
_FORGOTTEN = 1e-6
"""A code whose running count is below this has no mean of its vectors any more: count and sum are all but zero."""


class QuantizerConfig(Config):
    """A codebook and how it learns."""

    codebook_size: PositiveInt = 32_768
    """Number of codes."""
    code_dim: PositiveInt = 8
    """Channels of a code."""
    l2_normalised: bool = True
    """Compare directions instead of positions (ViT-VQGAN; LlamaGen, table 'codebook')."""
    update: Literal["ema", "gradient"] = "ema"
    """`ema`: codes follow the mean of their vectors; `gradient`: codes learn from the codebook loss (VQ-VAE, eq. 3)."""
    ema_decay: Fraction = 0.99
    """Share of the running statistics kept at each step (`ema` only)."""
    dead_threshold: NonNegativeFloat = 0.05
    """A code whose running count falls below this is replaced by a vector of the batch (`ema` only); 0: never. The
    released code of RQ-VAE, which VILA-U and DualToken use: 1, so each code must be chosen once a batch on average."""
    commitment_weight: NonNegativeFloat = 0.25
    """Weight of the loss that pulls vectors to their codes (VQ-VAE, beta)."""
    codebook_weight: NonNegativeFloat = 1.0
    """Weight of the loss that pulls codes to their vectors (`gradient` only)."""


class ResidualQuantizerConfig(QuantizerConfig):
    """Residual codebooks: of `dualtoken` one for each book, of `vila_u` the only one."""

    codebook_size: PositiveInt = 16_384
    """Number of codes of a codebook."""
    code_dim: PositiveInt = 32
    """Channels of a code."""
    l2_normalised: bool = False
    """Must stay false: what is left over after a depth has no fixed length."""
    depth: PositiveInt = 8
    """Codes a vector: 8 for 27x27 codes, 4 for 16x16 (DualToken)."""
    shared: bool = True
    """One codebook for all depths in place of one a depth."""


class Quantized(NamedTuple):
    """Result of quantization."""

    vectors: Tensor
    """`[..., C]` codes in place of vectors; the gradient passes straight through to the input."""
    codes: Tensor
    """`[...]` int64 code indices in 0..K-1; `[..., D]` of a residual quantizer."""
    loss: Tensor
    """Scalar: weighted commitment loss, plus the weighted codebook loss where the codebook learns by gradient."""


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code of each vector by Euclidean distance.

    The V x K matrix never exists whole, and distances are float32 even under autocast: bf16 has 8 bits of mantissa
    and collapses neighbouring codes of a normalised codebook into ties.

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
        # One buffer for all chunks: malloc may not find the room that a chunk left for the next, and keep them all
        buffer = vectors.new_empty(min(rows, len(vectors)), len(codebook))
        for chunk, found in zip(vectors.split(rows), best.split(rows), strict=True):
            similarity = torch.addmm(-half_norms, chunk, codebook.T, out=buffer[: len(chunk)])
            torch.argmax(similarity, dim=1, out=found)
        return best


def _flattened(vectors: Tensor, code_dim: int) -> Tensor:
    """`[..., C]` to float32 `[V, C]`; raises ValueError where C is not `code_dim`."""
    if vectors.shape[-1] != code_dim:
        raise ValueError(f"vectors have {vectors.shape[-1]} channels; the codebook has code_dim={code_dim}")
    return vectors.reshape(-1, code_dim).float()


class VectorQuantizer(nn.Module):
    """Nearest-neighbour quantizer with one codebook.

    Source: VQ-VAE (arXiv 1711.00937) sections 3.1-3.2 and appendix A.1 (EMA); MUSE-VL section 3.1 (`L_vq`).
    """

    codebook: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
    initialised: Tensor

    def __init__(self, config: QuantizerConfig, *, parts: tuple[int, ...] | None = None) -> None:
        """
        Args:
            config: codebook size, channels, how it learns.
            parts: channels of parts of a code that are normalised each on its own; None is one part.

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
        """Codes `[...]` int64 to their vectors `[..., C]`."""
        return F.embedding(codes, self._normalised(self.codebook))

    def forward(self, vectors: Tensor) -> Quantized:
        """Quantize `[..., C]`; in training mode an EMA codebook also learns from the batch.

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
        """Vectors `[V, C]`, normalised if the codebook is, to the indices of their codes, `[V]` int64."""
        return nearest_codes(flat, self._normalised(self.codebook).detach())

    @torch.no_grad()
    def start(self, flat: Tensor) -> None:
        """In training, take an EMA codebook that saw no vectors yet from `[V, C]` vectors of the first batch.

        Codes drawn from noise would mostly never be the nearest.
        """
        if not self._learns_by_ema or bool(self.initialised):
            return
        self.codebook.copy_(self._draw(flat, self.config.codebook_size))
        self.ema_sums.copy_(self.codebook)
        self.ema_counts.fill_(1.0)
        self.initialised.fill_(True)

    @torch.no_grad()
    def learn(self, flat: Tensor, codes: Tensor) -> None:
        """In training, move an EMA codebook towards the vectors of its codes, and restart dead codes.

        Args:
            flat: `[V, C]`, or `[D, V, C]` of a codebook that several depths share.
            codes: `[V]` or `[D, V]`.
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
        # an idle code that is never restarted stays where it was, it does not shrink to nothing with its statistics
        self.codebook.copy_(torch.where((self.ema_counts < _FORGOTTEN)[:, None], self.codebook, means))

    @property
    def _learns_by_ema(self) -> bool:
        return self.training and self.config.update == "ema"

    def _normalised(self, vectors: Tensor) -> Tensor:
        if not self.config.l2_normalised:
            return vectors
        return torch.cat([F.normalize(part, dim=-1) for part in vectors.split(self.parts, dim=-1)], dim=-1)

    def _draw(self, flat: Tensor, count: int) -> Tensor:
        """`count` vectors of a batch `[..., V, C]` with a little noise, none twice while there are enough.

        The same on every rank. With several ranks V runs over the vectors of all of them in rank order, so the result
        is that of one process with the whole batch and the generator of rank 0. Each rank puts in the vectors that it
        has, and the sum is exact: all other terms are zero.
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
    """Each depth quantizes what the depths before it left over; a vector is the sum of its codes.

    Source: RQ-VAE (arXiv 2203.01941), section 3.1. Its commitment loss compares the vector with each partial sum of
    codes; here as the mean over depths. With one codebook for all depths (RQ-VAE, DualToken) EMA statistics are those
    of all depths together, taken once a batch.
    """

    def __init__(self, config: ResidualQuantizerConfig) -> None:
        """
        Raises:
            ValueError: the codes are normalised: unit vectors cannot hold what is left over.
        """
        super().__init__()
        if config.l2_normalised:
            raise ValueError("a residual quantizer needs l2_normalised=false: what is left over has no fixed length")
        self.config, self.depth, self.shared = config, config.depth, config.shared
        self.books = nn.ModuleList(VectorQuantizer(config) for _ in range(1 if config.shared else config.depth))

    @property
    def codebooks(self) -> Tensor:
        """`[1, K, C]` vectors of a codebook that all depths share, else `[D, K, C]`."""
        every = torch.arange(self.config.codebook_size, device=self.book(0).codebook.device)
        return torch.stack([self.book(depth).lookup(every) for depth in range(len(self.books))]).detach()

    def book(self, depth: int) -> VectorQuantizer:
        """The codebook of a depth, counted from 0."""
        book = self.books[0 if self.shared else depth]
        assert isinstance(book, VectorQuantizer)
        return book

    def lookup_depths(self, codes: Tensor) -> Tensor:
        """Codes `[..., D]` int64 to the vector of each, `[..., D, C]`."""
        return torch.stack([self.book(depth).lookup(codes[..., depth]) for depth in range(self.depth)], dim=-2)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes `[..., D]` int64 to the vectors that they add up to, `[..., C]`."""
        return self.lookup_depths(codes).sum(-2)

    def forward(self, vectors: Tensor) -> Quantized:
        """Quantize `[..., C]`; in training mode EMA codebooks also learn from the batch.

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
