"""Folders from which an open_clip model can be rebuilt offline: open_clip's own layout, without the weights.

`open_clip_config.json` holds the architecture and the preprocessing. The folder also holds the files of the text
tokenizer, unless it is the one that open_clip ships, and in `text/` the configuration of a text tower that is a
transformers model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.teachers.teacher import OpenClipTeacher, OpenClipTeacherConfig

_CONFIG = "open_clip_config.json"
_TEXT = "text"


def write_open_clip_folder(teacher: OpenClipTeacher, folder: Path) -> None:
    """Write the folder of a teacher; its files contain no local paths.

    Args:
        teacher: a teacher built from a name of open_clip, a hub id or a local folder.
        folder: the folder, created if needed.

    Raises:
        ValueError: the files of the text tokenizer cannot be fetched.
    """
    import open_clip

    name = teacher.config.name
    # a built-in name may contain a slash, which create_model replaces in the same way
    architecture = open_clip.get_model_config(name if ":" in name else name.replace("/", "-"))
    text = architecture["text_cfg"]
    folder.mkdir(parents=True, exist_ok=True)
    if text.get("hf_tokenizer_name"):
        try:
            tokenizer: Any = teacher.tokenizer
            tokenizer.save_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"teacher.model.name={name!r}: its text tokenizer {text['hf_tokenizer_name']!r} cannot be fetched "
                f"({' '.join(str(error).split())[:200]}); prepare the teacher where the hub is reachable, or give "
                f"local-dir:FOLDER with the tokenizer's files beside open_clip_config.json"
            ) from error
        text["hf_tokenizer_name"] = "."  # open_clip then looks into the folder itself
    if text.get("hf_model_name"):
        teacher.model.text.config.save_pretrained(folder / _TEXT)
        text["hf_model_name"] = _TEXT
    preprocessing = open_clip.get_model_preprocess_cfg(teacher.model)
    described = {"model_cfg": architecture, "preprocess_cfg": preprocessing}
    (folder / _CONFIG).write_text(json.dumps(described, indent=1, sort_keys=True))


def read_open_clip_folder(folder: Path) -> OpenClipTeacher:
    """Build the teacher of a folder with random weights; afterwards the folder is not needed any more."""
    described = json.loads((folder / _CONFIG).read_text())
    text = described["model_cfg"]["text_cfg"]
    if text.get("hf_model_name"):
        text["hf_model_name"] = str(folder / _TEXT)  # transformers would resolve it relative to the working directory
        (folder / _CONFIG).unlink()  # a file from the store may be read-only
        (folder / _CONFIG).write_text(json.dumps(described))
    teacher = OpenClipTeacher(OpenClipTeacherConfig(name=f"local-dir:{folder}", pretrained=None))
    _ = teacher.tokenizer  # read it while its files exist
    return teacher
