"""Published tokenizer checkpoints as weights that the `train_tokenizer` stage starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from models.image_tokenizer import TokenizerConfig
from models.import_dualtoken import convert_dualtoken
from models.import_llamagen import convert_llamagen
from models.teachers import TransformersTeacher, TransformersTeacherConfig
from stages.loading import read_state, subset
from stages.recipe import Recipe


def import_weights(checkpoint: Path, recipe: Recipe, out: Path) -> None:
    """Write a published checkpoint as safetensors under our names.

    Args:
        checkpoint: with the layout of LlamaGen (`tokenizer.kind=vqgan`) or DualToken (`dualtoken`); read with
            `weights_only`.
        recipe: whose tokenizer it is for.
        out: the file to write; its folder is made.

    Raises:
        ValueError: the file is missing, damaged, holds more than tensors, or is of another network; the message says
            which, and names the keys that do not fit.
    """
    config = subset(recipe.tokenizer, TokenizerConfig)
    if config.kind not in ("vqgan", "dualtoken"):
        raise ValueError(
            f"no published checkpoint of tokenizer.kind={config.kind} is known here; vqgan takes LlamaGen's, dualtoken "
            f"DualToken's"
        )
    state = read_state(checkpoint, "checkpoint")
    converted = convert_llamagen(state, config) if config.kind == "vqgan" else _dualtoken(state, config, recipe)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(converted, out)


def _dualtoken(state: Any, config: TokenizerConfig, recipe: Recipe) -> dict[str, Tensor]:
    model = recipe.teacher.model
    if not isinstance(model, TransformersTeacherConfig):
        raise ValueError(
            f"teacher.model.kind={model.kind}: DualToken's checkpoints name the tower as transformers does; add "
            f"--set 'teacher.model={{kind: transformers, path: FOLDER}}' with the folder of the SigLIP that it was "
            f"trained from"
        )
    return convert_dualtoken(state, config, TransformersTeacher(model).freeze())
