"""The interface of all image tokenizers, which map images to discrete codes and back, and their configuration.

Shape legend: B batch, H W pixels, h w code grid, N books, D depth, C channels, K codebook size, E channels of the
image-text space. Codes are `[B, N, D, h, w]` for every kind, so that tables, sequences and reports need one layout.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from models.config import Config
from models.teachers.teacher import Teacher
from models.tokenizers.convolutional import ConvConfig, ConvDecoder, ConvEncoder
from models.tokenizers.quantizers import QuantizerConfig, ResidualQuantizerConfig
from models.tokenizers.transformer import SemanticDecoderConfig
from models.transforms import TransformConfig

Kind = Literal["sde", "vqgan", "semantic", "tokenflow", "dualtoken", "vila_u", "external"]


class TokenizerConfig(Config):
    """An image tokenizer: its kind, its encoder and decoder, and its quantizer."""

    kind: Kind = "sde"
    """`sde`: the teacher's features are added before quantization (MUSE-VL, eq. 1-2); `vqgan`: image branch only;
    `semantic`: semantic branch only (MUSE-VL's ablation); `tokenflow`: a semantic and a pixel table with a shared
    index; `dualtoken`: residual codes of shallow and of deep features, each in its own book; `vila_u`: residual codes
    of deep features, aligned with the captions; `external`: codes of a tokenizer outside this project, given as
    `codes`."""
    transform: TransformConfig = TransformConfig()
    """How images are transformed before encoding."""
    conv: ConvConfig = ConvConfig()
    """Convolutional image encoder and decoder."""
    encoder: Literal["conv", "tower"] = "conv"
    """Image encoder of `sde` and `tokenflow`: convolutional, or a trained copy of the teacher's image tower. MUSE-VL
    initialises its encoder from SigLIP. `dualtoken` and `vila_u` always use the tower."""
    code_grid: PositiveInt | None = None
    """Rows and columns of codes if a tower encodes, 27 for SigLIP with patches of 14 at 384 pixels; the decoder's input
    is resized to the size that it needs. `null`: as many as the convolutional encoder has."""
    quantizer: QuantizerConfig = QuantizerConfig()
    """Codebook; for `tokenflow` the pixel table."""
    residual: ResidualQuantizerConfig = ResidualQuantizerConfig()
    """Codebooks of `dualtoken` and `vila_u`."""
    pixel_layers: tuple[PositiveInt, ...] = (6, 4)
    """Layers of the tower, counted from 1, whose features are `dualtoken`'s pixel features. If empty, its semantic
    features are used, which is DualToken's ablation with both losses at the deep layer."""
    pixel_layer_weights: tuple[NonNegativeFloat, ...] = (1.0, 0.6)
    """Weight of each of `pixel_layers` in the sum of their features."""
    semantic_layer: PositiveInt | None = 26
    """Layer whose features are `dualtoken`'s semantic features, not normalised, so that the rest of the tower can
    process the decoded ones; `null`: the teacher's final features, standardised. For `vila_u` with `released_layout`,
    the layer whose features are quantized."""
    semantic_branch: bool = True
    """`false`: `sde` with the image branch alone, MUSE-VL's ablation; encoder and codebook stay the same."""
    semantic_book: bool = True
    """`false`: `dualtoken` without its semantic book, DualToken's ablation with the reconstruction loss alone."""
    released_layout: bool = False
    """Whether details follow the released code instead of the paper. `dualtoken`, whose public weights need it: causal
    attention after the quantizers, one more LayerNorm in each projection, and a first 1x1 convolution after the
    resizing of the grid. `vila_u`: the features of `semantic_layer` (the last layer but one in its code) are quantized
    at the tower's full width without a projection, and the rest of the tower pools the quantized ones."""
    semantic_code_dim: PositiveInt = 32
    """Channels of the semantic table (`tokenflow` only)."""
    semantic_decoder: SemanticDecoderConfig = SemanticDecoderConfig()
    """Transformer that maps codes back to the teacher's features (`sde`, `semantic` and `tokenflow`)."""
    image_weight: NonNegativeFloat = 1.0
    """Scale of the normalised image features `z` in `Quant(T + z)` (`sde` only; the paper does not publish a scale)."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        if self.code_grid is not None and (self.encoder == "tower" or self.kind in ("dualtoken", "vila_u", "semantic")):
            return self.code_grid, self.code_grid
        side = self.transform.image_size // self.conv.downsampling
        return side, side


class TokenizerOutput(NamedTuple):
    """Result of a forward pass in training."""

    reconstruction: Tensor
    """`[B, 3, H, W]` reconstructed images, about [-1, 1]."""
    codes: Tensor
    """`[B, N, D, h, w]` int64 codes."""
    quantizer_loss: Tensor
    """Sum of the commitment and codebook losses with their weights, a scalar."""
    semantic_target: Tensor | None
    """Features `[B, h, w, C]` of the frozen teacher, or None without a semantic branch."""
    semantic_prediction: Tensor | None
    """Features decoded from the codes, in the shape of `semantic_target`."""
    image_embedding: Tensor | None = None
    """Unit vectors `[B, E]` in the teacher's image-text space, for kinds that are aligned with captions."""


class Codes(NamedTuple):
    """Result of quantizing a batch."""

    vectors: Tensor
    """`[B, h, w, C]` quantized vectors, concatenated over books, with the straight-through gradient."""
    codes: Tensor
    """`[B, N, D, h, w]` int64 codes."""
    loss: Tensor
    """Sum of the commitment and codebook losses with their weights, a scalar."""


class ImageTokenizer(nn.Module):
    """Base class of all kinds: a convolutional decoder and, with a teacher, a prediction of the teacher's features.

    A subclass defines what is quantized and how, and which channels of a code each decoder reads.
    """

    book_names: tuple[str, ...]
    """Name of each codebook, for metrics and reports."""
    needs_teacher: ClassVar[bool] = True
    """Whether the tokenizer cannot be built without a teacher."""
    quantizes_target: ClassVar[bool] = True
    """Whether encoding needs the frozen teacher's features; otherwise the codes only learn to predict them."""
    teacher: Teacher | None
    decoder: ConvDecoder
    logit_scale: Tensor
    """Logarithm of the contrastive loss's inverse temperature, for kinds that are aligned with captions."""

    def __init__(self, config: TokenizerConfig, teacher: Teacher | None = None) -> None:
        """
        Args:
            config: configuration of the tokenizer.
            teacher: the frozen teacher. It is not registered as a submodule, so its weights are neither saved nor
                trained with the tokenizer. Kinds that need none ignore it.

        Raises:
            ValueError: a teacher is missing, or the image size is not a multiple of the encoder's downsampling.
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

    def _quantize(self, images: Tensor, target: Tensor | None) -> Codes:
        """Encode and quantize images `[B, 3, H, W]` with the teacher's features `[B, h, w, C_teacher]`."""
        raise NotImplementedError

    def _to_latents(self, vectors: Tensor) -> Tensor:
        """Map quantized vectors `[B, h, w, C]` to the image decoder's input, `[B, h, w, latent_channels]`."""
        raise NotImplementedError

    def _predict(self, vectors: Tensor) -> Tensor:
        """Predict the teacher's features `[B, h, w, C_teacher]` from quantized vectors `[B, h, w, C]`."""
        raise ValueError(f"tokenizer kind {self.config.kind!r} has no semantic branch")

    def _embed(self, vectors: Tensor) -> Tensor | None:
        """Map quantized vectors `[B, h, w, C]` to unit image embeddings `[B, E]`, or to None if the kind has none."""
        return None

    @property
    def code_shape(self) -> tuple[int, int, int, int]:
        """Shape of one image's codes, `(N, D, h, w)`."""
        raise NotImplementedError

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each book."""
        raise NotImplementedError

    @property
    def codebooks(self) -> list[Tensor]:
        """Vectors of the codes of each book: `[1, K, C]` if all depths share them, else `[D, K, C]`."""
        raise NotImplementedError

    def code_embeddings(self, codes: Tensor) -> Tensor:
        """Look up codes `[B, N, D, h, w]`; returns the decoders' input `[B, h, w, C]`, concatenated over books."""
        raise NotImplementedError

    def forward(self, images: Tensor, teacher_features: Tensor | None = None) -> TokenizerOutput:
        """Encode, quantize and decode `[B, 3, H, W]` images in [-1, 1].

        Args:
            images: the batch.
            teacher_features: `[B, h, w, C]` as returned by `target_features`, if the caller has them already; otherwise
                they are computed here. Kinds without a semantic branch ignore them.
        """
        target = self.target_features(images) if teacher_features is None else teacher_features
        if not self.has_semantic_branch:
            target = None
        quantized = self._quantize(images, target)
        prediction = self._predict(quantized.vectors) if target is not None else None
        return TokenizerOutput(
            self._draw(quantized.vectors),
            quantized.codes,
            quantized.loss,
            target,
            prediction,
            self._embed(quantized.vectors),
        )

    def encode(self, images: Tensor) -> Tensor:
        """Encode images `[B, 3, H, W]` in [-1, 1] as codes `[B, N, D, h, w]` int64. Call it in eval mode."""
        return self._quantize(images, self.target_features(images) if self.quantizes_target else None).codes

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `[B, N, D, h, w]` to images `[B, 3, H, W]` in [-1, 1]."""
        return self._draw(self.code_embeddings(codes)).clamp(-1, 1)

    def semantic_features(self, codes: Tensor) -> Tensor:
        """Decode codes `[B, N, D, h, w]` to predicted teacher features `[B, h, w, C_teacher]`.

        Raises:
            ValueError: this kind has no semantic branch.
        """
        return self._predict(self.code_embeddings(codes))

    def pooled_prediction(self, features: Tensor) -> Tensor:
        """Pool predicted features `[B, h, w, C_teacher]` with the teacher's pooling; `[B, E]`, not normalised.

        Raises:
            ValueError: the kind has no semantic branch, or the teacher cannot pool (`Teacher.pools_features`).
        """
        return self.pooled_target(features)

    def pooled_target(self, features: Tensor) -> Tensor:
        """Pool the teacher's own features `[B, h, w, C_teacher]` to `[B, E]`; errors as for `pooled_prediction`."""
        if self.teacher is None or not self.has_semantic_branch:
            raise ValueError(f"tokenizer kind {self.config.kind!r} has no semantic branch to pool")
        return self.teacher.pool(features)

    @property
    def embeds_codes(self) -> bool:
        """Whether `embed_codes` works."""
        return self.has_semantic_branch and self.teacher is not None and self.teacher.pools_from(None)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Embed codes `[B, N, D, h, w]` as unit vectors `[B, E]` in the teacher's image-text space.

        Raises:
            ValueError: as for `pooled_prediction`.
        """
        return F.normalize(self.pooled_prediction(self.semantic_features(codes)), dim=-1)

    @property
    def has_semantic_branch(self) -> bool:
        """Whether the tokenizer predicts the teacher's features, so that `semantic_features` works."""
        return self.teacher is not None

    def target_features(self, images: Tensor) -> Tensor | None:
        """Return the teacher's features `[B, h, w, C_teacher]` of images, or None without a semantic branch."""
        if self.teacher is None or not self.has_semantic_branch:
            return None
        return self.teacher.features(images, self.grid).detach()

    def _draw(self, vectors: Tensor) -> Tensor:
        return self.decoder(self._sized_for_decoder(self._to_latents(vectors).permute(0, 3, 1, 2)))

    def _sized_for_decoder(self, latents: Tensor) -> Tensor:
        """Resize latents `[B, C, h, w]` to the grid that the image decoder upsamples to the image size."""
        side = self.config.transform.image_size // self.config.conv.downsampling
        if latents.shape[-1] == side:
            return latents
        return F.interpolate(latents, size=(side, side), mode="bilinear", align_corners=False)


class ImageEncoder(nn.Module):
    """The image encoder that a config selects; maps images `[B, 3, H, W]` to features `[B, h, w, width]`."""

    def __init__(self, config: TokenizerConfig, teacher: Teacher | None) -> None:
        super().__init__()
        self.grid = config.grid
        self.conv = ConvEncoder(config.conv) if config.encoder == "conv" else None
        self.tower = teacher.image_tower() if config.encoder == "tower" and teacher is not None else None
        self.width = config.conv.latent_channels if self.tower is None else self.tower.feature_dim

    def forward(self, images: Tensor) -> Tensor:
        if self.tower is not None:
            return self.tower.features(images, self.grid)
        assert self.conv is not None
        return self.conv(images).permute(0, 2, 3, 1)


def semantic_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean cosine similarity over the positions of two feature grids `[B, h, w, C]`, a scalar."""
    return F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()
