"""Frozen semantic encoders: what SigLIP is to MUSE-VL.

A teacher turns images in [-1, 1] into a grid of features `T` and, where it has a text tower, images and texts into one
space. Every teacher does its own resizing and pixel normalisation, taken from its own configuration, so that callers
hand all of them the same tensors. Shape legend: B batch, h w code grid, C channels.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from models.config import Config, Fraction
from models.torchvision_compat import make_torchvision_importable


class AlignedHeadConfig(Config):
    """A one-layer text-aligned head over a frozen backbone, trained on the captions of the training split."""

    dim: PositiveInt = 128
    """Channels of the aligned patch features and of the shared image-text space."""
    feature_dropout: Fraction = 0.1
    """Dropout on the backbone's features while the head trains."""
    keep_backbone: bool = False
    """Whether `T` has the backbone's own features beside the aligned ones. A head that was trained on few captions
    knows its training images better than others; the backbone's features do not depend on them."""


class BackboneTeacherConfig(Config):
    """A timm classification backbone, alone or under a text-aligned head."""

    kind: Literal["backbone"] = "backbone"
    """Selects this teacher."""
    architecture: str = "tf_efficientnet_lite0"
    """timm model name."""
    weights: str = "package:efficientnet-lite0"
    """`package:efficientnet-lite0` (ImageNet weights that install from the package index), `hub` (timm's own
    download), or the path of a state dict (`.safetensors`, or `.pth` read with `weights_only`)."""
    input_size: PositiveInt = 128
    """Side of the square that the backbone sees, pixels."""
    feature_blocks: tuple[int, ...] = (4, 6)
    """Indices of the stages whose outputs are resized to the code grid and concatenated."""
    head: AlignedHeadConfig | None = AlignedHeadConfig()
    """The text-aligned head; `null` for bare features that never saw a caption."""


class OpenClipTeacherConfig(Config):
    """Any open_clip model (SigLIP, SigLIP2, CLIP) with a ViT image tower."""

    kind: Literal["open_clip"] = "open_clip"
    """Selects this teacher."""
    name: str = "ViT-SO400M-14-SigLIP-384"
    """open_clip architecture name, or `hf-hub:...`, or `local-dir:...`."""
    pretrained: str | None = "webli"
    """open_clip tag or path of a checkpoint; `null` for random weights (tests)."""


class TransformersTeacherConfig(Config):
    """Any transformers SigLIP, SigLIP2 or CLIP model."""

    kind: Literal["transformers"] = "transformers"
    """Selects this teacher."""
    path: str = "google/siglip-so400m-patch14-384"
    """Hub id or local folder."""


TeacherConfig = Annotated[
    BackboneTeacherConfig | OpenClipTeacherConfig | TransformersTeacherConfig, Field(discriminator="kind")
]


class Teacher(nn.Module):
    """Interface of all teachers. Frozen: in eval mode, without gradients, whatever the parent module does."""

    feature_dim: int
    """Channels of `features`."""
    embed_dim: int
    """Channels of `embed_images`."""
    has_text: bool

    def features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> features `[B, h, w, C]`, LayerNorm scale (zero mean, unit variance)."""
        raise NotImplementedError

    def levels(self, images: Tensor, grid: tuple[int, int], layers: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        """What the image tower knows after some of its layers, not normalised, and `features`, in one pass.

        Args:
            images: `[B, 3, H, W]` in [-1, 1].
            grid: rows and columns of the result; a finer level is folded into channels, a ViT's is resized.
            layers: counted from 1: blocks of a ViT, stages of a convolutional backbone.

        Returns:
            `[B, h, w, C_layer]` for each of `layers`, in their order; `features` of the same images.

        Raises:
            ValueError: there is no such layer.
        """
        raise NotImplementedError

    def level_widths(self, grid: tuple[int, int], layers: tuple[int, ...]) -> list[int]:
        """Channels of each of `levels`; arguments and errors as there."""
        raise NotImplementedError

    def image_tower(self) -> Teacher:
        """A copy of the image side whose weights can be trained; it stays in eval mode, as every teacher."""
        tower = copy.deepcopy(self)
        tower.drop_text()
        return tower.requires_grad_(True)

    def drop_text(self) -> None:
        """Remove the text side from this copy."""
        raise NotImplementedError

    def embed_images(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> unit vectors `[B, E]` in the image-text space (without text: pooled)."""
        raise NotImplementedError

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Texts -> unit vectors `[len(texts), E]`.

        Raises:
            ValueError: this teacher has no text tower.
        """
        raise ValueError(
            f"{type(self).__name__} has no text tower; choose a teacher with one, or a backbone with `head`"
        )

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    def freeze(self) -> Teacher:
        """Take every parameter out of training; returns self."""
        return self.requires_grad_(False).eval()


def _resized(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, C, h', w']` -> `[B, C, h, w]`: averages when shrinking, bilinear when growing."""
    if features.shape[-2:] == grid:
        return features
    return F.interpolate(features.float(), size=grid, mode="bilinear", align_corners=False, antialias=True)


