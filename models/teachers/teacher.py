"""Frozen semantic encoders, such as SigLIP in MUSE-VL: the interface of all teachers, and the published ones.

A teacher maps images in [-1, 1] to a grid of features `T` and, if it has a text tower, images and texts to a joint
space. Every teacher resizes and normalises pixels according to its own configuration, so that callers pass the same
tensors to all of them. Shape legend: B batch, h w code grid, C channels, E channels of the image-text space.
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
    """open_clip's tag of the weights, or the path of a checkpoint; `null` for random weights (tests)."""


class TransformersTeacherConfig(Config):
    """Any transformers SigLIP, SigLIP2 or CLIP model."""

    kind: Literal["transformers"] = "transformers"
    """Selects this teacher."""
    path: Annotated[str, CountsByContent()] = "google/siglip-so400m-patch14-384"
    """Hub id or local folder."""


class Teacher(nn.Module):
    """Interface of all teachers. A teacher stays in eval mode whatever the parent module does; see `freeze`."""

    feature_dim: int
    """Channels of the result of `features`."""
    embed_dim: int
    """Channels of the result of `embed_images`."""
    has_text: bool
    """Whether there is a text tower, so that `embed_texts` works."""
    pools_features = False
    """Whether `pool` works. A tower that pools through a class token cannot, since the features lack that token."""

    def features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map images `[B, 3, H, W]` in [-1, 1] to features `[B, h, w, C]`, standardised over channels."""
        raise NotImplementedError

    def levels(self, images: Tensor, grid: tuple[int, int], layers: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        """Compute intermediate features of the image tower, not normalised, and `features`, in one pass.

        Args:
            images: `[B, 3, H, W]` in [-1, 1].
            grid: rows and columns of the result; a finer level is folded into channels, a ViT's is resized.
            layers: numbers of the layers from 1: blocks of a ViT, stages of a convolutional backbone.

        Returns:
            The intermediate features `[B, h, w, C_layer]` of each of `layers`, in their order, and `features` of the
            same images.

        Raises:
            ValueError: there is no such layer.
        """
        raise NotImplementedError

    def level_widths(self, grid: tuple[int, int], layers: tuple[int, ...]) -> list[int]:
        """Return the number of channels of each of `levels`; arguments and errors as for `levels`."""
        raise NotImplementedError

    def image_tower(self) -> Teacher:
        """Return a trainable copy of the image tower; it stays in eval mode, like every teacher."""
        tower = copy.deepcopy(self)
        tower.drop_text()
        return tower.requires_grad_(True)

    def drop_text(self) -> None:
        """Remove the text tower from this copy."""
        raise NotImplementedError

    def pool(self, features: Tensor, layer: int | None = None) -> Tensor:
        """Pass features `[B, h, w, C]` through the rest of the image tower and its pooling; `[B, E]`, not normalised.

        Args:
            features: intermediate features of a layer, or without a layer what `features` returns. The latter have lost
                the scale and offset of each position, which a published tower replaces by their average values.
            layer: number of the layer; None for the final features.

        Raises:
            ValueError: this tower cannot pool its features, or not from this layer; see `pools_from`.
        """
        raise ValueError(
            f"{type(self).__name__} cannot pool its features, because they lack what its pooling reads; choose a "
            f"SigLIP, or a backbone whose head has keep_backbone"
        )

    def pools_from(self, layer: int | None) -> bool:
        """Return whether `pool` works from a layer, or for None from the final features."""
        return self.pools_features

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed images `[B, 3, H, W]` in [-1, 1] as unit vectors `[B, E]`; without a text tower, as pooled features."""
        raise NotImplementedError

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embed texts as unit vectors `[len(texts), E]` in the image-text space.

        Raises:
            ValueError: this teacher has no text tower.
        """
        raise ValueError(
            f"{type(self).__name__} has no text tower; choose a teacher with one, or a backbone with `head`"
        )

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    def freeze(self) -> Teacher:
        """Turn off gradients of all parameters, and return self."""
        return self.requires_grad_(False).eval()


def resized(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize `[B, C, h', w']` to `[B, C, h, w]`, bilinear, with antialiasing when shrinking."""
    if features.shape[-2:] == grid:
        return features
    return F.interpolate(features.float(), size=grid, mode="bilinear", align_corners=False, antialias=True)


