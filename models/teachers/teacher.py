"""Frozen semantic encoders: what SigLIP is to MUSE-VL. The interface of all of them, and the published ones.

A teacher turns images in [-1, 1] into a grid of features `T` and, where it has a text tower, images and texts into one
space. Every teacher does its own resizing and pixel normalisation, taken from its own configuration, so that callers
hand all of them the same tensors. Shape legend: B batch, h w code grid, C channels.
"""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import Config, CountsByContent
from models.published import reading_published, refuse_missing


class OpenClipTeacherConfig(Config):
    """Any open_clip model (SigLIP, SigLIP2, CLIP) with a ViT image tower."""

    kind: Literal["open_clip"] = "open_clip"
    """Selects this teacher."""
    name: Annotated[str, CountsByContent("local-dir:")] = "ViT-SO400M-14-SigLIP-384"
    """open_clip architecture name, or `hf-hub:...`, or `local-dir:...`."""
    pretrained: Annotated[str | None, CountsByContent()] = "webli"
    """open_clip tag or path of a checkpoint; `null` for random weights (tests)."""


class TransformersTeacherConfig(Config):
    """Any transformers SigLIP, SigLIP2 or CLIP model."""

    kind: Literal["transformers"] = "transformers"
    """Selects this teacher."""
    path: Annotated[str, CountsByContent()] = "google/siglip-so400m-patch14-384"
    """Hub id or local folder."""


class Teacher(nn.Module):
    """Interface of all teachers. Frozen: in eval mode, without gradients, whatever the parent module does."""

    feature_dim: int
    """Channels of `features`."""
    embed_dim: int
    """Channels of `embed_images`."""
    has_text: bool
    pools_features = False
    """Whether `pool` works at all: a tower that pools through a class token cannot, its features lack that token."""

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

    def pool(self, features: Tensor, layer: int | None = None) -> Tensor:
        """What the rest of the image tower makes of features: `[B, h, w, C]` -> `[B, E]`, not normalised.

        Args:
            features: of one of `levels`; or, without a layer, as `features` gives them. Those of a published tower
                have lost the scale and offset of each position there, which are then put back as they are on average.
            layer: which level.

        Raises:
            ValueError: this tower cannot, or not from this layer; see `pools_from`.
        """
        raise ValueError(
            f"{type(self).__name__} cannot pool its features, they lack what its pooling reads; choose a SigLIP, or a "
            f"backbone whose head has keep_backbone"
        )

    def pools_from(self, layer: int | None) -> bool:
        """Whether `pool` works from a layer, or for None from the final features."""
        return self.pools_features

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


def resized(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, C, h', w']` -> `[B, C, h, w]`: averages when shrinking, bilinear when growing."""
    if features.shape[-2:] == grid:
        return features
    return F.interpolate(features.float(), size=grid, mode="bilinear", align_corners=False, antialias=True)


def folded(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, C, h', w']` -> `[B, h, w, C']`: a multiple of the grid is folded into channels, which loses nothing."""
    factor = features.shape[-1] // grid[1]
    if factor > 1 and features.shape[-2:] == (factor * grid[0], factor * grid[1]):
        return F.pixel_unshuffle(features, factor).permute(0, 2, 3, 1)
    return resized(features, grid).permute(0, 2, 3, 1)


def check_layers(layers: tuple[int, ...], count: int) -> None:
    """Raise ValueError unless each layer is one of 1..count."""
    for layer in layers:
        if not 1 <= layer <= count:
            raise ValueError(f"layer {layer} is asked for, the teacher's image tower has layers 1..{count}")


def standardised(features: Tensor) -> Tensor:
    """Zero mean and unit variance over channels."""
    return F.layer_norm(features, features.shape[-1:])


def unstandardised(features: Tensor, norm: nn.Module) -> Tensor:
    """`[..., C]` of `standardised` with the offset and scale that outputs of a LayerNorm have on average."""
    assert isinstance(norm, nn.LayerNorm), "towers that pool their features end with a LayerNorm"
    scale = (norm.weight.square().mean() + norm.bias.var(unbiased=False)).sqrt()
    return features * scale + norm.bias.mean()


Interpolation = Literal["bicubic", "bilinear"]
"""How images are resized to the size that a teacher was trained with; both antialiased, as Pillow does it."""
_OTHER_NAMES: dict[object, Interpolation] = {2: "bilinear", 3: "bicubic", "random": "bicubic"}
"""Numbers of Pillow's filters; `random` is how open_clip trained, and then evaluates with this."""


