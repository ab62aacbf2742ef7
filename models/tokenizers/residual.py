"""The kinds of image tokenizers with several codes per position: DualToken and VILA-U.

Both encode with a trained copy of the teacher's image tower. Shape legend: B batch, H W pixels, h w code grid, C
channels, E channels of the image-text space, N books, D depth.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.teachers.teacher import Teacher
from models.tokenizers.config import DualTokenConfig, ResidualConfig, VilaUConfig
from models.tokenizers.convolutional import ConvDecoder, ResidualBlock
from models.tokenizers.image_tokenizer import Codes, ImageTokenizer
from models.tokenizers.losses import ContrastiveLossConfig, SemanticLossConfig
from models.tokenizers.quantizers import ResidualQuantizer
from models.tokenizers.transformer import AttentionProjection


class ResidualTokenizer(ImageTokenizer):
    """Residual books with one quantizer each; vectors are concatenated over books in the order of `book_names`."""

    config: ResidualConfig
    trains_tower = True
    quantizes_target = False  # they quantize features of their own trained tower
    quantizers: nn.ModuleList

    @property
    def code_shape(self) -> tuple[int, int, int, int]:
        return (len(self.book_names), self.config.residual.depth, *self.grid)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (self.config.residual.codebook_size,) * len(self.book_names)

    @property
    def codebooks(self) -> list[Tensor]:
        return [self.book(number).codebooks for number in range(len(self.book_names))]

    def book(self, number: int) -> ResidualQuantizer:
        """Return the quantizer of a book."""
        quantizer = self.quantizers[number]
        assert isinstance(quantizer, ResidualQuantizer)
        return quantizer

    def code_embeddings(self, codes: Tensor) -> Tensor:
        by_position = codes.permute(1, 0, 3, 4, 2)  # [N, B, h, w, D]
        return torch.cat([self.book(number).lookup(book) for number, book in enumerate(by_position)], dim=-1)

    def _quantized(self, features: list[Tensor]) -> Codes:
        """Quantize the features `[B, h, w, C]` of each book."""
        found = [self.book(number)(feature) for number, feature in enumerate(features)]
        return Codes(
            torch.cat([one.vectors for one in found], dim=-1),
            torch.stack([one.codes.permute(0, 3, 1, 2) for one in found], dim=1),
            torch.stack([one.loss for one in found]).sum(),
        )


class DualTokenTokenizer(ResidualTokenizer):
    """DualToken (arXiv 2503.14324, section 3.2): pixel codes of shallow features, semantic codes of deep features.

    The semantic codes are decoded to the frozen teacher's features at the same layer. With `semantic_layer`, the rest
    of the trained tower and its pooling turn them into an image embedding, which the pooled loss compares with the
    teacher's and zero-shot classification uses. Without `semantic_book` there are only pixel codes.
    """

    config_class = DualTokenConfig
    config: DualTokenConfig
    loss_class = SemanticLossConfig
    book_names: tuple[str, ...] = ("semantic", "pixel")

    def _build(self) -> None:
        assert self.teacher is not None
        config, layers = self.config, self.config.pixel_layers
        if not config.semantic_book:
            self.book_names = ("pixel",)
        self.tower = self.teacher.image_tower()
        semantic = self.teacher.feature_dim
        if config.semantic_layer is not None:
            (semantic,) = self.teacher.level_widths(self.grid, (config.semantic_layer,))
        pixel_widths = self.teacher.level_widths(self.grid, layers) if layers else [semantic]
        code_dim = config.residual.code_dim
        released = config.released_layout
        before = functools.partial(AttentionProjection, mlp_norm=released)
        after = functools.partial(AttentionProjection, mlp_norm=released, causal=released)
        self.pre_quant_pixel = nn.ModuleList(before(width, code_dim) for width in pixel_widths)
        if config.semantic_book:
            self.pre_quant_semantic = before(semantic, code_dim)
        self.quantizers = nn.ModuleList(ResidualQuantizer(config.residual) for _ in self.book_names)
        if config.semantic_book:
            self.post_quant_semantic = after(code_dim, semantic)
        self.post_quant_pixel = after(code_dim, pixel_widths[0])
        self.to_decoder = ResidualBlock(pixel_widths[0], config.conv.latent_channels, first_kernel=1 if released else 3)
        self.decoder = ConvDecoder(config.conv)

    @property
    def has_semantic_branch(self) -> bool:
        return self.config.semantic_book

    def target_features(self, images: Tensor) -> Tensor | None:
        assert self.teacher is not None
        if self.config.semantic_layer is None or not self.has_semantic_branch:
            return super().target_features(images)
        (level,), _ = self.teacher.levels(images, self.grid, (self.config.semantic_layer,))
        return level.float().detach()

    def _quantize(self, images: Tensor, target: Tensor | None) -> Codes:
        shallow, layer = self.config.pixel_layers, self.config.semantic_layer
        levels, final = self.tower.levels(images, self.grid, shallow if layer is None else (*shallow, layer))
        deep = final if layer is None else levels.pop()
        projected = [project(level) for project, level in zip(self.pre_quant_pixel, levels or [deep], strict=True)]
        weights = self.config.pixel_layer_weights or (1.0,)
        pixel = torch.stack([weight * one for weight, one in zip(weights, projected, strict=True)]).sum(0)
        return self._quantized([self.pre_quant_semantic(deep), pixel] if self.config.semantic_book else [pixel])

    def _to_latents(self, vectors: Tensor) -> Tensor:
        pixel = vectors.chunk(len(self.book_names), dim=-1)[-1]
        grown = self.post_quant_pixel(pixel).permute(0, 3, 1, 2)
        if self.config.released_layout:
            grown = self._sized_for_decoder(grown)
        return self.to_decoder(grown).permute(0, 2, 3, 1)

    def _predict(self, vectors: Tensor) -> Tensor:
        if not self.config.semantic_book:
            return super()._predict(vectors)
        semantic, _ = vectors.chunk(2, dim=-1)
        return self.post_quant_semantic(semantic)

    @property
    def embeds_codes(self) -> bool:
        teacher = self.teacher if self.has_semantic_branch else None
        return teacher is not None and teacher.pools_from(self.config.semantic_layer)

    def pooled_prediction(self, features: Tensor) -> Tensor:
        if self.config.semantic_layer is None:
            return super().pooled_prediction(features)
        return self.tower.pool(features, self.config.semantic_layer)

    def pooled_target(self, features: Tensor) -> Tensor:
        assert self.teacher is not None
        return self.teacher.pool(features, self.config.semantic_layer)


class VilaUTokenizer(ResidualTokenizer):
    """VILA-U (arXiv 2409.04429, section 3.1): residual codes of deep features, for reconstruction and text alignment.

    The codes learn semantics from the contrastive loss; there is no loss on the teacher's features. One attention query
    pools the decoded features into the teacher's image-text space. With `released_layout` a layer's features are
    quantized at their full width, and the rest of the tower pools them, as in VILA-U's code.
    """

    config_class = VilaUConfig
    config: VilaUConfig
    loss_class = ContrastiveLossConfig
    book_names = ("unified",)

    def _build(self) -> None:
        assert self.teacher is not None
        if not self.teacher.has_text:
            raise ValueError(
                "tokenizer.kind=vila_u learns from captions and needs a teacher with a text tower; choose one, or give "
                "the backbone a head"
            )
        config, dim = self.config, self.teacher.feature_dim
        code_dim = config.residual.code_dim
        if config.released_layout:
            self._check_layer(self.teacher)
        self.tower = self.teacher.image_tower()
        if not config.released_layout:
            self.pre_quant = nn.Linear(dim, code_dim)
        self.quantizers = nn.ModuleList([ResidualQuantizer(config.residual)])
        self.post_quant = nn.Linear(code_dim, config.conv.latent_channels)
        self.decoder = ConvDecoder(config.conv)
        if not config.released_layout:
            self.to_features = nn.Sequential(nn.Linear(code_dim, dim), nn.GELU(), nn.Linear(dim, dim))
            self.pool = nn.Linear(dim, 1)
            self.to_embedding = nn.Linear(dim, self.teacher.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def _check_layer(self, teacher: Teacher) -> None:
        """Raise ValueError unless the layer's features can be quantized at their full width and pooled by the tower."""
        layer, code_dim = self.config.semantic_layer, self.config.residual.code_dim
        assert layer is not None, "the config is refused without one"
        if not teacher.pools_from(layer):
            raise ValueError(
                f"tokenizer.released_layout of vila_u pools with the rest of the tower from "
                f"tokenizer.semantic_layer={layer}: give a layer, the last but one in VILA-U, of a SigLIP; or set "
                f"released_layout to false"
            )
        (width,) = teacher.level_widths(self.grid, (layer,))
        if code_dim != width:
            raise ValueError(
                f"tokenizer.released_layout of vila_u quantizes layer {layer} at its full width: set "
                f"tokenizer.residual.code_dim to {width}, it is {code_dim}"
            )

    @property
    def has_semantic_branch(self) -> bool:
        return False

    def _quantize(self, images: Tensor, target: Tensor | None) -> Codes:
        layer = self.config.semantic_layer
        if not self.config.released_layout or layer is None:
            return self._quantized([self.pre_quant(self.tower.features(images, self.grid))])
        levels, _ = self.tower.levels(images, self.grid, (layer,))
        return self._quantized(levels)

    def _to_latents(self, vectors: Tensor) -> Tensor:
        return self.post_quant(vectors)

    @property
    def embeds_codes(self) -> bool:
        return True

    def embed_codes(self, codes: Tensor) -> Tensor:
        return self._embed(self.code_embeddings(codes))

    def _embed(self, vectors: Tensor) -> Tensor:
        if self.config.released_layout:
            return F.normalize(self.tower.pool(vectors, self.config.semantic_layer), dim=-1)
        features = self.to_features(vectors).flatten(1, 2)  # [B, h * w, C]
        weights = self.pool(features).softmax(dim=1)
        return F.normalize(self.to_embedding((weights * features).sum(1)), dim=-1)
