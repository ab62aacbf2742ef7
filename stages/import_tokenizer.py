"""Published tokenizer checkpoints as weights that the `train_tokenizer` stage starts from."""

from __future__ import annotations

import pickle
from pathlib import Path

from safetensors.torch import save_file

from models.image_tokenizer import TokenizerConfig
from models.import_weights import convert_llamagen
from stages.loading import read_state, subset
from stages.recipe import Recipe


def import_llamagen(checkpoint: Path, recipe: Recipe, out: Path) -> None:
    """Write a LlamaGen checkpoint as safetensors under our names.

    Args:
        checkpoint: `.pt` with LlamaGen's layout; read with `weights_only`.
        recipe: whose tokenizer it is for.
        out: the file to write; its folder is made.

    Raises:
        ValueError: the file is missing, damaged, or of another network; the message names the keys that do not fit.
    """
    try:
        state = read_state(checkpoint)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{checkpoint} is no checkpoint, or a damaged one: {reason}; fetch the file again") from error
    converted = convert_llamagen(state, subset(recipe.tokenizer, TokenizerConfig))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(converted, out)
