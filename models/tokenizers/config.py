"""Configuration of the image tokenizers: one class per kind, with the fields that this kind reads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import NonNegativeFloat, PositiveInt, Tag, model_validator

from models.config import Config, told_apart_by_kind
from models.tokenizers.convolutional import ConvConfig
from models.tokenizers.quantizers import ResidualQuantizerConfig, VectorQuantizerConfig
from models.tokenizers.transformer import SemanticDecoderConfig
from models.transforms import TransformConfig

QuantizerConfig = Annotated[
    Annotated[VectorQuantizerConfig, Tag("nearest")],  # a line for each kind of quantizer
    told_apart_by_kind("nearest"),
]
"""Quantizers with one code per vector; the config class of a kind builds its quantizer with `build()`."""


class TokenizerConfig(Config):
    """Fields of all kinds of tokenizers."""

    kind: str
    """The kind of tokenizer."""
    transform: TransformConfig = TransformConfig()
    """How images are transformed before encoding."""
    conv: ConvConfig = ConvConfig()
    """Convolutional image decoder, and the encoder of the kinds that have one."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        side = self.transform.image_size // self.conv.downsampling
        return side, side

    @model_validator(mode="after")
    def _check_size(self) -> TokenizerConfig:
        size, factor = self.transform.image_size, self.conv.downsampling
        if size % factor:
            raise ValueError(f"transform.image_size={size} is not a multiple of the downsampling {factor} of conv")
        return self


class OneCodeConfig(TokenizerConfig):
    """Fields of the kinds with one codebook and one code per position."""

    quantizer: QuantizerConfig = VectorQuantizerConfig()
    """The quantizer, with its codebook."""


class TeacherGridConfig(TokenizerConfig):
    """Fields of the kinds whose codes can lie on a grid of the teacher's features."""

    code_grid: PositiveInt | None = None
    """Rows and columns of codes if a tower encodes, 27 for SigLIP with patches of 14 at 384 pixels; the decoder's input
    is resized to the size that it needs. `null`: as many as the convolutional encoder has."""

    @property
    def encodes_by_teacher(self) -> bool:
        """Whether a tower encodes, so that `code_grid` applies, and not the convolutional encoder."""
        return True

    @property
    def grid(self) -> tuple[int, int]:
        if self.code_grid is None or not self.encodes_by_teacher:
            return super().grid
        return self.code_grid, self.code_grid


class SemanticCodeConfig(OneCodeConfig, TeacherGridConfig):
    """Fields of the kinds with one code per position that is also decoded to the teacher's features."""

    semantic_decoder: SemanticDecoderConfig = SemanticDecoderConfig()
    """Transformer that maps codes back to the teacher's features."""


class EncoderConfig(SemanticCodeConfig):
    """Fields of the kinds whose image encoder is a choice."""

    encoder: Literal["conv", "tower"] = "conv"
    """Image encoder: convolutional, or a trained copy of the teacher's image tower. MUSE-VL initialises its
    encoder from SigLIP."""

    @property
    def encodes_by_teacher(self) -> bool:
        return self.encoder == "tower"


class ResidualConfig(TeacherGridConfig):
    """Fields of the kinds with several codes per position, which a trained copy of the teacher's tower encodes."""

    residual: ResidualQuantizerConfig = ResidualQuantizerConfig()
    """Codebooks: one per book of `dualtoken`, the only one of `vila_u`."""


class VqganConfig(OneCodeConfig):
    """The image branch alone: LlamaGen's VQ-16."""

    kind: Literal["vqgan"] = "vqgan"
    """Selects this kind."""


class SdeConfig(EncoderConfig):
    """MUSE-VL's Semantic Discrete Encoding: the teacher's features are added before quantization (eq. 1-2)."""

    kind: Literal["sde"] = "sde"
    """Selects this kind."""
    semantic_branch: bool = True
    """`false`: the image branch alone, MUSE-VL's ablation; encoder and codebook stay the same."""
    image_weight: NonNegativeFloat = 1.0
    """Scale of the normalised image features `z` in `Quant(T + z)` (the paper does not publish a scale)."""


class SemanticConfig(SemanticCodeConfig):
    """The semantic branch alone, MUSE-VL's ablation."""

    kind: Literal["semantic"] = "semantic"
    """Selects this kind."""


class TokenFlowConfig(EncoderConfig):
    """TokenFlow: a semantic and a pixel table with a shared index."""

    kind: Literal["tokenflow"] = "tokenflow"
    """Selects this kind."""
    quantizer: VectorQuantizerConfig = VectorQuantizerConfig()
    """The pixel table."""
    semantic_code_dim: PositiveInt = 32
    """Channels of the semantic table."""

    @model_validator(mode="after")
    def _check_directions(self) -> TokenFlowConfig:
        if not self.quantizer.l2_normalised:
            raise ValueError("kind=tokenflow compares directions; set quantizer.l2_normalised=true")
        return self


class DualTokenConfig(ResidualConfig):
    """DualToken: residual codes of shallow and of deep features, each in its own book."""

    kind: Literal["dualtoken"] = "dualtoken"
    """Selects this kind."""
    pixel_layers: tuple[PositiveInt, ...] = (6, 4)
    """Layers of the tower, counted from 1, whose features are the pixel features. If empty, the semantic features are
    used, which is DualToken's ablation with both losses at the deep layer."""
    pixel_layer_weights: tuple[NonNegativeFloat, ...] = (1.0, 0.6)
    """Weight of each of `pixel_layers` in the sum of their features."""
    semantic_layer: PositiveInt | None = 26
    """Layer whose features are the semantic features, not normalised, so that the rest of the tower can process the
    decoded ones; `null`: the teacher's final features, standardised."""
    semantic_book: bool = True
    """`false`: no semantic book, DualToken's ablation with the reconstruction loss alone."""
    released_layout: bool = False
    """Whether details follow the released code instead of the paper, which the public weights need: causal attention
    after the quantizers, one more LayerNorm in each projection, and a first 1x1 convolution after the resizing of the
    grid."""

    @model_validator(mode="after")
    def _check_layers(self) -> DualTokenConfig:
        if len(self.pixel_layers) != len(self.pixel_layer_weights):
            raise ValueError(
                f"pixel_layers={list(self.pixel_layers)} and pixel_layer_weights={list(self.pixel_layer_weights)} "
                f"differ in length; give one weight per layer"
            )
        return self


class VilaUConfig(ResidualConfig):
    """VILA-U: residual codes of deep features, aligned with the captions."""

    kind: Literal["vila_u"] = "vila_u"
    """Selects this kind."""
    released_layout: bool = False
    """Whether details follow the released code instead of the paper: the features of `semantic_layer` are quantized at
    the tower's full width without a projection, and the rest of the tower pools the quantized ones."""
    semantic_layer: PositiveInt | None = None
    """Layer whose features are quantized with `released_layout`; the last layer but one in VILA-U's code."""

    @model_validator(mode="after")
    def _check_layout(self) -> VilaUConfig:
        if self.released_layout and self.semantic_layer is None:
            raise ValueError("released_layout quantizes the features of semantic_layer; give a layer, the last but one")
        return self
