"""The kinds of image tokenizers with one code per position: MUSE-VL's, its ablations, VQGAN and TokenFlow.

Shape legend: B batch, H W pixels, h w code grid, C channels, K codebook size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.tokenizers.config import (
    OneCodeConfig,
    SdeConfig,
    SemanticConfig,
    TokenFlowConfig,
    VqganConfig,
)
from models.tokenizers.convolutional import ConvDecoder, ConvEncoder
from models.tokenizers.image_tokenizer import Codes, ImageEncoder, ImageTokenizer
from models.tokenizers.losses import SemanticLossConfig
from models.tokenizers.quantizers import Quantizer, VectorQuantizer
from models.tokenizers.transformer import SemanticDecoder


class OneCodeTokenizer(ImageTokenizer):
    """One codebook and one code per position, so that a language model can hold the codes in its vocabulary."""

    config: OneCodeConfig
    quantizer: Quantizer
    post_quant: nn.Linear
    semantic_decoder: SemanticDecoder

    def _before_quantization(self, images: Tensor, target: Tensor | None) -> Tensor:
        """Map images `[B, 3, H, W]` and the teacher's features `[B, h, w, C_teacher]` to vectors `[B, h, w, C]`."""
        raise NotImplementedError

    def _pixel_part(self, vectors: Tensor) -> Tensor:
        """Select the channels of quantized vectors `[B, h, w, C]` that the image decoder reads."""
        return vectors

    def _semantic_part(self, vectors: Tensor) -> Tensor:
        """Select the channels of quantized vectors `[B, h, w, C]` that the semantic decoder reads."""
        return vectors

    @property
    def code_shape(self) -> tuple[int, int, int, int]:
        return (1, 1, *self.grid)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (self.config.quantizer.codebook_size,)

    @property
    def codebooks(self) -> list[Tensor]:
        every = torch.arange(self.config.quantizer.codebook_size, device=self.post_quant.weight.device)
        return [self.quantizer.lookup(every).detach()[None]]

    def code_embeddings(self, codes: Tensor) -> Tensor:
        return self.quantizer.lookup(codes[:, 0, 0])

    def _quantize(self, images: Tensor, target: Tensor | None) -> Codes:
        quantized = self.quantizer(self._before_quantization(images, target))
        return Codes(quantized.vectors, quantized.codes[:, None, None], quantized.loss)

    def _to_latents(self, vectors: Tensor) -> Tensor:
        return self.post_quant(self._pixel_part(vectors))

    def _predict(self, vectors: Tensor) -> Tensor:
        if self.teacher is None:
            return super()._predict(vectors)
        return self.semantic_decoder(self._semantic_part(vectors))


class VqganTokenizer(OneCodeTokenizer):
    """The image branch alone: LlamaGen's VQ-16 (arXiv 2406.06525, section 2.1)."""

    config_class = VqganConfig
    config: VqganConfig
    book_names = ("pixel",)
    needs_teacher = False

    def _build(self) -> None:
        code_dim, latent = self.config.quantizer.code_dim, self.config.conv.latent_channels
        self.encoder = ConvEncoder(self.config.conv)
        self.decoder = ConvDecoder(self.config.conv)
        self.quantizer = self.config.quantizer.build()
        self.post_quant = nn.Linear(code_dim, latent)
        self.pre_quant = nn.Linear(latent, code_dim)

    def _before_quantization(self, images: Tensor, target: Tensor | None) -> Tensor:
        return self.pre_quant(self.encoder(images).permute(0, 2, 3, 1))