def _folded(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, C, h', w']` -> `[B, h, w, C']`: a multiple of the grid is folded into channels, which loses nothing."""
    factor = features.shape[-1] // grid[1]
    if factor > 1 and features.shape[-2:] == (factor * grid[0], factor * grid[1]):
        return F.pixel_unshuffle(features, factor).permute(0, 2, 3, 1)
    return _resized(features, grid).permute(0, 2, 3, 1)


def _check_layers(layers: tuple[int, ...], count: int) -> None:
    for layer in layers:
        if not 1 <= layer <= count:
            raise ValueError(f"layer {layer} is asked for, the teacher's image tower has layers 1..{count}")


def _standardised(features: Tensor) -> Tensor:
    return F.layer_norm(features, features.shape[-1:])


class PixelNormalisation(NamedTuple):
    """What a backbone was trained with."""

    size: int
    """Side, pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` in [-1, 1] -> `[B, 3, size, size]` with this mean and deviation (of pixels in [0, 1])."""
        if images.shape[-1] != self.size or images.shape[-2] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="bicubic", antialias=True)
        mean = images.new_tensor(self.mean).view(1, 3, 1, 1)
        std = images.new_tensor(self.std).view(1, 3, 1, 1)
        return ((images + 1) / 2 - mean) / std


class BagOfWordsTower(nn.Module):
    """Mean of word embeddings and a linear map: enough text tower for captions of a few words."""

    def __init__(self, words: list[str], dim: int) -> None:
        super().__init__()
        self.index = {word: position + 1 for position, word in enumerate(words)}  # 0 is every unknown word
        self.embed = nn.EmbeddingBag(len(words) + 1, dim, mode="mean")
        self.project = nn.Linear(dim, dim)

    def forward(self, texts: list[str]) -> Tensor:
        rows = [[self.index.get(word, 0) for word in split_words(text)] or [0] for text in texts]
        offsets = torch.tensor([0] + [len(row) for row in rows[:-1]]).cumsum(0)
        device = self.project.weight.device
        flat = torch.tensor([word for row in rows for word in row], device=device)
        return F.normalize(self.project(self.embed(flat, offsets.to(device))), dim=-1)


def split_words(text: str) -> list[str]:
    """Lowercase words of a text, letters and digits only."""
    return re.findall(r"[a-z0-9]+", text.lower())


class AlignedHead(nn.Module):
    """Backbone features -> aligned patch features; attention pooling and a word tower share one space with them."""

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
        """`[B, h, w, C_in]` standardised -> `[B, h, w, C]`."""
        return self.patch(self.dropout(features))

    def embed(self, features: Tensor) -> Tensor:
        """`[B, h, w, C_in]` standardised -> unit vectors `[B, C]`."""
        tokens = self.patches(features).flatten(1, 2)  # [B, h*w, C]
        weights = self.pool(tokens).softmax(dim=1)
        return F.normalize(self.image((weights * tokens).sum(1)), dim=-1)


