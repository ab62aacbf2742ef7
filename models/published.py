"""Error messages for published models, named by a hub id or a folder, that cannot be read: the cause and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""The first bytes of a Git LFS pointer, the text file that stands in for a file that was not downloaded."""
LFS_REMEDY = (
    "is a git-LFS pointer in the place of the file that it stands for; run `git lfs pull` in the folder that was "
    "cloned, or download the file itself"
)
_SHOWN = 4
"""Largest number of names that a message lists."""
_LONGEST_REASON = 300
"""Largest number of characters of a library's message that are shown."""


@contextmanager
def reading_published(field: str, name: str, instead: str = "the path of a folder that holds it") -> Iterator[None]:
    """Turn whatever a library raises while it reads a published model into one line with the field and the remedy.

    Args:
        field: the field of the recipe that names the model.
        name: a hub's name, or the path of a folder or file.
        instead: what else the user may give if the hub is out of reach.

    Raises:
        ValueError: in place of any error that is raised inside, except out-of-memory errors.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged bytes make readers raise KeyError, EOFError, SafetensorError, ...
        path = Path(name.partition("local-dir:")[2] or name)
        if pointer := _first_pointer(path):
            raise ValueError(f"{field}={name!r}: {pointer} {LFS_REMEDY}") from error
        if path.exists():
            remedy = "fetch its files again, all of them: configuration, weights, tokenizer and preprocessing"
        else:
            remedy = (
                f"check its spelling, and that the hub can be reached and gives it without a login, or give {instead}"
            )
        raise ValueError(f"{field}={name!r} cannot be read ({_reason(error)}); {remedy}") from error


def _first_pointer(path: Path) -> Path | None:
    """Return the first file of a folder, or the file itself, that is a Git LFS pointer; None if there is none."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return next((file for file in files if file.is_file() and is_lfs_pointer(file)), None)


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is a Git LFS pointer."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def on_one_line(error: BaseException, longest: int | None = None) -> str:
    """Return an exception's message with all white space as single spaces, truncated at a length."""
    return " ".join(str(error).split())[:longest]


def _reason(error: BaseException) -> str:
    """Return the error's text on one line, without torch's advice to load a file unsafely."""
    text = on_one_line(error)
    if "weights_only" in text:
        text = "a file of weights is damaged, or holds more than tensors, which can run code when it is loaded"
    if isinstance(error, LookupError):  # its text is only a key
        text = f"{type(error).__name__}: {text}"
    shown = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."
    return shown.rstrip(".") or type(error).__name__


def refuse_not_finite(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor holds NaN or an infinity."""
    bad = [name for name, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise ValueError(
            f"holds NaN or infinite values in {len(bad)} of {len(state)} tensors ({listed(bad)}), as after a "
            f"training that diverged"
        )


def listed(names: Iterable[str]) -> str:
    """Return a list of the first few names, and how many more there are, for a message."""
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


def refuse_missing(info: dict[str, Any]) -> None:
    """Raise ValueError if `from_pretrained` (with `output_loading_info`) left weights at random values."""
    wrong = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if wrong:
        raise ValueError(
            f"its weights lack {len(wrong)} tensors of the model that its configuration describes, first {min(wrong)!r}"
        )
