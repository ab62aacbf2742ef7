"""A small teacher: a frozen timm backbone, with or without a text-aligned head, and the names in its checkpoints.

Shape legend: B batch, h w code grid, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from models.config import Config, CountsByContent, Fraction
from models.published import on_one_line
from models.teachers.teacher import (
    PixelNormalisation,
    Teacher,
    check_layers,
    folded,
    interpolation_of,
    resized,
    standardised,
)


class AlignedHeadConfig(Config):
    """A one-layer text-aligned head on a frozen backbone, trained with the captions of the training split."""

    dim: PositiveInt = 128
    """Channels of the aligned patch features and of the joint image-text space."""
    feature_dropout: Fraction = 0.1
    """Dropout on the backbone's features during training of the head."""
    keep_backbone: bool = False
    """Whether `T` concatenates the backbone's own features with the aligned ones. A head that was trained on few
    captions fits its training images better than others; the backbone's features do not depend on them."""


class BackboneTeacherConfig(Config):
    """A timm backbone, convolutional or a ViT, with or without a text-aligned head."""

    kind: Literal["backbone"] = "backbone"
    """Selects this teacher."""
    architecture: str = "tf_efficientnet_lite0"
    """timm model name."""
    weights: Annotated[str, CountsByContent()] = "package:efficientnet-lite0"
    """`package:efficientnet-lite0` (ImageNet weights that install from the package index), `hub` (timm's own
    download), or the path of a state dict (`.safetensors`, or `.pth` read with `weights_only`)."""
    input_size: PositiveInt = 128
    """Side of the backbone's square input in pixels; most ViTs accept one size only."""
    feature_blocks: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (4, 6)
    """Indices, from 0, of the stages whose outputs are resized to the code grid and concatenated: the stages of an
    EfficientNet or MobileNet, the blocks of a ViT, timm's feature levels of others (a ResNet's 0 is its stem)."""
    head: AlignedHeadConfig | None = AlignedHeadConfig()
    """The text-aligned head; `null` uses the backbone's features alone, without any captions."""


class BagOfWordsTower(nn.Module):
    """Text tower for captions of a few words: the mean of word embeddings and a linear map."""

    def __init__(self, words: list[str], dim: int) -> None:
        super().__init__()
        self.index = {word: position + 1 for position, word in enumerate(words)}  # 0 is the unknown word
        self.embed = nn.EmbeddingBag(len(words) + 1, dim, mode="mean")
        self.project = nn.Linear(dim, dim)

    def forward(self, texts: list[str]) -> Tensor:
        rows = [[self.index.get(word, 0) for word in split_words(text)] or [0] for text in texts]
        offsets = torch.tensor([0] + [len(row) for row in rows[:-1]]).cumsum(0)
        device = self.project.weight.device
        flat = torch.tensor([word for row in rows for word in row], device=device)
        return F.normalize(self.project(self.embed(flat, offsets.to(device))), dim=-1)


def split_words(text: str) -> list[str]:
    """Split a text into lowercase words of letters and digits."""
    return re.findall(r"[a-z0-9]+", text.lower())


class AlignedHead(nn.Module):
    """Maps backbone features to aligned patch features; attention pooling and a text tower share their space."""

    def __init__(self, config: AlignedHeadConfig, in_dim: int, words: list[str]) -> None:
        super().__init__()
        self.config = config
        self.words = list(words)
        self.dropout = nn.Dropout(config.feature_dropout)
        self.patch = nn.Linear(in_dim, config.dim)
        self.pool = nn.Linear(config.dim, 1)
        self.image = nn.Linear(config.dim, config.dim)
        self.text = BagOfWordsTower(words, config.dim)
        self.logit_scale = nn.Parameter(torch.tensor(2.3))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def patches(self, features: Tensor) -> Tensor:
        """Map standardised features `[B, h, w, C_in]` to aligned patch features `[B, h, w, C]`."""
        return self.patch(self.dropout(features))

    def pooled(self, features: Tensor) -> Tensor:
        """Pool standardised features `[B, h, w, C_in]` into vectors `[B, C]`, not normalised."""
        tokens = self.patches(features).flatten(1, 2)  # [B, h*w, C]
        weights = self.pool(tokens).softmax(dim=1)
        return self.image((weights * tokens).sum(1))

    def embed(self, features: Tensor) -> Tensor:
        """Embed standardised features `[B, h, w, C_in]` as unit vectors `[B, C]`."""
        return F.normalize(self.pooled(features), dim=-1)


