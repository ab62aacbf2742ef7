"""Digests: the sha256 of bytes, of files, and of JSON values in canonical form."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20


def canonical_json(value: Any) -> bytes:
    """Serialise a JSON value in its canonical form, so that equal values have equal digests.

    Keys are sorted by code point, there is no white space, and text is UTF-8, escaped only where JSON requires it.

    Args:
        value: None, bool, int, finite float, str, list, or dict with str keys, nested to any depth.

    Raises:
        ValueError: the value contains anything else (a tuple, a path, NaN, infinity, a lone surrogate, ...); the
            message names the place in the value.
    """
    _check_json(value, "$")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def digest_of(value: Any) -> str:
    """Return the sha256 of `canonical_json(value)` as 64 hexadecimal digits."""
    return sha256_bytes(canonical_json(value))


def sha256_bytes(data: bytes) -> str:
    """Return the sha256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the sha256 of a local file as 64 hexadecimal digits, reading it in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_sha256(text: object) -> bool:
    """Return whether `text` is a sha256 as this package writes it: 64 lower-case hexadecimal digits."""
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


def _check_json(value: Any, where: str) -> None:
    if value is None or isinstance(value, bool | int):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value!r}, which JSON cannot hold; store None or a finite number")
        return
    if isinstance(value, str):
        _check_text(value, where)
        return
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r} of type {type(key).__name__}; JSON keys must be str")
            _check_text(key, f"{where} key")
            _check_json(item, f"{where}.{key}")
        return
    raise ValueError(
        f"{where} has the type {type(value).__name__}, which is not JSON; "
        "convert it first (tuple to list, Path to str, array to list)"
    )


def _check_text(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is {text!r}, which is not valid Unicode text; remove the lone surrogate") from error
