"""Text that strangers wrote, as Unicode that our tables hold: the same rules for every source.

A caption with bytes that are no UTF-8, or with half of a cut emoji, loses those characters and nothing more: they
become U+FFFD. What a list spells as a number or a date stays as it was spelled.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute as pc


class WrittenFloat(float):
    """A number of a JSON text that remembers how it was written there: `1.50` is not `1.5` in a caption."""

    written: str

    def __new__(cls, written: str) -> WrittenFloat:
        value = super().__new__(cls, written)
        value.written = written
        return value


_JSON = json.JSONDecoder(parse_float=WrittenFloat)
_TOO_DEEP = "values are nested too deeply"
_SPACE = re.compile(r"\s*")
_PIECE = 1 << 20
"""Characters of a JSON array that are read together."""


TEXT_SUFFIXES = ("txt", "text", "caption", "cap")
"""Suffixes of files, and of members of tars, with the text of the image beside them, the one that counts first."""


def decode(data: bytes) -> str:
    """Bytes as text in the Unicode encoding that the first ones show; what is none becomes U+FFFD."""
    return data.decode(json.detect_encoding(data), errors="replace")


def clean(text: str) -> str:
    """Text with U+FFFD for lone surrogates, which the escapes of JSON and the names of files can hold and UTF-8 not."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
    return text


def open_text(file: Any) -> TextIO:
    """A binary file as text in the Unicode encoding that its first bytes show; what is none becomes U+FFFD.

    Its lines end as in the file: in a line feed, a carriage return or both.
    """
    buffered = io.BufferedReader(file)
    return io.TextIOWrapper(buffered, json.detect_encoding(buffered.peek(4)[:4]), errors="replace", newline="")


def pair_folded(images: Mapping[str, str], texts: Mapping[str, str]) -> dict[str, str]:
    """Images and texts whose names are the same but for upper case and the way that accents are written (NFC, NFD).

    Only where that leaves no choice: no other image, and no other text, has such a name.

    Args:
        images: what they are called, by anything that tells them apart.
        texts: likewise.

    Returns:
        The text of each image that has one.
    """
    folded: dict[str, tuple[list[str], list[str]]] = {}
    for side, names in enumerate((images, texts)):
        for own, name in names.items():
            folded.setdefault(fold(name), ([], []))[side].append(own)
    return {ones[0]: others[0] for ones, others in folded.values() if len(ones) == len(others) == 1}


def split_suffix(name: str) -> tuple[str, str]:
    """A file's name without its suffix, and that in lower case without its dot; '' where there is none."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    return folder + slash + (stem if dot else base), suffix.lower() if dot else ""


def fold(name: str) -> str:
    """The same for names that differ in upper case, or in the way that accents are written (NFC, NFD), alone."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def load_json(data: bytes | str) -> Any:
    """The value of a JSON text; its strings may hold lone surrogates, which `clean` and `strings` remove.

    Raises:
        ValueError: it is none; json.JSONDecodeError where that has a place.
    """
    try:
        return _JSON.decode(data.decode(json.detect_encoding(data), "replace") if isinstance(data, bytes) else data)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error


def json_lines(lines: Iterable[bytes | str]) -> Iterator[tuple[int, Any]]:
    """Number and value of each line that is not blank.

    Raises:
        ValueError: a line is no JSON; the message names it.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = load_json(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        yield number, value


def json_entries(text: TextIO) -> Iterator[tuple[str, Any]]:
    """Where it stands (`line 3`, `entry 3`) and the value of each line of JSONL, or of each entry of a JSON array.

    No more of the text is held than a piece of it and one entry.

    Raises:
        ValueError: it is no JSON; the message names the place.
    """
    first = text.read(1)
    while first.isspace():
        first = text.read(1)
    if first == "[":
        yield from _array_entries(text)
        return
    for number, value in json_lines(chain([first + text.readline()], text)):
        yield f"line {number}", value


def _array_entries(text: TextIO) -> Iterator[tuple[str, Any]]:
    """As `json_entries`, after the opening bracket."""
    buffer, at, number, more = "", 0, 0, _PIECE
    while True:
        at = _after_space(buffer, at)
        if number == 0 and buffer.startswith("]", at):
            break
        try:
            value, end = _JSON.raw_decode(buffer, at)
            end = _after_space(buffer, end)
            problem = "" if buffer.startswith((",", "]"), end) else "there is no comma or closing bracket after it"
            whole = end < len(buffer)
        except json.JSONDecodeError as error:
            problem, whole = error.msg, False
        except RecursionError as error:
            raise ValueError(f"entry {number + 1}: {_TOO_DEEP}") from error
        if not whole and (piece := text.read(more)):
            # twice as much each time, or a long entry would be looked at as often as it has pieces
            buffer, at, more = buffer[at:] + piece, 0, 2 * more
            continue
        if problem:
            raise ValueError(f"entry {number + 1}: {problem}")
        number, more = number + 1, _PIECE
        yield f"entry {number}", value
        at = end
        if buffer[end] == "]":
            break
        at += 1
    while rest := buffer[at + 1 :] or text.read(_PIECE):
        if rest.strip():
            raise ValueError(f"more follows its {number} entries: {rest.strip()[:40]!r}")
        buffer = ""


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None, "it also matches nothing"
    return found.end()


def strings(values: Sequence[Any]) -> pa.Array:
    """A column of text: strings and numbers as they were written, None as '', everything else as JSON."""
    return pa.array([_string(value) for value in values], pa.string())


def text_column(column: pa.ChunkedArray, what: str) -> pa.ChunkedArray | pa.Array:
    """An Arrow column as text, lists and structs as JSON; nulls become ''.

    Args:
        column: of any type that has a text.
        what: how messages name it.

    Raises:
        ValueError: its type has none.
    """
    try:
        if pa.types.is_nested(column.type):
            return strings(column.to_pylist())
        return pc.fill_null(_as_text(column), "")
    except (pa.ArrowNotImplementedError, TypeError) as error:
        raise ValueError(
            f"{what} is {column.type}, which cannot be kept as text: {error}; leave it out of download.extra_columns, "
            "or write it as text in the file"
        ) from error


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not _holds_bytes(column.type):
        return column.cast(pa.string())
    # Arrow checks no UTF-8 when it reads Parquet, and a text that is none would stop whoever looks at it
    data = column.cast(pa.large_binary())
    try:
        return data.cast(pa.large_string()).cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([None if value is None else decode(value) for value in data.to_pylist()], pa.string())


def _holds_bytes(kind: pa.DataType) -> bool:
    checks = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in checks)


def _string(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, WrittenFloat):
        return value.written
    return clean(_SPELLING.encode(value))


def _in_json(value: Any) -> str:
    """Dates, decimals and the like, which lists and structs of Parquet may hold."""
    if isinstance(value, bytes):
        raise TypeError("it holds bytes")
    return str(value)


_SPELLING = json.JSONEncoder(ensure_ascii=False, sort_keys=True, default=_in_json)