class SdeTokenizer(OneCodeTokenizer):
    """MUSE-VL's Semantic Discrete Encoding (section 3.1).

    `z = Enc(x)`, `z_q = Quant(T + z)` with `T` from a frozen teacher on the same grid. One decoder reconstructs the
    image from `z_q`, another predicts `T` from it. `z` and `T` are both normalised before the sum, since otherwise the
    larger one alone would determine the codes. Without `semantic_branch` it quantizes `z` and has no semantic decoder.
    """

    config_class = SdeConfig
    config: SdeConfig
    loss_class = SemanticLossConfig
    trains_tower = True
    book_names = ("semantic_discrete",)

    def _build(self) -> None:
        assert self.teacher is not None
        code_dim, dim = self.config.quantizer.code_dim, self.teacher.feature_dim
        latent = self.config.conv.latent_channels
        self.encoder = ImageEncoder(self.config, self.teacher)
        self.decoder = ConvDecoder(self.config.conv)
        self.quantizer = self.config.quantizer.build()
        self.post_quant = nn.Linear(code_dim, latent)
        self.to_teacher_dim = nn.Linear(self.encoder.width, dim)
        self.image_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.pre_quant = nn.Linear(dim, code_dim)
        if self.config.semantic_branch:
            self.semantic_decoder = SemanticDecoder(self.config.semantic_decoder, code_dim, dim, self.grid)

    @property
    def has_semantic_branch(self) -> bool:
        return self.config.semantic_branch

    def _before_quantization(self, images: Tensor, target: Tensor | None) -> Tensor:
        image_features = self.image_norm(self.to_teacher_dim(self.encoder(images)))
        if not self.config.semantic_branch:
            return self.pre_quant(image_features)
        assert target is not None
        return self.pre_quant(target + self.config.image_weight * image_features)

    def _predict(self, vectors: Tensor) -> Tensor:
        if not self.config.semantic_branch:
            raise ValueError("tokenizer.semantic_branch=false has no semantic branch")
        return super()._predict(vectors)


class SemanticTokenizer(OneCodeTokenizer):
    """The semantic branch alone, MUSE-VL's ablation: `z_q = Quant(T)`.

    The codes learn nothing from pixels. The image decoder is trained on detached codes, so that their content can be
    viewed and measured without affecting them.
    """

    config_class = SemanticConfig
    config: SemanticConfig
    loss_class = SemanticLossConfig
    book_names = ("semantic",)

    def _build(self) -> None:
        assert self.teacher is not None
        code_dim, dim = self.config.quantizer.code_dim, self.teacher.feature_dim
        self.decoder = ConvDecoder(self.config.conv)
        self.quantizer = self.config.quantizer.build()
        self.post_quant = nn.Linear(code_dim, self.config.conv.latent_channels)
        self.pre_quant = nn.Linear(dim, code_dim)
        self.semantic_decoder = SemanticDecoder(self.config.semantic_decoder, code_dim, dim, self.grid)

    def _before_quantization(self, images: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        return self.pre_quant(target)

    def _pixel_part(self, vectors: Tensor) -> Tensor:
        return vectors.detach()


class TokenFlowTokenizer(OneCodeTokenizer):
    """TokenFlow (arXiv 2412.03069): a semantic and a pixel table with one index, which minimises the summed distance.

    With both tables normalised, the sum of the two squared distances is the squared distance of the concatenated
    vectors, so it is implemented as one codebook whose two parts are normalised separately. The semantic encoder is the
    frozen teacher here.
    """

    config_class = TokenFlowConfig
    config: TokenFlowConfig
    loss_class = SemanticLossConfig
    trains_tower = True
    book_names = ("semantic_and_pixel",)

    def _build(self) -> None:
        assert self.teacher is not None
        pixel, latent = self.config.quantizer.code_dim, self.config.conv.latent_channels
        semantic, dim = self.config.semantic_code_dim, self.teacher.feature_dim
        self.encoder = ImageEncoder(self.config, self.teacher)
        self.decoder = ConvDecoder(self.config.conv)
        both = self.config.quantizer.model_copy(update={"code_dim": semantic + pixel})
        self.quantizer = VectorQuantizer(both, parts=(semantic, pixel))
        self.post_quant = nn.Linear(pixel, latent)
        self.pre_quant_semantic = nn.Linear(dim, semantic)
        self.pre_quant_pixel = nn.Linear(self.encoder.width, pixel)
        self.semantic_decoder = SemanticDecoder(self.config.semantic_decoder, semantic, dim, self.grid)

    def _before_quantization(self, images: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        pixel = self.pre_quant_pixel(self.encoder(images))
        return torch.cat([self.pre_quant_semantic(target), pixel], dim=-1)

    def _semantic_part(self, vectors: Tensor) -> Tensor:
        return vectors[..., : self.config.semantic_code_dim]

    def _pixel_part(self, vectors: Tensor) -> Tensor:
        return vectors[..., self.config.semantic_code_dim :]