class BackboneTeacher(Teacher):
    """A timm backbone; `T` is its standardised features, or those of the text-aligned head on top of them."""

    native_grid = (8, 8)

    def __init__(
        self, config: BackboneTeacherConfig, state_dict: dict[str, Tensor] | None, words: list[str] | None
    ) -> None:
        """
        Args:
            config: the backbone and the head.
            state_dict: state dict of the timm backbone; None keeps random weights, for a caller that loads the whole
                teacher.
            words: vocabulary of the head's text tower.

        Raises:
            ValueError: timm has no such backbone, or the backbone lacks the stages, does not accept images of this
                size, or does not fit the weights; the message names the field.
        """
        super().__init__()
        import timm

        self.config = config
        self.backbone = _built(config.architecture)
        _check_stages(config, self.num_stages)
        if state_dict is not None:
            _load_backbone(self.backbone, state_dict, config)
        data = timm.data.resolve_model_data_config(self.backbone)
        self.normalisation = PixelNormalisation(
            config.input_size,
            tuple(data["mean"]),
            tuple(data["std"]),
            interpolation_of(data["interpolation"], f"timm's {config.architecture}"),
        )
        self.backbone.eval()
        probe = self._probe(data["input_size"][-1])
        self.head = AlignedHead(config.head, probe.shape[-1], words or []) if config.head else None
        self.embed_dim = config.head.dim if config.head else probe.shape[-1]
        beside = probe.shape[-1] if config.head and config.head.keep_backbone else 0
        self.feature_dim = self.embed_dim + beside
        self.has_text = self.head is not None
        self.pools_features = beside > 0

    @torch.no_grad()
    def _probe(self, native_size: int) -> Tensor:
        """Return the features of one mid-grey image, `[1, h, w, C]`."""
        size = self.config.input_size
        try:
            return self.raw_features(torch.zeros(1, 3, size, size), self.native_grid)
        except AssertionError as error:  # timm refuses a size by an assertion
            raise ValueError(
                f"teacher.model.input_size={size} does not suit {self.config.architecture} ({error}); set "
                f"teacher.model.input_size={native_size}"
            ) from error

    @property
    def num_stages(self) -> int:
        """Number of stages that `stage_maps` can return."""
        return len(self.backbone.blocks if _has_efficientnet_stages(self.backbone) else self.backbone.feature_info)

    @property
    def takes_any_size(self) -> bool:
        """Whether `stage_maps` accepts images of another size than the teacher's own."""
        return not self.backbone.pretrained_cfg.get("fixed_input_size", False)

    def raw_features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the standardised features of the chosen stages, `[B, h, w, C_1 + C_2 + ...]`."""
        return self._raw(self._stages(images, max(self.config.feature_blocks)), grid)

    def _raw(self, stages: list[Tensor], grid: tuple[int, int]) -> Tensor:
        chosen = [resized(stages[index], grid).permute(0, 2, 3, 1) for index in self.config.feature_blocks]
        return torch.cat([standardised(level.float()) for level in chosen], dim=-1)

    def _stages(self, images: Tensor, last: int) -> list[Tensor]:
        return list(self.stage_maps(self.normalisation(images), last))

    def stage_maps(self, pixels: Tensor, last: int) -> Iterator[Tensor]:
        """Yield the feature map `[B, C, h', w']` after each stage up to number `last`, counted from 0.

        The pixels `[B, 3, H, W]` are normalised. The maps are yielded one at a time, because gradients of a map's uses
        are added in the order of the forward pass: a caller that uses each map before the next one is computed gets
        results that differ in the last bits from those of a caller that collects the maps first.
        """
        if not _has_efficientnet_stages(self.backbone):
            yield from self.backbone.forward_intermediates(
                pixels, indices=list(range(last + 1)), stop_early=True, output_fmt="NCHW", intermediates_only=True
            )
            return
        # timm's feature levels of an EfficientNet are only the last stages before each halving of the resolution
        hidden = self.backbone.bn1(self.backbone.conv_stem(pixels))
        for stage in self.backbone.blocks[: last + 1]:
            hidden = stage(hidden)
            yield hidden

    def levels(self, images: Tensor, grid: tuple[int, int], layers: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        check_layers(layers, self.num_stages)
        stages = self._stages(images, max([*self.config.feature_blocks, *(layer - 1 for layer in layers)]))
        features = self._finished(self._raw(stages, grid))
        return [folded(stages[layer - 1], grid) for layer in layers], features

    def level_widths(self, grid: tuple[int, int], layers: tuple[int, ...]) -> list[int]:
        side = self.config.input_size
        with torch.no_grad():
            probe = torch.zeros(1, 3, side, side, device=next(self.backbone.parameters()).device)
            return [level.shape[-1] for level in self.levels(probe, grid, layers)[0]]

    def drop_text(self) -> None:
        if self.head is not None:
            del self.head.text

    def features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        return self._finished(self.raw_features(images, grid))

    def _finished(self, raw: Tensor) -> Tensor:
        if self.head is None:
            return raw
        aligned = standardised(self.head.patches(raw))
        return torch.cat([raw, aligned], dim=-1) if self.head.config.keep_backbone else aligned

    def pools_from(self, layer: int | None) -> bool:
        return self.pools_features and layer is None

    def pool(self, features: Tensor, layer: int | None = None) -> Tensor:
        if self.head is None or not self.pools_features:
            return super().pool(features, layer)
        if layer is not None:
            raise ValueError(
                f"a backbone pools its final features, not those of layer {layer}; set tokenizer.semantic_layer=null"
            )
        return self.head.pooled(features[..., : -self.embed_dim])  # the backbone's part, which the head reads

    def embed_images(self, images: Tensor) -> Tensor:
        raw = self.raw_features(images, self.native_grid)
        return self.head.embed(raw) if self.head else F.normalize(raw.mean((1, 2)), dim=-1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        return self.head.text(texts) if self.head else super().embed_texts(texts)


def _has_efficientnet_stages(backbone: nn.Module) -> bool:
    """Return whether it has a stem and a list of stages, as timm's EfficientNets and MobileNets do."""
    return all(hasattr(backbone, name) for name in ("conv_stem", "bn1", "blocks"))


