"""Image tokenizers: images to discrete codes and back.

Shape legend: B batch, H W pixels, h w code grid, N books, D depth, C channels.
Codes are `[B, N, D, h, w]` for every kind, so that tables, sequences and reports need one layout.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from models.config import Config
from models.convolutional import ConvConfig, ConvDecoder, ConvEncoder
from models.quantizers import QuantizerConfig, VectorQuantizer
from models.teachers import Teacher
from models.transformer import SemanticDecoder, SemanticDecoderConfig
from models.transforms import TransformConfig


class TokenizerConfig(Config):
    """An image tokenizer with one codebook."""

    kind: Literal["sde", "vqgan"] = "sde"
    """`sde`: the teacher's features are added before quantization (MUSE-VL, eq. 1-2); `vqgan`: image branch only."""
    transform: TransformConfig = TransformConfig()
    """How images are shaped before encoding."""
    conv: ConvConfig = ConvConfig()
    """Image encoder and decoder."""
    quantizer: QuantizerConfig = QuantizerConfig()
    """Codebook."""
    semantic_decoder: SemanticDecoderConfig = SemanticDecoderConfig()
    """Maps codes back to the teacher's features (`sde` only)."""
    image_weight: NonNegativeFloat = 1.0
    """Scale of the normalised image features `z` in `Quant(T + z)` (`sde` only; the paper does not publish a scale)."""

    @property
    def grid(self) -> tuple[int, int]:
        """Code rows and columns."""
        side = self.transform.image_size // self.conv.downsampling
        return side, side


class TokenizerOutput(NamedTuple):
    """One training forward pass."""

    reconstruction: Tensor
    """`[B, 3, H, W]`, about [-1, 1]."""
    codes: Tensor
    """`[B, N, D, h, w]` int64."""
    quantizer_loss: Tensor
    """Scalar, already weighted."""
    semantic_target: Tensor | None
    """Teacher features `[B, h, w, C]`, or None without a semantic branch."""
    semantic_prediction: Tensor | None
    """Same shape: the features decoded from the codes."""


class ImageTokenizer(nn.Module):
    """VQGAN, and MUSE-VL's Semantic Discrete Encoding on top of it.

    SDE (MUSE-VL, section 3.1): `z = Enc(x)`, `z_q = Quant(T + z)` with `T` from a frozen teacher on the same grid; one
    decoder draws the image from `z_q`, another predicts `T` from it. `z` and `T` are both normalised before the sum:
    without that the larger one decides the codes alone.
    """

    def __init__(self, config: TokenizerConfig, teacher: Teacher | None = None) -> None:
        """
        Args:
            config: what to build.
            teacher: frozen; it is held without being registered, so its weights are neither saved nor trained here.

        Raises:
            ValueError: `sde` without a teacher, or an image size that the encoder cannot divide.
        """
        super().__init__()
        size, factor = config.transform.image_size, config.conv.downsampling
        if size % factor:
            raise ValueError(
                f"tokenizer.transform.image_size={size} is not a multiple of the encoder's downsampling {factor}"
            )
        if config.kind == "sde" and teacher is None:
            raise ValueError("tokenizer.kind=sde needs a teacher; give one, or use kind=vqgan")
        self.config = config
        self.grid = config.grid
        self.__dict__["teacher"] = teacher if config.kind == "sde" else None
        code_dim, latent = config.quantizer.code_dim, config.conv.latent_channels
        self.encoder = ConvEncoder(config.conv)
        self.decoder = ConvDecoder(config.conv)
        self.quantizer = VectorQuantizer(config.quantizer)
        self.post_quant = nn.Linear(code_dim, latent)
        if self.teacher is not None:
            dim = self.teacher.feature_dim
            self.to_teacher_dim = nn.Linear(latent, dim)
            self.image_norm = nn.LayerNorm(dim, elementwise_affine=False)
            self.pre_quant = nn.Linear(dim, code_dim)
            self.semantic_decoder = SemanticDecoder(config.semantic_decoder, code_dim, dim, self.grid)
        else:
            self.pre_quant = nn.Linear(latent, code_dim)

    teacher: Teacher | None

    @property
    def code_shape(self) -> tuple[int, int, int, int]:
        """`(N, D, h, w)`."""
        return (1, 1, *self.grid)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each book."""
        return (self.config.quantizer.codebook_size,)

    @property
    def codebook_names(self) -> tuple[str, ...]:
        """Name of each book."""
        return ("semantic_discrete" if self.teacher is not None else "pixel",)

    @property
    def codebook(self) -> Tensor:
        """`[K, C]` vectors of the codes, as `code_embeddings` returns them."""
        return self.quantizer.lookup(torch.arange(self.config.quantizer.codebook_size)).detach()

    def forward(self, images: Tensor, teacher_features: Tensor | None = None) -> TokenizerOutput:
        """Encode, quantize and decode `[B, 3, H, W]` images in [-1, 1].

        Args:
            images: the batch.
            teacher_features: `[B, h, w, C]` when the caller has them already; computed here otherwise.
        """
        target = self._teacher_features(images) if teacher_features is None else teacher_features
        quantized = self.quantizer(self._before_quantization(images, target))
        reconstruction = self._draw(quantized.vectors)
        prediction = self.semantic_decoder(quantized.vectors) if target is not None else None
        return TokenizerOutput(reconstruction, quantized.codes[:, None, None], quantized.loss, target, prediction)

    def encode(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> codes `[B, N, D, h, w]` int64. Call it in eval mode."""
        return self.quantizer(self._before_quantization(images, self._teacher_features(images))).codes[:, None, None]

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[B, N, D, h, w]` -> images `[B, 3, H, W]` in [-1, 1]."""
        return self._draw(self.code_embeddings(codes)).clamp(-1, 1)

    def code_embeddings(self, codes: Tensor) -> Tensor:
        """Codes `[B, N, D, h, w]` -> vectors `[B, h, w, C]` before the decoder's projection."""
        return self.quantizer.lookup(codes[:, 0, 0])

    def semantic_features(self, codes: Tensor) -> Tensor:
        """Codes `[B, N, D, h, w]` -> the teacher features that they stand for, `[B, h, w, C]`.

        Raises:
            ValueError: this kind has no semantic branch.
        """
        if self.teacher is None:
            raise ValueError(f"tokenizer kind {self.config.kind!r} has no semantic branch")
        return self.semantic_decoder(self.code_embeddings(codes))

    def _teacher_features(self, images: Tensor) -> Tensor | None:
        return self.teacher.features(images, self.grid).detach() if self.teacher is not None else None

    def _before_quantization(self, images: Tensor, target: Tensor | None) -> Tensor:
        """`[B, h, w, code_dim]`."""
        latents = self.encoder(images).permute(0, 2, 3, 1)  # [B, h, w, latent_channels]
        if target is None:
            return self.pre_quant(latents)
        image_features = self.image_norm(self.to_teacher_dim(latents))
        return self.pre_quant(target + self.config.image_weight * image_features)

    def _draw(self, vectors: Tensor) -> Tensor:
        return self.decoder(self.post_quant(vectors).permute(0, 3, 1, 2))


def semantic_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean cosine similarity over positions of two feature grids `[B, h, w, C]`; scalar."""
    return F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()
