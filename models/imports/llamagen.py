"""Conversion of LlamaGen's tokenizers: the layout of the checkpoints of its VQ-8 and VQ-16."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import torch
from torch import Tensor

from models.imports.weights import Release, TensorRule, convert, decoder_names, leaves, level_names, side_rules
from models.tokenizers.config import VqganConfig
from models.tokenizers.one_code import VqganTokenizer
from models.tokenizers.quantizers import VectorQuantizerConfig

_RELEASE = Release("LlamaGen", "paper-vqgan-256 for vq_ds16_c2i.pt")
_BLOCK = re.compile(r"(.*?)(encoder|decoder)\.conv_blocks\.(\d+)\.res\.(\d+)\.conv2\.weight")
"""The last weight of a residual block; groups: prefix of the name, encoder or decoder, level, number of the block."""
_UNUSED = {"quantize.codebook_used"}
"""Statistics of LlamaGen's training, which are not converted."""


def convert_llamagen(state: dict[str, Tensor], config: VqganConfig) -> dict[str, Tensor]:
    """Convert LlamaGen's state dict into one of `VqganTokenizer`.

    Args:
        state: the state dict of LlamaGen's tokenizer.
        config: the config of the tokenizer that will load the result.

    Raises:
        ValueError: keys or shapes do not fit; the message names them and, if they can be inferred from the shapes, the
            settings that fit.
    """
    if not isinstance(config.quantizer, VectorQuantizerConfig):
        raise ValueError(
            f"LlamaGen's checkpoints have a codebook; the recipe has tokenizer.quantizer.kind={config.quantizer.kind}, "
            f"set it to nearest"
        )
    with torch.device("meta"):
        tokenizer = VqganTokenizer(config)
    remedy = _fitting_settings(state, config)
    converted = convert(state, _rules(tokenizer), tokenizer.state_dict(), _RELEASE, _UNUSED, remedy)
    if config.quantizer.update == "ema":
        codebook = converted["quantizer.codebook"]
        converted["quantizer.ema_counts"] = torch.ones(len(codebook))
        converted["quantizer.ema_sums"] = codebook.clone()
        converted["quantizer.initialised"] = torch.ones((), dtype=torch.bool)
    return converted


def _fitting_settings(state: dict[str, Tensor], config: VqganConfig) -> str:
    """Return the overrides that give the recipe's tokenizer the checkpoint's shapes; '' if they cannot be inferred."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    found = [match for match in map(_BLOCK.fullmatch, shapes) if match]
    prefix = found[0][1] if found else ""
    first, last, book = (
        shapes.get(f"{prefix}{name}.weight") for name in ("encoder.conv_in", "encoder.conv_out", "quantize.embedding")
    )
    if not found or first is None or last is None or book is None:
        return ""
    widths = {int(match[3]): shapes[match[0]][0] for match in found if match[2] == "encoder" and match[4] == "0"}
    given = {
        "tokenizer.conv.channels": (config.conv.channels, first[0]),
        "tokenizer.conv.channel_multipliers": (
            list(config.conv.channel_multipliers),
            [widths[level] // first[0] for level in sorted(widths)],
        ),
        "tokenizer.conv.latent_channels": (config.conv.latent_channels, last[0]),
        "tokenizer.quantizer.codebook_size": (config.quantizer.codebook_size, book[0]),
        "tokenizer.quantizer.code_dim": (config.quantizer.code_dim, book[1]),
    }
    for side, number in (("encoder", config.conv.encoder_blocks), ("decoder", config.conv.decoder_blocks)):
        blocks_there = {int(match[4]) for match in found if match[2] == side and match[3] == "0"}
        given[f"tokenizer.conv.{side}_blocks"] = (number, len(blocks_there))
    changes = [f"{name}={theirs}".replace(" ", "") for name, (ours, theirs) in given.items() if ours != theirs]
    settings = " ".join(f"--set {shlex.quote(change)}" for change in changes)
    return f"by its shapes it is the one of {settings}" if changes else ""


def _rules(tokenizer: VqganTokenizer) -> Iterator[TensorRule]:
    config = tokenizer.config.conv
    levels = len(config.channel_multipliers)
    encoder = list(tokenizer.encoder.layers.named_children())[1:]  # the first, PixelUnshuffle, has no weights
    names = _encoder_names(levels, config.encoder_blocks, config.attention)
    yield from side_rules("encoder.layers.", "encoder.", encoder, names)
    decoder = tokenizer.decoder.layers.named_children()
    names = decoder_names(levels, config.decoder_blocks, config.attention)
    yield from side_rules("decoder.layers.", "decoder.", decoder, names)
    yield from leaves("decoder.to_rgb", "decoder.conv_out")
    yield from leaves("pre_quant", "quant_conv")
    yield from leaves("post_quant", "post_quant_conv")
    yield "quantizer.codebook", ["quantize.embedding.weight"]


def _encoder_names(levels: int, blocks: int, attention: bool) -> Iterator[str | None]:
    yield "conv_in"
    for level in range(levels):
        yield from level_names(level, blocks, attention and level == levels - 1)
        if level < levels - 1:
            yield f"conv_blocks.{level}.downsample"
    yield from ("mid", "norm_out", None, "conv_out")
