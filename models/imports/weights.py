"""What the conversions of published weights have in common.

The layout of a checkpoint is described by rules: for each tensor of our state dict, a rule names the checkpoint's
tensors that are concatenated along the first axis to make it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.published import listed, refuse_not_finite
from models.tokenizers.convolutional import Downsample, ResidualBlock, SpatialAttention, Upsample

TensorRule = tuple[str, list[str]]
"""The name of a tensor in our state dict, and the names of the checkpoint's tensors that it is made of."""
_RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "skip": "nin_shortcut"}
_PREFERRED = (
    "ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "state_dict", "model_state_dict", "model",
    "module",
)  # fmt: skip
"""Keys under which training code saves weights, the averaged ones first."""
_COMPILED, _PARALLEL = "_orig_mod", "module"
"""Parts of a name that torch.compile and DistributedDataParallel add; AveragedModel adds the same as the latter."""
_COUNT = "n_averaged"
"""Buffer of AveragedModel that is not a weight: the number of updates."""


class Release(NamedTuple):
    """A published checkpoint, as error messages describe it."""

    name: str
    """Name of the project that published it."""
    recipe: str
    """Which recipe fits which file."""


class Weights(NamedTuple):
    """The weights of a checkpoint, without the optimiser state and whatever else its training saved."""

    tensors: dict[str, Tensor]
    """Tensors by name, without the prefixes that wrappers add."""
    taken: str
    """Key of the checkpoint that held them; empty if the checkpoint itself is the state dict."""
    others: tuple[str, ...]
    """Other keys of the checkpoint that hold weights, which were not taken."""


def weights_of(checkpoint: Any, which: str | None = None) -> Weights:
    """Return the weights of a checkpoint that `torch.load` has read.

    A training checkpoint holds them under a key. Averaged weights (`ema`) take precedence over the last ones (`model`,
    `state_dict`), as in the loaders of such projects.

    Args:
        checkpoint: a dict of tensors, or a dict that contains such dicts.
        which: the key to take instead of that choice.

    Raises:
        ValueError: it holds no weights, or none under this key, or several networks of which none is preferred, or
            values that are not finite.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"holds a {type(checkpoint).__name__}, no state dict; give a dict of tensors")
    nested = [str(key) for key, value in checkpoint.items() if _has_tensors(value)]
    taken = which if which is not None else next((key for key in _PREFERRED if key in nested), "")
    if which is not None and which not in nested:
        raise ValueError(f"holds no weights under the key {which!r}; it has {listed(nested) or 'none under any key'}")
    if not taken and not _has_tensors(checkpoint):
        if not nested:
            raise ValueError(f"holds no dict of tensors, only {listed(map(repr, checkpoint)) or 'an empty dict'}")
        if len(nested) > 1:
            raise ValueError(
                f"holds several networks ({listed(nested)}); `musevl import-tokenizer --which` takes one of them, "
                f"elsewhere give a file with that one alone"
            )
        taken = nested[0]
    chosen = checkpoint[taken] if taken else checkpoint
    tensors = _unwrapped({str(name): value for name, value in chosen.items() if isinstance(value, Tensor)})
    try:
        refuse_not_finite(tensors)
    except ValueError as error:
        raise ValueError(f"{error}; take an earlier checkpoint, or fetch the file again") from error
    return Weights(tensors, taken, tuple(key for key in nested if key != taken))


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove what DistributedDataParallel, torch.compile and AveragedModel add to the names."""
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        parts = [part for part in name.split(".") if part != _COMPILED]
        while len(parts) > 1 and parts[0] == _PARALLEL:
            del parts[0]
        own = ".".join(parts)
        if own in plain:
            raise ValueError(f"holds {own!r} twice, with and without a wrapper's prefix; save the state dict again")
        plain[own] = value
    return plain