class BackboneTeacher(Teacher):
    """A timm backbone; `T` is its standardised features, or those of the text-aligned head over them."""

    native_grid = (8, 8)

    def __init__(
        self, config: BackboneTeacherConfig, state_dict: dict[str, Tensor] | None, words: list[str] | None
    ) -> None:
        """
        Args:
            config: which backbone and head.
            state_dict: of the timm backbone; None leaves it random, for a caller that loads the whole teacher.
            words: vocabulary of the head's word tower.
        """
        super().__init__()
        make_torchvision_importable()
        import timm

        self.config = config
        self.backbone = timm.create_model(config.architecture, pretrained=False, features_only=False)
        if state_dict is not None:
            self.backbone.load_state_dict(state_dict)
        data = timm.data.resolve_model_data_config(self.backbone)
        self.normalisation = PixelNormalisation(config.input_size, tuple(data["mean"]), tuple(data["std"]))
        with torch.no_grad():
            self.backbone.eval()
            probe = self.raw_features(torch.zeros(1, 3, config.input_size, config.input_size), self.native_grid)
        self.head = AlignedHead(config.head, probe.shape[-1], words or []) if config.head else None
        self.embed_dim = config.head.dim if config.head else probe.shape[-1]
        beside = probe.shape[-1] if config.head and config.head.keep_backbone else 0
        self.feature_dim = self.embed_dim + beside
        self.has_text = self.head is not None

    def raw_features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Standardised features of the chosen stages, `[B, h, w, C_1 + C_2 + ...]`."""
        return self._raw(self._stages(images, max(self.config.feature_blocks)), grid)

    def _raw(self, stages: list[Tensor], grid: tuple[int, int]) -> Tensor:
        chosen = [_resized(stages[index], grid).permute(0, 2, 3, 1) for index in self.config.feature_blocks]
        return torch.cat([_standardised(level.float()) for level in chosen], dim=-1)

    def _stages(self, images: Tensor, last: int) -> list[Tensor]:
        """`[B, C, h', w']` after each stage up to number `last`, counted from 0."""
        hidden = self.backbone.bn1(self.backbone.conv_stem(self.normalisation(images)))
        maps = []
        for stage in self.backbone.blocks[: last + 1]:
            hidden = stage(hidden)
            maps.append(hidden)
        return maps

    def levels(self, images: Tensor, grid: tuple[int, int], layers: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        _check_layers(layers, len(self.backbone.blocks))
        stages = self._stages(images, max([*self.config.feature_blocks, *(layer - 1 for layer in layers)]))
        features = self._finished(self._raw(stages, grid))
        return [_folded(stages[layer - 1], grid) for layer in layers], features

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
        aligned = _standardised(self.head.patches(raw))
        return torch.cat([raw, aligned], dim=-1) if self.head.config.keep_backbone else aligned

    def embed_images(self, images: Tensor) -> Tensor:
        raw = self.raw_features(images, self.native_grid)
        return self.head.embed(raw) if self.head else F.normalize(raw.mean((1, 2)), dim=-1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        return self.head.text(texts) if self.head else super().embed_texts(texts)


class OpenClipTeacher(Teacher):
    """Patch features of an open_clip image tower and its two pooled towers."""

    has_text = True
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: OpenClipTeacherConfig) -> None:
        super().__init__()
        make_torchvision_importable()
        import open_clip

        # open_clip moves a model to the CPU unless told otherwise; on `meta` there is nothing to move
        self.model = open_clip.create_model(
            config.name, pretrained=config.pretrained, device=torch.get_default_device()
        )
        self.config = config
        preprocess = open_clip.get_model_preprocess_cfg(self.model)
        size = preprocess["size"]
        self.side = size if isinstance(size, int) else size[0]
        # buffers: the pixel statistics belong to the pretrained tag, so they travel with the weights
        self.register_buffer("pixel_mean", torch.tensor(preprocess["mean"]))
        self.register_buffer("pixel_std", torch.tensor(preprocess["std"]))
        with torch.no_grad():
            probe = torch.zeros(1, 3, self.side, self.side)
            self.feature_dim = self._patches(probe).shape[1]
            self.embed_dim = self.model.encode_image(probe).shape[1]

    @property
    def normalisation(self) -> PixelNormalisation:
        """Size and pixel statistics of the image tower."""
        return PixelNormalisation(self.side, tuple(self.pixel_mean.tolist()), tuple(self.pixel_std.tolist()))

    @functools.cached_property
    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """The text tower's; made when first needed, because SigLIP's comes from the hub."""
        import open_clip

        return open_clip.get_tokenizer(self.config.name)

    def _patches(self, pixels: Tensor) -> Tensor:
        """Normalised pixels -> last-layer patch features `[B, C, h', w']`."""
        out = self.model.visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=True, intermediates_only=True
        )
        return out["image_intermediates"][-1]

    def features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        patches = _resized(self._patches(self.normalisation(images)), grid)
        return _standardised(patches.permute(0, 2, 3, 1).float())

    def levels(self, images: Tensor, grid: tuple[int, int], layers: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        _check_layers(layers, self._depth)
        visual = self.model.visual
        trunk = visual.trunk if hasattr(visual, "trunk") else visual
        asked = sorted({*layers, self._depth})
        out = visual.forward_intermediates(
            self.normalisation(images), indices=[layer - 1 for layer in asked], intermediates_only=True
        )
        found = dict(zip(asked, out["image_intermediates"], strict=True))
        last = found[self._depth].permute(0, 2, 3, 1)
        final = trunk.norm(last) if hasattr(trunk, "norm") else trunk.ln_post(last)
        features = _standardised(_resized(final.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1).float())
        return [_folded(found[layer], grid) for layer in layers], features

    def level_widths(self, grid: tuple[int, int], layers: tuple[int, ...]) -> list[int]:
        _check_layers(layers, self._depth)
        return [self.feature_dim] * len(layers)

    @property
    def _depth(self) -> int:
        """Blocks of the image tower: open_clip's own ViT, or timm's inside a wrapper."""
        visual = self.model.visual
        return len(visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks)

    def drop_text(self) -> None:
        for name, child in list(self.model.named_children()):
            if child is not self.model.visual:
                delattr(self.model, name)

    def embed_images(self, images: Tensor) -> Tensor:
        return self.model.encode_image(self.normalisation(images), normalize=True)

    def embed_texts(self, texts: list[str]) -> Tensor:
        device = next(self.model.parameters()).device
        return self.model.encode_text(self.tokenizer(texts).to(device), normalize=True)


class TransformersTeacher(Teacher):
    """Patch features of a transformers SigLIP, SigLIP2 or CLIP vision tower and its two pooled towers."""

    has_text = True

    def __init__(self, config: TransformersTeacherConfig) -> None:
        super().__init__()
        make_torchvision_importable()
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.model = AutoModel.from_pretrained(config.path)
        self.tokenizer = AutoTokenizer.from_pretrained(config.path)
        processor = AutoImageProcessor.from_pretrained(config.path)
        vision = self.model.config.vision_config
        self.normalisation = PixelNormalisation(
            vision.image_size, tuple(processor.image_mean), tuple(processor.image_std)
        )
        self.native_grid = (vision.image_size // vision.patch_size,) * 2
        self.feature_dim = vision.hidden_size
        self.embed_dim = getattr(self.model.config, "projection_dim", None) or vision.hidden_size  # SigLIP has none

    def features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = self.model.vision_model(pixel_values=self.normalisation(images)).last_hidden_state
        return self._final(tokens, grid)

    def _final(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return _standardised(_resized(self._map(tokens), grid).permute(0, 2, 3, 1).float())

    def _map(self, tokens: Tensor) -> Tensor:
        """`[B, T, C]` -> `[B, C, h', w']`; CLIP puts a class token first, SigLIP has none."""
        height, width = self.native_grid
        return tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))

    def levels(self, images: Tensor, grid: tuple[int, int], layers: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        _check_layers(layers, self.model.config.vision_config.num_hidden_layers)
        out = self.model.vision_model(pixel_values=self.normalisation(images), output_hidden_states=True)
        chosen = [out.hidden_states[layer] for layer in layers]  # the first are the embeddings, then one a block
        return [_folded(self._map(state), grid) for state in chosen], self._final(out.last_hidden_state, grid)

    def level_widths(self, grid: tuple[int, int], layers: tuple[int, ...]) -> list[int]:
        _check_layers(layers, self.model.config.vision_config.num_hidden_layers)
        return [self.feature_dim] * len(layers)

    def drop_text(self) -> None:
        del self.model.text_model

    def embed_images(self, images: Tensor) -> Tensor:
        output = self.model.get_image_features(pixel_values=self.normalisation(images))
        return F.normalize(_pooled(output), dim=-1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        # SigLIP learned from texts padded to this length, which SigLIP2's tokenizer does not know
        length = self.model.config.text_config.max_position_embeddings
        batch = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        device = next(self.model.parameters()).device
        return F.normalize(_pooled(self.model.get_text_features(input_ids=batch["input_ids"].to(device))), dim=-1)


def _pooled(output: object) -> Tensor:
    """transformers 5 returns an output object where transformers 4 returned the pooled tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output  # type: ignore[attr-defined]