def interpolation_of(name: object, source: str) -> Interpolation:
    """The interpolation that a teacher's own configuration names.

    Args:
        name: a word (timm, open_clip) or the number of a Pillow filter (transformers).
        source: where it stands, for the message.

    Raises:
        ValueError: it is none that tensors can be resized with.
    """
    found = _OTHER_NAMES.get(name, name)
    if found not in get_args(Interpolation):
        raise ValueError(
            f"{source} resizes with {name!r}, a teacher here with bicubic (Pillow's 3) or bilinear (2); change it there"
        )
    return cast(Interpolation, found)


class PixelNormalisation(NamedTuple):
    """What a backbone was trained with."""

    size: int
    """Side, pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation = "bicubic"

    def __call__(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` in [-1, 1] -> `[B, 3, size, size]` with this mean and deviation (of pixels in [0, 1])."""
        if images.shape[-1] != self.size or images.shape[-2] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode=self.interpolation, antialias=True)
        return self.standardise(images)

    def standardise(self, images: Tensor) -> Tensor:
        """The same without resizing."""
        mean = images.new_tensor(self.mean).view(1, 3, 1, 1)
        std = images.new_tensor(self.std).view(1, 3, 1, 1)
        return ((images + 1) / 2 - mean) / std


class OpenClipTeacher(Teacher):
    """Patch features of an open_clip image tower and its two pooled towers."""

    has_text = True
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: OpenClipTeacherConfig) -> None:
        super().__init__()
        import open_clip

        _check_open_clip_name(config)
        # where there is a file, it is what cannot be read
        field, name = "teacher.model.name", config.name
        if config.pretrained and Path(config.pretrained).is_file():
            field, name = "teacher.model.pretrained", config.pretrained
        with reading_published(field, name, "teacher.model.pretrained the path of its weights, or local-dir:FOLDER"):
            # open_clip moves a model to the CPU unless told otherwise; on `meta` there is nothing to move
            self.model = open_clip.create_model(
                config.name,
                pretrained=config.pretrained,
                pretrained_text=False,  # would fetch weights of a text tower of transformers where no others are given
                device=torch.get_default_device(),
                require_pretrained=config.pretrained is not None,
            )
        self.config = config
        preprocess = open_clip.get_model_preprocess_cfg(self.model)
        size = preprocess["size"]
        self.side = size if isinstance(size, int) else size[0]
        self.interpolation = interpolation_of(preprocess["interpolation"], f"the open_clip model {config.name!r}")
        # buffers: the pixel statistics belong to the pretrained tag, so they travel with the weights
        self.register_buffer("pixel_mean", torch.tensor(preprocess["mean"]))
        self.register_buffer("pixel_std", torch.tensor(preprocess["std"]))
        trunk = getattr(self.model.visual, "trunk", None)
        # `pool` takes back what a last LayerNorm did to the features; ViTamin has none there
        self.pools_features = (
            trunk is not None and trunk.num_prefix_tokens == 0 and isinstance(trunk.norm, nn.LayerNorm)
        )
        with torch.no_grad():
            probe = torch.zeros(1, 3, self.side, self.side)
            self.feature_dim = self._patches(probe).shape[1]
            self.embed_dim = self.model.encode_image(probe).shape[1]

    @property
    def normalisation(self) -> PixelNormalisation:
        """Size and pixel statistics of the image tower."""
        mean, std = (tuple(buffer.tolist()) for buffer in (self.pixel_mean, self.pixel_std))
        return PixelNormalisation(self.side, mean, std, self.interpolation)

    @functools.cached_property
    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """The text tower's; made when first needed, because of a SigLIP that is only named it comes from the hub."""
        import open_clip

        return _without_markup(open_clip.get_tokenizer(self.config.name))

    def _patches(self, pixels: Tensor) -> Tensor:
        """Normalised pixels -> last-layer patch features `[B, C, h', w']`."""
        out = self.model.visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=True, intermediates_only=True
        )
        return out["image_intermediates"][-1]

    def features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        patches = resized(self._patches(self.normalisation(images)), grid)
        return standardised(patches.permute(0, 2, 3, 1).float())

    def levels(self, images: Tensor, grid: tuple[int, int], layers: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        check_layers(layers, self._depth)
        visual = self.model.visual
        trunk = visual.trunk if hasattr(visual, "trunk") else visual
        asked = sorted({*layers, self._depth})
        out = visual.forward_intermediates(
            self.normalisation(images), indices=[layer - 1 for layer in asked], intermediates_only=True
        )
        found = dict(zip(asked, out["image_intermediates"], strict=True))
        last = found[self._depth].permute(0, 2, 3, 1)
        final = trunk.norm(last) if hasattr(trunk, "norm") else trunk.ln_post(last)
        features = standardised(resized(final.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1).float())
        return [folded(found[layer], grid) for layer in layers], features

    def level_widths(self, grid: tuple[int, int], layers: tuple[int, ...]) -> list[int]:
        check_layers(layers, self._depth)
        return [self.feature_dim] * len(layers)

    def pool(self, features: Tensor, layer: int | None = None) -> Tensor:
        if not self.pools_features:
            return super().pool(features, layer)
        visual = self.model.visual
        tokens = features.flatten(1, 2)  # [B, T, C]
        if layer is None:
            tokens = unstandardised(tokens, visual.trunk.norm)
        else:
            check_layers((layer,), self._depth)
            for block in visual.trunk.blocks[layer:]:
                tokens = block(tokens)
            tokens = visual.trunk.norm(tokens)
        return visual.head(visual.trunk.forward_head(tokens))

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


def _check_open_clip_name(config: OpenClipTeacherConfig) -> None:
    """Raise ValueError where open_clip has no model or weights of a name, with the nearest of those that it has."""
    import open_clip

    if ":" in config.name:  # of a hub or a folder
        return
    name = config.name.replace("/", "-")  # as create_model does
    if name not in (models := open_clip.list_models()):
        raise ValueError(
            f"teacher.model.name={config.name!r} is no model of open_clip{_nearest(name, models)}; "
            f"`open_clip.list_models()` has the names, and one of a hub is written hf-hub:OWNER/NAME"
        )
    given, tags = config.pretrained, open_clip.list_pretrained_tags_by_model(name)
    if given is not None and given.lower().replace("-", "_") not in tags and not Path(given).is_file():
        known = f"open_clip has {', '.join(tags)}" if tags else "open_clip has none"
        raise ValueError(
            f"teacher.model.pretrained={given!r} is neither a file nor weights that open_clip knows of {config.name}; "
            f"{known}"
        )


def _nearest(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


class TransformersTeacher(Teacher):
    """Patch features of a transformers SigLIP, SigLIP2 or CLIP vision tower and its two pooled towers."""

    has_text = True

    def __init__(self, config: TransformersTeacherConfig) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        with reading_published("teacher.model.path", config.path):
            # transformers 5 takes the dtype of the file otherwise: a copy in half precision cannot be trained
            self.model, info = AutoModel.from_pretrained(config.path, dtype=torch.float32, output_loading_info=True)
            refuse_missing(info)
            if not hasattr(self.model, "vision_model"):
                raise ValueError("it has no image tower; a teacher is a SigLIP, SigLIP2 or CLIP")
            self.tokenizer = AutoTokenizer.from_pretrained(config.path)
            processor = AutoImageProcessor.from_pretrained(config.path)
        vision = self.model.config.vision_config
        self.normalisation = PixelNormalisation(
            vision.image_size,
            tuple(processor.image_mean),
            tuple(processor.image_std),
            interpolation_of(processor.resample, f"the image processor of {config.path!r}"),
        )
        self.native_grid = (vision.image_size // vision.patch_size,) * 2
        self.feature_dim = vision.hidden_size
        self.embed_dim = getattr(self.model.config, "projection_dim", None) or vision.hidden_size  # SigLIP has none
        self.pools_features = getattr(self.model.vision_model, "head", None) is not None

    def features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = self.model.vision_model(pixel_values=self.normalisation(images)).last_hidden_state
        return self._final(tokens, grid)

    def _final(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return standardised(resized(self._map(tokens), grid).permute(0, 2, 3, 1).float())

    def _map(self, tokens: Tensor) -> Tensor:
        """`[B, T, C]` -> `[B, C, h', w']`; CLIP puts a class token first, SigLIP has none."""
        height, width = self.native_grid
        return tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))

    def levels(self, images: Tensor, grid: tuple[int, int], layers: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        check_layers(layers, self.model.config.vision_config.num_hidden_layers)
        out = self.model.vision_model(pixel_values=self.normalisation(images), output_hidden_states=True)
        chosen = [out.hidden_states[layer] for layer in layers]  # the first are the embeddings, then one a block
        return [folded(self._map(state), grid) for state in chosen], self._final(out.last_hidden_state, grid)

    def level_widths(self, grid: tuple[int, int], layers: tuple[int, ...]) -> list[int]:
        check_layers(layers, self.model.config.vision_config.num_hidden_layers)
        return [self.feature_dim] * len(layers)

    def pool(self, features: Tensor, layer: int | None = None) -> Tensor:
        if not self.pools_features:
            return super().pool(features, layer)
        vision = self.model.vision_model
        tokens = features.flatten(1, 2)  # [B, T, C]
        if layer is None:
            return vision.head(unstandardised(tokens, vision.post_layernorm))
        check_layers((layer,), len(vision.encoder.layers))
        for block in vision.encoder.layers[layer:]:
            tokens = block(tokens, None)
        return vision.head(vision.post_layernorm(tokens))

    def drop_text(self) -> None:
        del self.model.text_model

    def embed_images(self, images: Tensor) -> Tensor:
        output = self.model.get_image_features(pixel_values=self.normalisation(images))
        return F.normalize(_pooled(output), dim=-1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        # SigLIP learned from texts padded to this length, which SigLIP2's tokenizer does not know
        length = self.model.config.text_config.max_position_embeddings
        padded = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        batch = self.tokenizer(texts, split_special_tokens=True, **padded)  # `</s>` in a caption is text
        device = next(self.model.parameters()).device
        return F.normalize(_pooled(self.model.get_text_features(input_ids=batch["input_ids"].to(device))), dim=-1)


def _without_markup(tokenizer: Any) -> Callable[[list[str]], Tensor]:
    """One of open_clip's tokenizers, which from here on reads `<end_of_text>` and the like in a caption as text."""
    if hasattr(tokenizer, "tokenizer"):  # of transformers
        tokenizer.tokenizer.split_special_tokens = True
        return tokenizer
    import regex  # open_clip's own, whose patterns it compiles

    markers = "|".join(tokenizer.decoder[index] for index in tokenizer.all_special_ids)
    pattern = tokenizer.pat.pattern
    assert pattern.startswith(markers), "open_clip's own BPE looks for its markers first"
    tokenizer.pat = regex.compile(pattern.removeprefix(markers + "|"), tokenizer.pat.flags)
    return tokenizer


def _pooled(output: object) -> Tensor:
    """transformers 5 returns an output object where transformers 4 returned the pooled tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output  # type: ignore[attr-defined]
