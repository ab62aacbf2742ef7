"""Models to files of an artifact and back: safetensors for weights, JSON for the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.backbone_teacher import BackboneTeacher, BackboneTeacherConfig
from models.image_tokenizer import ImageTokenizer, TokenizerConfig
from models.open_clip_folder import read_open_clip_folder
from models.teachers import (
    OpenClipTeacher,
    OpenClipTeacherConfig,
    PixelNormalisation,
    Teacher,
    TransformersTeacher,
    TransformersTeacherConfig,
)
from models.tokenizers import KINDS, build_tokenizer
from stages.stage import StageContext
from storage.digests import canonical_json
from storage.manifest import FileEntry, Manifest
from storage.store import Store

WEIGHTS = "weights.safetensors"
TEACHER_STAGE = "prepare_teacher"
_REFUSED = re.compile(r"GLOBAL ([\w.]+) was not an allowed global")
"""What torch says of an object that it does not load with `weights_only`."""


def put_weights(context: StageContext[Any], module: nn.Module, path: str = WEIGHTS) -> FileEntry:
    """Save a module's parameters and buffers as safetensors into the store."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    local = context.scratch / path.replace("/", "_")
    save_file(tensors, local)
    return context.store.put_file(local, path)


def put_json(store: Store, value: Any, path: str) -> FileEntry:
    """Save a value as canonical JSON into the store."""
    return store.put_bytes(canonical_json(value), path)


def read_json(store: Store, manifest: Manifest, path: str) -> Any:
    """Read a JSON file of an artifact."""
    return json.loads(store.read_bytes(manifest.file(path)))


def read_weights(store: Store, manifest: Manifest, path: str = WEIGHTS) -> dict[str, Tensor]:
    """Read a safetensors file of an artifact."""
    return load_file(store.fetch(manifest.file(path)))


def read_state(path: str | Path, field: str = "weights file") -> dict[str, Any]:
    """A state dict from a local `.safetensors` file, or any other that `torch.load(weights_only=True)` reads.

    Args:
        path: of the file.
        field: how messages name it, a field of the recipe for example.

    Raises:
        ValueError: there is no such file, it is damaged, or it holds other things than tensors; the message says which.
    """
    label = f"{field}={str(path)!r}"
    if not Path(path).is_file():
        raise ValueError(f"{label} does not exist; give the path of a .safetensors or .pth file")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, weights_only=True, map_location="cpu")
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make an unpickler raise KeyError, EOFError, RuntimeError, ...
        if refused := _REFUSED.search(str(error)):
            raise ValueError(
                f"{label} holds more than tensors ({refused[1]}), and to load such a thing can run code that is in the "
                f"file; if you trust it, save its state dict alone and give that file, for a training checkpoint of "
                f"LlamaGen with torch.save(torch.load(FILE, weights_only=False)['model'], NEW)"
            ) from error
        reason = " ".join(str(error).split("WeightsUnpickler error:")[-1].split())[:200] or type(error).__name__
        raise ValueError(f"{label} is damaged, or no weights: {reason}; fetch the file again") from error
    if not isinstance(state, dict):
        raise ValueError(f"{label} holds a {type(state).__name__}, no state dict; give a dict of tensors")
    return state


def load_teacher(store: Store, manifest: Manifest) -> Teacher:
    """The frozen teacher of a `teacher` artifact; nothing is downloaded.

    Raises:
        ValueError: the artifact's description names an unknown kind.
    """
    description = read_json(store, manifest, "teacher.json")
    config = description["config"]
    if config["kind"] == "transformers":
        with store.attempt_dir() as folder:
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
    """With random weights. Artifacts of before the folder was kept name a model that open_clip has to find again."""
    if "name" in config:
        return OpenClipTeacher(OpenClipTeacherConfig(**config, pretrained=None))
    with store.attempt_dir() as folder:
        store.materialise(manifest, folder, "model")
        return read_open_clip_folder(folder / "model")


def _as_prepared(normalisation: PixelNormalisation, description: dict[str, Any]) -> PixelNormalisation:
    """With the interpolation that the artifact's tokenizers were trained with, whatever its model's config says.

    Where none is written it is bicubic: the most frequent one, and what everything was resized with at first.
    """
    return normalisation._replace(interpolation=description.get("interpolation", "bicubic"))


def load_tokenizer(store: Store, digest: str) -> ImageTokenizer:
    """The tokenizer of a `tokenizer` artifact with its teacher, in eval mode on the CPU.

    Args:
        store: holds both artifacts.
        digest: of the tokenizer artifact.

    Raises:
        ValueError: the artifact is of another kind.
    """
    manifest = store.load(digest)
    if manifest.kind != "tokenizer":
        raise ValueError(
            f"artifact {digest[:12]} is of kind {manifest.kind!r}, not a tokenizer; codes of another project "
            f"(tokenizer.kind=external) can be read, but neither encoded nor drawn"
        )
    config = TokenizerConfig(**read_json(store, manifest, "tokenizer.json"))
    has_teacher = KINDS[config.kind].needs_teacher
    teacher = load_teacher(store, store.load(manifest.inputs[TEACHER_STAGE])) if has_teacher else None
    tokenizer = build_tokenizer(config, teacher)
    tokenizer.load_state_dict(read_weights(store, manifest))
    return tokenizer.eval().requires_grad_(False)


def subset(config: Any, config_class: type[Any]) -> Any:
    """The part of a stage config that a model config declares (stage configs inherit from model configs)."""
    return config_class(**{name: getattr(config, name) for name in config_class.model_fields})