def folded(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Convert `[B, C, h', w']` to `[B, h, w, C']`; a multiple of the grid is folded into channels without loss."""
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
    """Scale features to zero mean and unit variance over channels."""
    return F.layer_norm(features, features.shape[-1:])


def unstandardised(features: Tensor, norm: nn.Module) -> Tensor:
    """Give standardised features `[..., C]` the scale and offset that outputs of a LayerNorm have on average."""
    assert isinstance(norm, nn.LayerNorm), "towers that pool their features end with a LayerNorm"
    scale = (norm.weight.square().mean() + norm.bias.var(unbiased=False)).sqrt()
    return features * scale + norm.bias.mean()


Interpolation = Literal["bicubic", "bilinear"]
"""How images are resized to the size that a teacher was trained with, antialiased as in Pillow."""
_OTHER_NAMES: dict[object, Interpolation] = {2: "bilinear", 3: "bicubic", "random": "bicubic"}
"""Numbers of Pillow's filters; `random` is open_clip's setting for training, which evaluates with bicubic."""


def interpolation_of(name: object, source: str) -> Interpolation:
    """Return the interpolation that a teacher's own configuration names.

    Args:
        name: a word (timm, open_clip) or the number of a Pillow filter (transformers).
        source: the configuration that names it, for the message.

    Raises:
        ValueError: tensors cannot be resized with this interpolation.
    """
    found = _OTHER_NAMES.get(name, name)
    if found not in get_args(Interpolation):
        raise ValueError(
            f"{source} resizes with {name!r}, but a teacher needs bicubic (Pillow's 3) or bilinear (2); change it there"
        )
    return cast(Interpolation, found)


class PixelNormalisation(NamedTuple):
    """The input size and pixel statistics that a backbone was trained with."""

    size: int
    """Side of the square input in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation = "bicubic"

    def __call__(self, images: Tensor) -> Tensor:
        """Resize `[B, 3, H, W]` in [-1, 1] to `[B, 3, size, size]` and standardise the pixels."""
        if images.shape[-1] != self.size or images.shape[-2] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode=self.interpolation, antialias=True)
        return self.standardise(images)

    def standardise(self, images: Tensor) -> Tensor:
        """Standardise images in [-1, 1] with the mean and deviation, which are those of pixels in [0, 1]."""
        mean = images.new_tensor(self.mean).view(1, 3, 1, 1)
        std = images.new_tensor(self.std).view(1, 3, 1, 1)
        return ((images + 1) / 2 - mean) / std


