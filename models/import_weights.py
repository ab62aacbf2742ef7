"""Published tokenizer weights under our names. LlamaGen's layout is that of the checkpoints of its VQ-8 and VQ-16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.convolutional import Downsample, ResidualBlock, SpatialAttention, Upsample
from models.image_tokenizer import TokenizerConfig
from models.tokenizers import VqganTokenizer

_RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "skip": "nin_shortcut"}
_UNUSED = {"quantize.codebook_used"}
"""Statistics of LlamaGen's training."""
_SHOWN = 4
"""Most keys that an error names."""


def convert_llamagen(checkpoint: Any, config: TokenizerConfig) -> dict[str, Tensor]:
    """A state dict of `VqganTokenizer` from a LlamaGen checkpoint.

    Args:
        checkpoint: what `torch.load` gave: the state dict, or a dict that holds it under `model`.
        config: of the tokenizer that it is for.

    Raises:
        ValueError: the config is of another kind, or keys or shapes do not fit; the message names them.
    """
    if config.kind != "vqgan":
        raise ValueError(f"LlamaGen's checkpoints are of tokenizer.kind=vqgan, the recipe has {config.kind}")
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping):
        raise ValueError("the checkpoint is no dict of tensors, nor one under the key 'model'; give a LlamaGen file")
    with torch.device("meta"):
        tokenizer = VqganTokenizer(config)
    wanted = {name: tuple(value.shape) for name, value in tokenizer.state_dict().items()}
    sources = dict(_sources(tokenizer))
    named = {name for names in sources.values() for name in names}
    _refuse("lacks the keys", named - state.keys())
    _refuse("has keys that this recipe's tokenizer does not", state.keys() - named - _UNUSED)
    converted = {}
    for name, theirs in sources.items():
        value = torch.cat([state[key] for key in theirs]).float()
        if value.numel() != torch.Size(wanted[name]).numel():
            raise ValueError(
                f"the checkpoint's {theirs[0]!r} has shape {tuple(state[theirs[0]].shape)}, the recipe's tokenizer "
                f"needs {wanted[name]}; compare tokenizer.conv and tokenizer.quantizer with the checkpoint"
            )
        converted[name] = value.reshape(wanted[name])
    if config.quantizer.update == "ema":
        codebook = converted["quantizer.codebook"]
        converted["quantizer.ema_counts"] = torch.ones(len(codebook))
        converted["quantizer.ema_sums"] = codebook.clone()
        converted["quantizer.initialised"] = torch.ones((), dtype=torch.bool)
    return converted


def _refuse(what: str, keys: set[str]) -> None:
    if keys:
        shown = ", ".join(sorted(keys)[:_SHOWN])
        more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        raise ValueError(
            f"the checkpoint {what} {shown}{more}; it is no LlamaGen tokenizer of the recipe's size, or it is damaged: "
            f"choose the recipe that fits (paper-vqgan-256 for vq_ds16_c2i.pt) or fetch the file again"
        )


def _sources(tokenizer: VqganTokenizer) -> Iterator[tuple[str, list[str]]]:
    """For each of our tensors the checkpoint's tensors that it is made of, one after another on the first axis."""
    config = tokenizer.config.conv
    levels = len(config.channel_multipliers)
    encoder = list(tokenizer.encoder.layers.named_children())[1:]  # the first only folds pixels
    yield from _side("encoder", "layers.", encoder, _encoder_names(levels, config.encoder_blocks, config.attention))
    decoder = list(tokenizer.decoder.layers.named_children())
    yield from _side("decoder", "layers.", decoder, _decoder_names(levels, config.decoder_blocks, config.attention))
    yield from _leaves("decoder.to_rgb", "decoder.conv_out")
    yield from _leaves("pre_quant", "quant_conv")
    yield from _leaves("post_quant", "post_quant_conv")
    yield "quantizer.codebook", ["quantize.embedding.weight"]


def _encoder_names(levels: int, blocks: int, attention: bool) -> Iterator[str | None]:
    yield "conv_in"
    for level in range(levels):
        yield from _level(level, blocks, attention and level == levels - 1)
        if level < levels - 1:
            yield f"conv_blocks.{level}.downsample"
    yield from ("mid", "norm_out", None, "conv_out")


def _decoder_names(levels: int, blocks: int, attention: bool) -> Iterator[str | None]:
    yield from ("conv_in", "mid")
    for level in range(levels):
        yield from _level(level, blocks, attention and level == 0)
        if level < levels - 1:
            yield f"conv_blocks.{level}.upsample"
    yield from ("norm_out", None)


def _level(level: int, blocks: int, attention: bool) -> Iterator[str]:
    for block in range(blocks):
        yield f"conv_blocks.{level}.res.{block}"
        if attention:
            yield f"conv_blocks.{level}.attn.{block}"


def _side(
    side: str, prefix: str, modules: list[tuple[str, nn.Module]], names: Iterator[str | None]
) -> Iterator[tuple[str, list[str]]]:
    for (number, module), theirs in zip(modules, names, strict=True):
        if theirs is not None:  # an activation has no weights
            yield from _module(f"{side}.{prefix}{number}", f"{side}.{theirs}", module)


def _module(ours: str, theirs: str, module: nn.Module) -> Iterator[tuple[str, list[str]]]:
    if isinstance(module, nn.Sequential):
        for number, child in module.named_children():
            yield from _module(f"{ours}.{number}", f"{theirs}.{number}", child)
    elif isinstance(module, ResidualBlock):
        for own, other in _RESIDUAL.items():
            if not isinstance(getattr(module, own), nn.Identity):
                yield from _leaves(f"{ours}.{own}", f"{theirs}.{other}")
    elif isinstance(module, SpatialAttention):
        yield from _leaves(f"{ours}.norm", f"{theirs}.norm")
        for leaf in ("weight", "bias"):
            yield f"{ours}.qkv.{leaf}", [f"{theirs}.{part}.{leaf}" for part in ("q", "k", "v")]
        yield from _leaves(f"{ours}.out", f"{theirs}.proj_out")
    elif isinstance(module, Downsample | Upsample):
        yield from _leaves(f"{ours}.conv", f"{theirs}.conv")
    else:
        yield from _leaves(ours, theirs)


def _leaves(ours: str, theirs: str) -> Iterator[tuple[str, list[str]]]:
    for leaf in ("weight", "bias"):
        yield f"{ours}.{leaf}", [f"{theirs}.{leaf}"]
