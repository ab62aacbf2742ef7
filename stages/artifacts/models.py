"""Saving models as files of artifacts and loading them: safetensors for weights, JSON for the rest."""

from __future__ import annotations

import json
import logging
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.imports.weights import Weights, weights_of
from models.published import LFS_POINTER, LFS_REMEDY
from models.teachers.backbone import BackboneTeacher, BackboneTeacherConfig
from models.teachers.open_clip_folder import read_open_clip_folder
from models.teachers.teacher import (
    OpenClipTeacher,
    OpenClipTeacherConfig,
    PixelNormalisation,
    Teacher,
    TransformersTeacher,
    TransformersTeacherConfig,
)
from models.tokenizers.image_tokenizer import ImageTokenizer
from models.tokenizers.kinds import KINDS, build_tokenizer, tokenizer_config
from stages.protocol import StageContext
from storage.digests import canonical_json
from storage.manifest import FileEntry, Manifest
from storage.store import Store

logger = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"
TEACHER_STAGE = "prepare_teacher"
_HEAD_BYTES = 512
"""Number of bytes of a weights file that are read to recognise its format."""


def put_weights(context: StageContext[Any], module: nn.Module, path: str = WEIGHTS) -> FileEntry:
    """Save a module's parameters and buffers as safetensors in the store."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    local = context.scratch / path.replace("/", "_")
    save_file(tensors, local)
    return context.store.put_file(local, path)


def put_json(store: Store, value: Any, path: str) -> FileEntry:
    """Save a value as canonical JSON in the store."""
    return store.put_bytes(canonical_json(value), path)


def read_json(store: Store, manifest: Manifest, path: str) -> Any:
    """Read a JSON file of an artifact."""
    return json.loads(store.read_bytes(manifest.file(path)))


def read_weights(store: Store, manifest: Manifest, path: str = WEIGHTS) -> dict[str, Tensor]:
    """Read a safetensors file of an artifact."""
    return load_file(store.fetch(manifest.file(path)))


def read_state(path: str | Path, field: str = "weights file") -> dict[str, Tensor]:
    """Return the weights of a local file; arguments and errors as for `read_checkpoint`."""
    found = read_checkpoint(path, field)
    if found.taken:
        logger.info("%s=%s: %s", field, path, described(found))
    return found.tensors


def described(found: Weights) -> str:
    """Describe which of a checkpoint's weights were taken."""
    others = ", ".join(repr(key) for key in found.others)
    return f"took the weights under {found.taken!r}" + (f"; the file also has {others}" if others else "")


def read_checkpoint(path: str | Path, field: str, which: str | None = None) -> Weights:
    """Return the weights of a local file: safetensors, or what `torch.load(weights_only=True)` accepts.

    Args:
        path: path of the file, whose format is recognised by its content.
        field: name of the file in messages, for example a field of the recipe.
        which: key of the weights, as in `models.imports.weights.weights_of`.

    Raises:
        ValueError: the file does not exist, is damaged or holds no weights, holds objects whose loading can run code,
            or values that are not finite; the message says which.
    """
    label = f"{field}={str(path)!r}"
    if Path(path).is_dir():
        raise ValueError(f"{label} is a folder; give the path of the .safetensors or .pth file in it")
    if not Path(path).is_file():
        raise ValueError(f"{label} does not exist; give the path of a .safetensors or .pth file")
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(LFS_POINTER):
        raise ValueError(f"{label} {LFS_REMEDY}")
    if head.lstrip().startswith(b"<"):
        raise ValueError(f"{label} is a web page, no weights; fetch the file by the link that downloads it")
    try:
        checkpoint = load_file(path) if head[8:9] == b"{" else _load_tensors(path)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make an unpickler raise KeyError, EOFError, RuntimeError, ...
        raise ValueError(f"{label} {_why_unreadable(error)}") from error
    try:
        return weights_of(checkpoint, which)
    except ValueError as error:
        raise ValueError(f"{label} {error}") from error


def _load_tensors(path: str | Path) -> Any:
    # LlamaGen and many others save their arguments with the weights; a Namespace only holds named values
    with torch.serialization.safe_globals([Namespace]), open(path, "rb") as file:  # a path's suffix would matter
        return torch.load(file, weights_only=True, map_location="cpu")