class OpenClipTeacher(Teacher):
    """Patch features of an open_clip image tower, and the embeddings of its image and text towers."""

    has_text = True
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: OpenClipTeacherConfig) -> None:
        super().__init__()
        import open_clip

        _check_open_clip_name(config)
        # if there is a file of weights, reading errors come from that file
        field, name = "teacher.model.name", config.name
        if config.pretrained and Path(config.pretrained).is_file():
            field, name = "teacher.model.pretrained", config.pretrained
        with reading_published(field, name, "teacher.model.pretrained the path of its weights, or local-dir:FOLDER"):
            # open_clip moves a model to the CPU by default, which fails on the device `meta`
            self.model = open_clip.create_model(
                config.name,
                pretrained=config.pretrained,
                pretrained_text=False,  # True would fetch weights of a transformers text tower if no others are given
                device=torch.get_default_device(),
                require_pretrained=config.pretrained is not None,
            )
        self.config = config
        preprocess = open_clip.get_model_preprocess_cfg(self.model)
        size = preprocess["size"]
        self.side = size if isinstance(size, int) else size[0]
        self.interpolation = interpolation_of(preprocess["interpolation"], f"the open_clip model {config.name!r}")
        # the pixel statistics belong to the pretrained tag, so they are buffers and saved with the weights
        self.register_buffer("pixel_mean", torch.tensor(preprocess["mean"]))
        self.register_buffer("pixel_std", torch.tensor(preprocess["std"]))
        trunk = getattr(self.model.visual, "trunk", None)
        # `pool` undoes the final LayerNorm of the features; ViTamin has none there
        self.pools_features = (
            trunk is not None and trunk.num_prefix_tokens == 0 and isinstance(trunk.norm, nn.LayerNorm)
        )
        with torch.no_grad():
            probe = torch.zeros(1, 3, self.side, self.side)
            self.feature_dim = self._patches(probe).shape[1]
            self.embed_dim = self.model.encode_image(probe).shape[1]

    @property
    def normalisation(self) -> PixelNormalisation:
        """Input size and pixel statistics of the image tower."""
        mean, std = (tuple(buffer.tolist()) for buffer in (self.pixel_mean, self.pixel_std))
        return PixelNormalisation(self.side, mean, std, self.interpolation)

    @functools.cached_property
    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """The text tower's tokenizer, built on first use, because that of a SigLIP given by name comes from the hub."""
        import open_clip

        return _without_markup(open_clip.get_tokenizer(self.config.name))

    def _patches(self, pixels: Tensor) -> Tensor:
        """Compute the last layer's patch features `[B, C, h', w']` of normalised pixels."""
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
        """Number of blocks of the image tower, which is open_clip's own ViT or a wrapped one of timm."""
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
    """Raise ValueError, with the nearest known name, if open_clip has no model or weights of a name."""
    import open_clip

    if ":" in config.name:  # names a hub or a folder
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
    """Patch features of a transformers SigLIP, SigLIP2 or CLIP vision tower, and the embeddings of both towers."""

    has_text = True

    def __init__(self, config: TransformersTeacherConfig) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        with reading_published("teacher.model.path", config.path):
            # by default transformers 5 keeps the file's dtype, and a copy in half precision cannot be trained
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
        """Arrange tokens `[B, T, C]` as a map `[B, C, h', w']`, without the class token that CLIP puts first."""
        height, width = self.native_grid
        return tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))

    def levels(self, images: Tensor, grid: tuple[int, int], layers: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        check_layers(layers, self.model.config.vision_config.num_hidden_layers)
        out = self.model.vision_model(pixel_values=self.normalisation(images), output_hidden_states=True)
        chosen = [out.hidden_states[layer] for layer in layers]  # the first entry is the embeddings, then one per block
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
        # SigLIP was trained on texts padded to this length, which SigLIP2's tokenizer does not know
        length = self.model.config.text_config.max_position_embeddings
        padded = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        batch = self.tokenizer(texts, split_special_tokens=True, **padded)  # `</s>` in an untrusted caption is text
        device = next(self.model.parameters()).device
        return F.normalize(_pooled(self.model.get_text_features(input_ids=batch["input_ids"].to(device))), dim=-1)


def _without_markup(tokenizer: Any) -> Callable[[list[str]], Tensor]:
    """Make one of open_clip's tokenizers read `<end_of_text>` and other control tokens in a caption as text."""
    if hasattr(tokenizer, "tokenizer"):  # a wrapper of transformers' tokenizers
        tokenizer.tokenizer.split_special_tokens = True
        return tokenizer
    import regex  # open_clip's own, whose patterns it compiles

    markers = "|".join(tokenizer.decoder[index] for index in tokenizer.all_special_ids)
    pattern = tokenizer.pat.pattern
    assert pattern.startswith(markers), "open_clip's own BPE looks for its markers first"
    tokenizer.pat = regex.compile(pattern.removeprefix(markers + "|"), tokenizer.pat.flags)
    return tokenizer


def _pooled(output: object) -> Tensor:
    """Return the pooled tensor, which transformers 4 returns itself and transformers 5 in an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output  # type: ignore[attr-defined]