def convert(
    state: Mapping[str, Tensor],
    rules: Iterable[TensorRule],
    wanted: Mapping[str, Tensor],
    release: Release,
    unused: Collection[str] = (),
    remedy: str = "",
) -> dict[str, Tensor]:
    """Convert a checkpoint's tensors into our state dict.

    Args:
        state: the checkpoint's tensors, as `weights_of` returns them. If the network is a part of the saved model, as
            in a LightningModule, its names have a prefix and the other parts are ignored.
        rules: the layout of the checkpoint.
        wanted: our state dict, for the shapes.
        release: describes the checkpoint in messages.
        unused: keys that the checkpoint may hold and that are not converted.
        remedy: what to do if the checkpoint does not fit, if the caller knows more than this function.

    Raises:
        ValueError: keys or shapes do not fit; the message names them.
    """
    layout = dict(rules)
    named = {name for names in layout.values() for name in names}
    state = _part(state, named)
    _refuse("lacks the keys", named - state.keys(), release, remedy)
    _refuse("has keys that this recipe's tokenizer does not", state.keys() - named - {*unused, _COUNT}, release, remedy)
    converted = {}
    for name, theirs in layout.items():
        shape = wanted[name].shape
        try:
            value = torch.cat([state[key] for key in theirs]) if len(theirs) > 1 else state[theirs[0]]
        except RuntimeError:  # the parts cannot be concatenated; the message names the first one
            value = state[theirs[0]]
        if value.numel() != shape.numel():
            remedy = remedy or "compare tokenizer.conv, its quantizer and its teacher with the checkpoint"
            raise ValueError(
                f"the checkpoint's {theirs[0]!r} has shape {tuple(state[theirs[0]].shape)}, the recipe's tokenizer "
                f"needs {tuple(shape)}; {remedy}"
            )
        converted[name] = value.float().reshape(shape).clone()
    return converted


def _part(state: Mapping[str, Tensor], named: Collection[str]) -> Mapping[str, Tensor]:
    """Return the state of the only part of a larger model that has all these names, without the part's prefix."""
    some = min(named)
    if some in state:
        return state
    prefixes = [name.removesuffix(some) for name in state if name.endswith(f".{some}")]
    whole = [prefix for prefix in prefixes if all(f"{prefix}{name}" in state for name in named)]
    if len(whole) != 1:
        return state
    return {name.removeprefix(whole[0]): value for name, value in state.items() if name.startswith(whole[0])}


def _refuse(what: str, keys: set[str], release: Release, remedy: str) -> None:
    if keys:
        fitting = f"or it is damaged: choose the recipe that fits ({release.recipe}) or fetch the file again"
        raise ValueError(
            f"the checkpoint {what} {listed(sorted(keys))}; it is no {release.name} tokenizer of the recipe's size"
            + (f": {remedy}" if remedy else f", {fitting}")
        )


def decoder_names(levels: int, blocks: int, attention: bool) -> Iterator[str | None]:
    """Yield LlamaGen's names for the layers of `ConvDecoder`, in order; None stands for a layer without weights."""
    yield from ("conv_in", "mid")
    for level in range(levels):
        yield from level_names(level, blocks, attention and level == 0)
        if level < levels - 1:
            yield f"conv_blocks.{level}.upsample"
    yield from ("norm_out", None)


def level_names(level: int, blocks: int, attention: bool) -> Iterator[str]:
    """Yield LlamaGen's names for the blocks of one resolution."""
    for block in range(blocks):
        yield f"conv_blocks.{level}.res.{block}"
        if attention:
            yield f"conv_blocks.{level}.attn.{block}"


def side_rules(
    ours: str, theirs: str, modules: Iterable[tuple[str, nn.Module]], names: Iterable[str | None]
) -> Iterator[TensorRule]:
    """Yield the rules of a sequence of layers; both prefixes end with a dot."""
    for (number, module), name in zip(modules, names, strict=True):
        if name is not None:
            yield from module_rules(f"{ours}{number}", f"{theirs}{name}", module)


def module_rules(ours: str, theirs: str, module: nn.Module) -> Iterator[TensorRule]:
    """Yield the rules of one layer of the convolutional encoder or decoder."""
    if isinstance(module, nn.Sequential):
        for number, child in module.named_children():
            yield from module_rules(f"{ours}.{number}", f"{theirs}.{number}", child)
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


def leaves(ours: str, theirs: str) -> Iterator[TensorRule]:
    """Yield the rules of a layer's weight and bias."""
    for leaf in ("weight", "bias"):
        yield f"{ours}.{leaf}", [f"{theirs}.{leaf}"]
