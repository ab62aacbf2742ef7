"""LlamaGen's tokenizers under our names: the layout of the checkpoints of its VQ-8 and VQ-16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from models.image_tokenizer import TokenizerConfig
from models.import_weights import Release, Source, convert, decoder_names, leaves, level_names, side_sources, state_of
from models.tokenizers import VqganTokenizer

_RELEASE = Release("LlamaGen", "paper-vqgan-256 for vq_ds16_c2i.pt")
_UNUSED = {"quantize.codebook_used"}
"""Statistics of LlamaGen's training."""


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
    state = state_of(checkpoint, "model", _RELEASE)
    with torch.device("meta"):
        tokenizer = VqganTokenizer(config)
    converted = convert(state, _sources(tokenizer), tokenizer.state_dict(), _RELEASE, _UNUSED)
    if config.quantizer.update == "ema":
        codebook = converted["quantizer.codebook"]
        converted["quantizer.ema_counts"] = torch.ones(len(codebook))
        converted["quantizer.ema_sums"] = codebook.clone()
        converted["quantizer.initialised"] = torch.ones((), dtype=torch.bool)
    return converted


def _sources(tokenizer: VqganTokenizer) -> Iterator[Source]:
    config = tokenizer.config.conv
    levels = len(config.channel_multipliers)
    encoder = list(tokenizer.encoder.layers.named_children())[1:]  # the first only folds pixels
    names = _encoder_names(levels, config.encoder_blocks, config.attention)
    yield from side_sources("encoder.layers.", "encoder.", encoder, names)
    decoder = tokenizer.decoder.layers.named_children()
    names = decoder_names(levels, config.decoder_blocks, config.attention)
    yield from side_sources("decoder.layers.", "decoder.", decoder, names)
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
