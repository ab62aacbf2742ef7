"""Image tokenizers: images to discrete codes and back.

Shape legend: B batch, H W pixels, h w code grid, N books, D depth, C channels.
Codes are `[B, N, D, h, w]` for every kind, so that tables, sequences and reports need one layout.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from models.config import Config
from models.convolutional import ConvConfig, ConvDecoder, ConvEncoder
from models.quantizers import QuantizerConfig, VectorQuantizer
from models.teachers import Teacher
from models.transformer import SemanticDecoder, SemanticDecoderConfig
from models.transforms import TransformConfig


class TokenizerConfig(Config):
    """An image tokenizer with one code a position."""

    kind: Literal["sde", "vqgan", "semantic", "tokenflow"] = "sde"
    """`sde`: the teacher's features are added before quantization (MUSE-VL, eq. 1-2); `vqgan`: image branch only;
    `semantic`: semantic branch only (MUSE-VL's ablation); `tokenflow`: a semantic and a pixel table under one index."""
    transform: TransformConfig = TransformConfig()
    """How images are shaped before encoding."""
    conv: ConvConfig = ConvConfig()
    """Image encoder and decoder."""
    quantizer: QuantizerConfig = QuantizerConfig()
    """Codebook; of `tokenflow` the pixel table."""
    semantic_code_dim: PositiveInt = 32
    """Channels of the semantic table (`tokenflow` only)."""
    semantic_decoder: SemanticDecoderConfig = SemanticDecoderConfig()
    """Maps codes back to the teacher's features (all kinds but `vqgan`)."""
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
    """What all kinds share: a quantizer, a convolutional decoder and, with a teacher, a semantic decoder.

    A kind says what is quantized, and which channels of a code each decoder reads.
    """

    book_name: ClassVar[str]
    needs_teacher: ClassVar[bool] = True
    teacher: Teacher | None
    decoder: ConvDecoder
    quantizer: VectorQuantizer
    post_quant: nn.Linear
    semantic_decoder: SemanticDecoder

    def __init__(self, config: TokenizerConfig, teacher: Teacher | None = None) -> None:
        """
        Args:
            config: what to build.
            teacher: frozen; it is held without being registered, so its weights are neither saved nor trained here.
                Kinds without a semantic branch ignore it.

        Raises:
            ValueError: a teacher is missing, or the image size is one that the encoder cannot divide.
        """
        super().__init__()
        size, factor = config.transform.image_size, config.conv.downsampling
        if size % factor:
            raise ValueError(
                f"tokenizer.transform.image_size={size} is not a multiple of the encoder's downsampling {factor}"
            )
        if self.needs_teacher and teacher is None:
            raise ValueError(f"tokenizer.kind={config.kind} needs a teacher; give one, or use kind=vqgan")
        self.config = config
        self.grid = config.grid
        self.__dict__["teacher"] = teacher if self.needs_teacher else None
        self._build()

    def _build(self) -> None:
        raise NotImplementedError

    def _before_quantization(self, images: Tensor, target: Tensor | None) -> Tensor:
        """Images `[B, 3, H, W]` and the teacher's features `[B, h, w, C_teacher]` -> `[B, h, w, C]`."""
        raise NotImplementedError

    def _pixel_part(self, vectors: Tensor) -> Tensor:
        """What the image decoder reads of `[B, h, w, C]` codes."""
        return vectors

    def _semantic_part(self, vectors: Tensor) -> Tensor:
        """What the semantic decoder reads of `[B, h, w, C]` codes."""
        return vectors

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
        return (self.book_name,)

    @property
    def codebook(self) -> Tensor:
        """`[K, C]` vectors of the codes, as `code_embeddings` returns them."""
        return self.quantizer.lookup(torch.arange(self.config.quantizer.codebook_size)).detach()

    def forward(self, images: Tensor, teacher_features: Tensor | None = None) -> TokenizerOutput:
        """Encode, quantize and decode `[B, 3, H, W]` images in [-1, 1].

        Args:
            images: the batch.
            teacher_features: `[B, h, w, C]` when the caller has them already; computed here otherwise. Kinds without a
                semantic branch ignore them.
        """
        target = self._teacher_features(images, teacher_features)
        quantized = self.quantizer(self._before_quantization(images, target))
        reconstruction = self._draw(quantized.vectors)
        prediction = self.semantic_decoder(self._semantic_part(quantized.vectors)) if target is not None else None
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
        """Codes `[B, N, D, h, w]` -> the teacher features that they stand for, `[B, h, w, C_teacher]`.

        Raises:
            ValueError: this kind has no semantic branch.
        """
        if self.teacher is None:
            raise ValueError(f"tokenizer kind {self.config.kind!r} has no semantic branch")
        return self.semantic_decoder(self._semantic_part(self.code_embeddings(codes)))

    def _teacher_features(self, images: Tensor, known: Tensor | None = None) -> Tensor | None:
        if self.teacher is None:
            return None
        return self.teacher.features(images, self.grid).detach() if known is None else known

    def _draw(self, vectors: Tensor) -> Tensor:
        return self.decoder(self.post_quant(self._pixel_part(vectors)).permute(0, 3, 1, 2))


class VqganTokenizer(ImageTokenizer):
    """The image branch alone: LlamaGen's VQ-16 (arXiv 2406.06525, section 2.1)."""

    book_name = "pixel"
    needs_teacher = False

    def _build(self) -> None:
        code_dim, latent = self.config.quantizer.code_dim, self.config.conv.latent_channels
        self.encoder = ConvEncoder(self.config.conv)
        self.decoder = ConvDecoder(self.config.conv)
        self.quantizer = VectorQuantizer(self.config.quantizer)
        self.post_quant = nn.Linear(code_dim, latent)
        self.pre_quant = nn.Linear(latent, code_dim)

    def _before_quantization(self, images: Tensor, target: Tensor | None) -> Tensor:
        return self.pre_quant(self.encoder(images).permute(0, 2, 3, 1))


class SdeTokenizer(ImageTokenizer):
    """MUSE-VL's Semantic Discrete Encoding (section 3.1).

    `z = Enc(x)`, `z_q = Quant(T + z)` with `T` from a frozen teacher on the same grid; one decoder draws the image from
    `z_q`, another predicts `T` from it. `z` and `T` are both normalised before the sum: without that the larger one
    decides the codes alone.
    """

    book_name = "semantic_discrete"

    def _build(self) -> None:
        assert self.teacher is not None
        code_dim, dim = self.config.quantizer.code_dim, self.teacher.feature_dim
        latent = self.config.conv.latent_channels
        self.encoder = ConvEncoder(self.config.conv)
        self.decoder = ConvDecoder(self.config.conv)
        self.quantizer = VectorQuantizer(self.config.quantizer)
        self.post_quant = nn.Linear(code_dim, latent)
        self.to_teacher_dim = nn.Linear(latent, dim)
        self.image_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.pre_quant = nn.Linear(dim, code_dim)
        self.semantic_decoder = SemanticDecoder(self.config.semantic_decoder, code_dim, dim, self.grid)

    def _before_quantization(self, images: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        image_features = self.image_norm(self.to_teacher_dim(self.encoder(images).permute(0, 2, 3, 1)))
        return self.pre_quant(target + self.config.image_weight * image_features)


class SemanticTokenizer(ImageTokenizer):
    """The semantic branch alone, MUSE-VL's ablation: `z_q = Quant(T)`.

    The codes learn nothing from pixels. The image decoder is trained on detached codes, so that what they hold can be
    looked at and measured; it changes nothing about them.
    """

    book_name = "semantic"

    def _build(self) -> None:
        assert self.teacher is not None
        code_dim, dim = self.config.quantizer.code_dim, self.teacher.feature_dim
        self.decoder = ConvDecoder(self.config.conv)
        self.quantizer = VectorQuantizer(self.config.quantizer)
        self.post_quant = nn.Linear(code_dim, self.config.conv.latent_channels)
        self.pre_quant = nn.Linear(dim, code_dim)
        self.semantic_decoder = SemanticDecoder(self.config.semantic_decoder, code_dim, dim, self.grid)

    def _before_quantization(self, images: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        return self.pre_quant(target)

    def _pixel_part(self, vectors: Tensor) -> Tensor:
        return vectors.detach()


class TokenFlowTokenizer(ImageTokenizer):
    """TokenFlow (arXiv 2412.03069): a semantic and a pixel table with one index, the one whose distances add up least.

    With both tables normalised, the sum of the two squared distances is the squared distance of the concatenations, so
    one codebook whose two parts are normalised apart does it. The semantic encoder is the frozen teacher here.
    """

    book_name = "semantic_and_pixel"

    def _build(self) -> None:
        assert self.teacher is not None
        if not self.config.quantizer.l2_normalised:
            raise ValueError("tokenizer.kind=tokenflow compares directions; set tokenizer.quantizer.l2_normalised=true")
        pixel, latent = self.config.quantizer.code_dim, self.config.conv.latent_channels
        semantic, dim = self.config.semantic_code_dim, self.teacher.feature_dim
        self.encoder = ConvEncoder(self.config.conv)
        self.decoder = ConvDecoder(self.config.conv)
        both = self.config.quantizer.model_copy(update={"code_dim": semantic + pixel})
        self.quantizer = VectorQuantizer(both, parts=(semantic, pixel))
        self.post_quant = nn.Linear(pixel, latent)
        self.pre_quant_semantic = nn.Linear(dim, semantic)
        self.pre_quant_pixel = nn.Linear(latent, pixel)
        self.semantic_decoder = SemanticDecoder(self.config.semantic_decoder, semantic, dim, self.grid)

    def _before_quantization(self, images: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        pixel = self.pre_quant_pixel(self.encoder(images).permute(0, 2, 3, 1))
        return torch.cat([self.pre_quant_semantic(target), pixel], dim=-1)

    def _semantic_part(self, vectors: Tensor) -> Tensor:
        return vectors[..., : self.config.semantic_code_dim]

    def _pixel_part(self, vectors: Tensor) -> Tensor:
        return vectors[..., self.config.semantic_code_dim :]


KINDS: dict[str, type[ImageTokenizer]] = {
    "sde": SdeTokenizer,
    "vqgan": VqganTokenizer,
    "semantic": SemanticTokenizer,
    "tokenflow": TokenFlowTokenizer,
}
"""The class of each `TokenizerConfig.kind`."""


def build_tokenizer(config: TokenizerConfig, teacher: Teacher | None = None) -> ImageTokenizer:
    """The tokenizer of a config; arguments and errors as `ImageTokenizer`."""
    return KINDS[config.kind](config, teacher)


def semantic_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean cosine similarity over positions of two feature grids `[B, h, w, C]`; scalar."""
    return F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()
