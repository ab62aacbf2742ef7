"""Published weights under our names: what the layouts of all releases have in common.

A layout is told as sources: for each of our tensors the checkpoint's tensors that it is made of, one after another on
the first axis.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.convolutional import Downsample, ResidualBlock, SpatialAttention, Upsample

Source = tuple[str, list[str]]
"""One of our names and the checkpoint's."""
_RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "skip": "nin_shortcut"}
_SHOWN = 4
"""Most keys that an error names."""


class Release(NamedTuple):
    """What errors say about a published checkpoint."""

    name: str
    recipe: str
    """Which recipe fits which file."""


def state_of(checkpoint: Any, key: str, release: Release) -> dict[str, Tensor]:
    """The state dict of what `torch.load` gave: the dict itself, or the one under `key`.

    Raises:
        ValueError: it is no dict of tensors.
    """
    state = checkpoint.get(key, checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"the checkpoint is no dict of tensors, nor one under the key {key!r}; give a {release.name} file"
        )
    return dict(state)


def convert(
    state: Mapping[str, Tensor],
    sources: Iterable[Source],
    wanted: Mapping[str, Tensor],
    release: Release,
    unused: Collection[str] = (),
) -> dict[str, Tensor]:
    """Our tensors from a checkpoint's.

    Args:
        state: of the checkpoint.
        sources: its layout.
        wanted: our state dict, for shapes.
        release: for messages.
        unused: keys that may be there and are not needed.

    Raises:
        ValueError: keys or shapes do not fit; the message names them.
    """
    layout = dict(sources)
    named = {name for names in layout.values() for name in names}
    _refuse("lacks the keys", named - state.keys(), release)
    _refuse("has keys that this recipe's tokenizer does not", state.keys() - named - set(unused), release)
    converted = {}
    for name, theirs in layout.items():
        shape = wanted[name].shape
        try:
            value = torch.cat([state[key] for key in theirs]) if len(theirs) > 1 else state[theirs[0]]
        except RuntimeError:  # parts that do not even go together
            value = state[theirs[0]]
        if value.numel() != shape.numel():
            raise ValueError(
                f"the checkpoint's {theirs[0]!r} has shape {tuple(state[theirs[0]].shape)}, the recipe's tokenizer "
                f"needs {tuple(shape)}; compare tokenizer.conv, its quantizer and its teacher with the checkpoint"
            )
        converted[name] = value.float().reshape(shape).clone()
    return converted


def _refuse(what: str, keys: set[str], release: Release) -> None:
    if keys:
        shown = ", ".join(sorted(keys)[:_SHOWN])
        more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        raise ValueError(
            f"the checkpoint {what} {shown}{more}; it is no {release.name} tokenizer of the recipe's size, or it is "
            f"damaged: choose the recipe that fits ({release.recipe}) or fetch the file again"
        )


def decoder_names(levels: int, blocks: int, attention: bool) -> Iterator[str | None]:
    """LlamaGen's names of the layers of `ConvDecoder`, in order; None has no weights."""
    yield from ("conv_in", "mid")
    for level in range(levels):
        yield from level_names(level, blocks, attention and level == 0)
        if level < levels - 1:
            yield f"conv_blocks.{level}.upsample"
    yield from ("norm_out", None)


def level_names(level: int, blocks: int, attention: bool) -> Iterator[str]:
    """LlamaGen's names of the blocks of one resolution."""
    for block in range(blocks):
        yield f"conv_blocks.{level}.res.{block}"
        if attention:
            yield f"conv_blocks.{level}.attn.{block}"


def side_sources(
    ours: str, theirs: str, modules: Iterable[tuple[str, nn.Module]], names: Iterable[str | None]
) -> Iterator[Source]:
    """Sources of a chain of layers; both prefixes end with a dot."""
    for (number, module), name in zip(modules, names, strict=True):
        if name is not None:
            yield from module_sources(f"{ours}{number}", f"{theirs}{name}", module)


def module_sources(ours: str, theirs: str, module: nn.Module) -> Iterator[Source]:
    """Sources of one layer of the convolutional encoder or decoder."""
    if isinstance(module, nn.Sequential):
        for number, child in module.named_children():
            yield from module_sources(f"{ours}.{number}", f"{theirs}.{number}", child)
    elif isinstance(module, ResidualBlock):
        for own, other in _RESIDUAL.items():
            if not isinstance(getattr(module, own), nn.Identity):
                yield from leaves(f"{ours}.{own}", f"{theirs}.{other}")
    elif isinstance(module, SpatialAttention):
        yield from leaves(f"{ours}.norm", f"{theirs}.norm")
        for leaf in ("weight", "bias"):
            yield f"{ours}.qkv.{leaf}", [f"{theirs}.{part}.{leaf}" for part in ("q", "k", "v")]
        yield from leaves(f"{ours}.out", f"{theirs}.proj_out")
    elif isinstance(module, Downsample | Upsample):
        yield from leaves(f"{ours}.conv", f"{theirs}.conv")
    else:
        yield from leaves(ours, theirs)


def leaves(ours: str, theirs: str) -> Iterator[Source]:
    """Weight and bias."""
    for leaf in ("weight", "bias"):
        yield f"{ours}.{leaf}", [f"{theirs}.{leaf}"]
