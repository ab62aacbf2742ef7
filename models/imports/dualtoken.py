"""Conversion of DualToken's tokenizer, from the layout of its released code (github.com/songweii/DualToken).

A checkpoint of its training holds the state dict of one model under `state_dict`: the whole SigLIP with transformers'
names, a projection before and after each quantizer (`sem`, `pix`, and `shortcut` for the second pixel layer), the
quantizers, and VQGAN's decoder with a block before it. Older files spell out `semantic` and `pixel`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from models.imports.weights import (
    Release,
    TensorRule,
    convert,
    decoder_names,
    leaves,
    module_rules,
    side_rules,
)
from models.teachers.teacher import Teacher, TransformersTeacher
from models.tokenizers.config import DualTokenConfig
from models.tokenizers.residual import DualTokenTokenizer

_RELEASE = Release("DualToken", "paper-dualtoken-384 or paper-dualtoken-256 with the SigLIP that it was trained from")
_BOOKS = ("sem", "pix")
"""DualToken's names of the codebooks, in the order of `DualTokenTokenizer.book_names`."""
_MIDDLE = {"mid.0": "mid.block_1", "mid.1": "mid.attn_1", "mid.2": "mid.block_2"}
_PROJECTION = {
    "norm1": "norm1", "qkv.weight": "attn.qkv.weight", "out": "attn.proj", "norm_skip": "norm3", "skip": "proj",
    "norm2": "norm2", "mlp_norm": "mlp.norm", "gate": "mlp.w0", "up": "mlp.w1", "down": "mlp.w2",
}  # fmt: skip
"""The parts of `AttentionProjection` and their names in DualToken, where the bias of keys is a buffer of zeros."""


def convert_dualtoken(state: dict[str, Tensor], config: DualTokenConfig, teacher: Teacher) -> dict[str, Tensor]:
    """Convert DualToken's state dict into one of `DualTokenTokenizer`.

    Args:
        state: the state dict of DualToken's model.
        config: the config of the tokenizer that will load the result.
        teacher: the SigLIP that DualToken was trained from, for the names and shapes of the tower.

    Raises:
        ValueError: the teacher is of another kind, or keys or shapes do not fit; the message names them.
    """
    if not config.released_layout or len(config.pixel_layers) != 2 or config.semantic_layer is None:
        raise ValueError(
            "DualToken's checkpoints need tokenizer.released_layout=true, two pixel_layers and a semantic_layer, as "
            "paper-dualtoken-384 has them"
        )
    if not isinstance(teacher, TransformersTeacher):
        raise ValueError(
            "DualToken's checkpoints name the tower as transformers does; set teacher.model to {kind: transformers, "
            "path: FOLDER} with the folder of the SigLIP that it was trained from"
        )
    with torch.device("meta"):
        tokenizer = DualTokenTokenizer(config, teacher)
    wanted = tokenizer.state_dict()
    state = _plain(state, config.residual.shared)
    unused = {key for key in state if key.startswith("siglip_model.text_model.") or key.endswith(".position_ids")}
    unused |= {key for key in state if key.startswith("quantizer_") and not key.endswith(".weight")}
    converted = convert(state, _rules(tokenizer, wanted), wanted, _RELEASE, unused)
    if config.residual.update == "ema":
        converted |= _averages(state, converted, wanted)
    return converted


def _plain(state: dict[str, Tensor], shared: bool) -> dict[str, Tensor]:
    """Return the state with today's names, without the padding rows of codebooks and without repeated codebooks."""
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.replace("semantic", "sem").replace("pixel", "pix")
        plain[name] = value[:-1] if re.fullmatch(r"quantizer_\w+\.codebooks\.\d+\.weight", name) else value
    if not shared:
        return plain
    for name in [name for name in plain if re.match(r"quantizer_\w+\.codebooks\.[1-9]", name)]:
        first = re.sub(r"codebooks\.\d+", "codebooks.0", name)
        if first in plain and not torch.equal(plain[name], plain[first]):
            raise ValueError(
                f"the checkpoint's {name!r} differs from {first!r}: its depths have codebooks of their own; set "
                f"tokenizer.residual.shared=false"
            )
        del plain[name]
    return plain


def _rules(tokenizer: DualTokenTokenizer, wanted: dict[str, Tensor]) -> Iterator[TensorRule]:
    for name in wanted:
        if name.startswith("tower.model."):
            yield name, [f"siglip_model.{name.removeprefix('tower.model.')}"]
    projections = {
        "pre_quant_semantic": "prequant_sem",
        "pre_quant_pixel.0": "prequant_pix",
        "pre_quant_pixel.1": "prequant_shortcut",
        "post_quant_semantic": "postquant_sem",
        "post_quant_pixel": "postquant_pix",
    }
    for ours, theirs in projections.items():
        yield from _projection(ours, theirs)
    for number, book in enumerate(_BOOKS):
        for depth in range(len(tokenizer.book(number).books)):
            yield f"quantizers.{number}.books.{depth}.codebook", [f"quantizer_{book}.codebooks.{depth}.weight"]
    yield from module_rules("to_decoder", "post_quant_conv", tokenizer.to_decoder)
    config = tokenizer.config.conv
    levels = len(config.channel_multipliers)
    names = decoder_names(levels, config.decoder_blocks, config.attention)
    layers = tokenizer.decoder.layers.named_children()
    for ours, parts in side_rules("decoder.layers.", "decoder.", layers, names):
        yield ours, [_vqgan_name(part, levels) for part in parts]
    yield from leaves("decoder.to_rgb", "decoder.conv_out")


def _projection(ours: str, theirs: str) -> Iterator[TensorRule]:
    yield f"{ours}.qkv.bias", [f"{theirs}.attn.{part}" for part in ("q_bias", "zero_k_bias", "v_bias")]
    for own, other in _PROJECTION.items():
        if own.endswith(".weight"):
            yield f"{ours}.{own}", [f"{theirs}.{other}"]
        else:
            yield from leaves(f"{ours}.{own}", f"{theirs}.{other}")


def _vqgan_name(name: str, levels: int) -> str:
    """Translate LlamaGen's name of a decoder tensor to VQGAN's, which counts levels from the highest resolution."""
    for other, own in _MIDDLE.items():
        name = name.replace(f"decoder.{other}.", f"decoder.{own}.")
    found = re.match(r"decoder\.conv_blocks\.(\d+)\.(.*)", name)
    if not found:
        return name
    return f"decoder.up.{levels - 1 - int(found[1])}.{found[2].replace('res.', 'block.', 1)}"


def _averages(state: dict[str, Tensor], converted: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the EMA statistics of the codebooks, for further training; made from the codes if the release has none."""
    found = {}
    for number, book in enumerate(_BOOKS):
        for name in [name for name in wanted if re.fullmatch(rf"quantizers\.{number}\.books\.\d+\.codebook", name)]:
            ours = name.removesuffix("codebook")
            theirs = f"quantizer_{book}.codebooks.{ours.split('.')[3]}."
            codebook = converted[name]
            counts = state.get(f"{theirs}cluster_size_ema", torch.ones(len(codebook))).float()
            found[f"{ours}ema_counts"] = counts.clone()
            # sums divided by counts must give the codes; the release smooths its counts before that division
            found[f"{ours}ema_sums"] = codebook * counts[:, None]
            found[f"{ours}initialised"] = torch.ones((), dtype=torch.bool)
    return found