def _built(architecture: str) -> Any:
    import timm

    try:
        backbone = timm.create_model(architecture, pretrained=False, features_only=False)
    except RuntimeError as error:
        raise ValueError(
            f"teacher.model.architecture={architecture!r}: {error}; `timm.list_models()` has the names"
        ) from error
    if not _has_efficientnet_stages(backbone) and not hasattr(backbone, "forward_intermediates"):
        raise ValueError(
            f"teacher.model.architecture={architecture!r} does not expose its stages (timm's forward_intermediates); "
            f"EfficientNets, MobileNets, ResNets, ConvNeXts, Swins and ViTs do"
        )
    return backbone


def _check_stages(config: BackboneTeacherConfig, num_stages: int) -> None:
    if not config.feature_blocks or not all(0 <= index < num_stages for index in config.feature_blocks):
        raise ValueError(
            f"teacher.model.feature_blocks={list(config.feature_blocks)}: {config.architecture} has stages "
            f"0..{num_stages - 1}; choose one or more of these"
        )


def _load_backbone(backbone: nn.Module, state_dict: dict[str, Tensor], config: BackboneTeacherConfig) -> None:
    try:
        backbone.load_state_dict(state_dict)
    except RuntimeError as error:
        reason = on_one_line(error, 300)
        raise ValueError(
            f"teacher.model.weights={config.weights!r} are not those of timm's {config.architecture}: {reason}; give "
            f"timm's own state dict, or the teacher.model.architecture that fits"
        ) from error


_LUKEMELAS_BLOCK = {
    "_expand_conv": ("conv_pw", None), "_bn0": ("bn1", None), "_depthwise_conv": ("conv_dw", "conv_dw"),
    "_bn1": ("bn2", "bn1"), "_project_conv": ("conv_pwl", "conv_pw"), "_bn2": ("bn3", "bn2"),
}  # fmt: skip
"""Names in EfficientNet-PyTorch checkpoints, and timm's names with and without (first stage) an expansion."""


def convert_efficientnet_lite0(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename an EfficientNet-PyTorch checkpoint of EfficientNet-Lite0 to timm's `tf_efficientnet_lite0`.

    Raises:
        ValueError: a key does not belong to such a checkpoint; the message names it.
    """
    repeats = (1, 2, 2, 3, 3, 4, 1)  # blocks per stage (EfficientNet, table 1; Lite0 keeps the depths of B0)
    position = [f"blocks.{stage}.{block}" for stage, count in enumerate(repeats) for block in range(count)]
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            names = _LUKEMELAS_BLOCK.get(parts[2], (None, None))
            new = names[1] if int(parts[1]) == 0 else names[0]
            block = int(parts[1])
            prefix = f"{position[block]}.{new}" if new and block < len(position) else None
        else:
            prefix = top.get(parts[0])
        if prefix is None:
            raise ValueError(f"key {key!r} does not belong to an EfficientNet-Lite0 checkpoint")
        renamed[f"{prefix}.{parts[-1]}"] = value
    return renamed