def build_teacher(
    config: BackboneTeacherConfig | OpenClipTeacherConfig | TransformersTeacherConfig,
    *,
    backbone_state: dict[str, Tensor] | None = None,
    words: list[str] | None = None,
) -> Teacher:
    """A frozen teacher.

    Args:
        config: which one.
        backbone_state: weights of the timm backbone (`kind: backbone`).
        words: vocabulary of the aligned head's word tower (`kind: backbone` with a head).

    Raises:
        ValueError: a backbone without weights.
    """
    if isinstance(config, OpenClipTeacherConfig):
        return OpenClipTeacher(config).freeze()
    if isinstance(config, TransformersTeacherConfig):
        return TransformersTeacher(config).freeze()
    if backbone_state is None:
        raise ValueError(f"teacher backbone {config.architecture!r} was given no weights")
    return BackboneTeacher(config, backbone_state, words).freeze()


_LUKEMELAS_BLOCK = {
    "_expand_conv": ("conv_pw", None), "_bn0": ("bn1", None), "_depthwise_conv": ("conv_dw", "conv_dw"),
    "_bn1": ("bn2", "bn1"), "_project_conv": ("conv_pwl", "conv_pw"), "_bn2": ("bn3", "bn2"),
}  # fmt: skip
"""Names in EfficientNet-PyTorch checkpoints -> names in timm, with and without (first stage) an expansion."""


def convert_efficientnet_lite0(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename an EfficientNet-PyTorch checkpoint of EfficientNet-Lite0 to timm's `tf_efficientnet_lite0`.

    Raises:
        ValueError: a key that does not fit, by name.
    """
    repeats = (1, 2, 2, 3, 3, 4, 1)  # blocks a stage (EfficientNet, table 1; Lite0 keeps the depths of B0)
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
