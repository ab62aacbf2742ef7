"""The interface of all image tokenizers, which map images to discrete codes and back.

Shape legend: B batch, H W pixels, h w code grid, N books, D depth, C channels, K codebook size, E channels of the
image-text space. Codes are `[B, N, D, h, w]` for every kind, so that tables, sequences and reports need one layout.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from models.teachers.teacher import Teacher
from models.tokenizers.config import EncoderConfig, TokenizerConfig
from models.tokenizers.convolutional import ConvDecoder, ConvEncoder
from models.tokenizers.losses import LossConfig


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

    config_class: ClassVar[type[TokenizerConfig]]
    """The fields that this kind reads."""
    config: TokenizerConfig
    loss_class: ClassVar[type[LossConfig]] = LossConfig
    """The config class of its training loss."""
    trains_tower: ClassVar[bool] = False
    """Whether its image encoder can be a trained copy of the teacher's tower, with a learning rate of its own."""
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
            ValueError: a teacher is missing, or the kind cannot use it.
        """
        super().__init__()
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

    def __init__(self, config: EncoderConfig, teacher: Teacher | None) -> None:
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
    """Return the mean cosine similarity over the positions of two feature grids `[B, h, w, C]`, `[B]`."""
    return F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean((1, 2))