def _why_unreadable(error: Exception) -> str:
    """Return what is wrong with a file that cannot be loaded, without torch's advice to load it unsafely."""
    text = str(error)
    if refused := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"holds more than tensors ({refused[1]}), and to load such a thing can run code that is in the file; take "
            f"a .safetensors file of the same weights, or have whoever made it save the state dict alone: "
            f"torch.save(model.state_dict(), FILE)"
        )
    if "TorchScript" in text:
        return "is a TorchScript program, no weights; give the state dict of the model that it was made from"
    reason = " ".join(text.split("\n\nCheck the documentation")[0].split("\n\n")[-1].split())
    reason = reason.split(". ")[0][:200]
    if not reason or "weights_only" in reason or reason.startswith("Unsupported operand"):
        reason = f"its bytes are none that PyTorch or safetensors wrote ({type(error).__name__})"
    return f"is damaged, or no weights: {reason}; fetch the file again"


def load_teacher(store: Store, manifest: Manifest) -> Teacher:
    """Load the frozen teacher of a `teacher` artifact, without any download.

    Raises:
        ValueError: the artifact's description names an unknown kind.
    """
    description = read_json(store, manifest, "teacher.json")
    config = description["config"]
    if config["kind"] == "transformers":
        with store.scratch_dir() as folder:
            store.materialise(manifest, folder, "model")
            published = TransformersTeacher(TransformersTeacherConfig(path=str(folder / "model")))
        published.normalisation = _as_prepared(published.normalisation, description)
        return published.freeze()
    teacher: Teacher
    if config["kind"] == "open_clip":
        teacher = _open_clip_teacher(store, manifest, config)
    elif config["kind"] == "backbone":
        teacher = BackboneTeacher(BackboneTeacherConfig(**config), None, description["words"])
        teacher.normalisation = _as_prepared(teacher.normalisation, description)
    else:
        raise ValueError(
            f"teacher artifact {manifest.digest[:12]} has unknown kind {config['kind']!r}; it needs a newer musevl"
        )
    teacher.load_state_dict(read_weights(store, manifest))
    return teacher.freeze()


def _open_clip_teacher(store: Store, manifest: Manifest, config: dict[str, Any]) -> OpenClipTeacher:
    """Build the teacher with random weights; older artifacts without a folder name a model of open_clip instead."""
    if "name" in config:
        return OpenClipTeacher(OpenClipTeacherConfig(**config, pretrained=None))
    with store.scratch_dir() as folder:
        store.materialise(manifest, folder, "model")
        return read_open_clip_folder(folder / "model")


def _as_prepared(normalisation: PixelNormalisation, description: dict[str, Any]) -> PixelNormalisation:
    """Set the interpolation that the artifact's tokenizers were trained with, whatever its model's config says.

    Without an entry it is bicubic, the most frequent one and the only one of older artifacts.
    """
    return normalisation._replace(interpolation=description.get("interpolation", "bicubic"))


def load_tokenizer(store: Store, digest: str) -> ImageTokenizer:
    """Load the tokenizer of a `tokenizer` artifact with its teacher, in eval mode on the CPU.

    Args:
        store: the store with both artifacts.
        digest: digest of the tokenizer artifact.

    Raises:
        ValueError: the artifact is of another kind.
    """
    manifest = store.load(digest)
    if manifest.kind != "tokenizer":
        raise ValueError(
            f"artifact {digest[:12]} is of kind {manifest.kind!r}, not a tokenizer; codes of another project "
            f"(tokenizer.kind=external) can be read, but neither encoded nor decoded"
        )
    config = tokenizer_config(read_json(store, manifest, "tokenizer.json"))
    has_teacher = KINDS[config.kind].needs_teacher
    teacher = load_teacher(store, store.load(manifest.inputs[TEACHER_STAGE])) if has_teacher else None
    tokenizer = build_tokenizer(config, teacher)
    tokenizer.load_state_dict(read_weights(store, manifest))
    return tokenizer.eval().requires_grad_(False)
