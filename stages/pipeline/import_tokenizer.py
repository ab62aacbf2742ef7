"""Conversion of published tokenizer checkpoints to weights that `train_tokenizer` can start from."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from models.imports.dualtoken import convert_dualtoken
from models.imports.llamagen import convert_llamagen
from models.teachers.teacher import Teacher, TransformersTeacher, TransformersTeacherConfig
from models.tokenizers.config import DualTokenConfig, VqganConfig
from stages.artifacts.models import described, read_checkpoint
from stages.pipeline.recipe import Recipe


def import_weights(checkpoint: Path, recipe: Recipe, out: Path, which: str | None = None) -> str:
    """Convert a published checkpoint to this project's state dict, and write it as safetensors.

    Args:
        checkpoint: a file in the layout of LlamaGen (`tokenizer.kind=vqgan`) or DualToken (`dualtoken`); it is read
            with `weights_only`.
        recipe: the recipe whose tokenizer will load the weights.
        out: the file to write; its folder is created if needed.
        which: the key of the weights in a checkpoint that has several (`ema`, `model`); None prefers averaged ones.

    Returns:
        Which of the checkpoint's weights were taken; '' if the checkpoint itself is the state dict.

    Raises:
        ValueError: the file is missing, damaged, holds more than tensors, or belongs to another network; the message
            says
            which, and names the keys that do not fit.
    """
    given = recipe.tokenizer
    if not isinstance(given, (VqganConfig, DualTokenConfig)):
        raise ValueError(
            f"no published checkpoint of tokenizer.kind={given.kind} is known here; vqgan takes LlamaGen's, dualtoken "
            f"DualToken's"
        )
    found = read_checkpoint(checkpoint, "checkpoint", which)
    if isinstance(given, VqganConfig):
        converted = convert_llamagen(found.tensors, given)
    else:
        converted = convert_dualtoken(found.tensors, given, _tower(recipe))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(converted, out)
    return described(found) if found.taken else ""


def _tower(recipe: Recipe) -> Teacher:
    """The teacher whose tower a checkpoint of DualToken starts from."""
    model = recipe.teacher.model
    if not isinstance(model, TransformersTeacherConfig):
        raise ValueError(
            f"teacher.model.kind={model.kind}: DualToken's checkpoints name the tower as transformers does; add "
            f"--set 'teacher.model={{kind: transformers, path: FOLDER}}' with the folder of the SigLIP that it was "
            f"trained from"
        )
    return TransformersTeacher(model).freeze()
