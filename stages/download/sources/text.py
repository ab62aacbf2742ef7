"""Conversion of untrusted text to valid Unicode, by the same rules for every source.

In a caption with invalid UTF-8, or with half of a surrogate pair, only those characters are lost: they become U+FFFD.
Numbers and dates keep their spelling.
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
    """A number of a JSON text that remembers its spelling, since `1.50` in a caption must not become `1.5`."""

    written: str

    def __new__(cls, written: str) -> WrittenFloat:
        value = super().__new__(cls, written)
        value.written = written
        return value


_JSON = json.JSONDecoder(parse_float=WrittenFloat)
_TOO_DEEP = "values are nested too deeply"
_SPACE = re.compile(r"\s*")
_PIECE = 1 << 20
"""Number of characters of a JSON array that are read at a time."""


TEXT_SUFFIXES = ("txt", "text", "caption", "cap")
"""Suffixes of files and tar members with an image's caption, in order of precedence."""


def decode(data: bytes) -> str:
    """Decode bytes in the Unicode encoding that their start indicates; invalid bytes become U+FFFD."""
    return data.decode(json.detect_encoding(data), errors="replace")


def clean(text: str) -> str:
    """Replace lone surrogates, which JSON escapes and file names can contain but UTF-8 cannot, by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
    return text


def open_text(file: Any) -> TextIO:
    """Open a binary file as text in the Unicode encoding that its start indicates; invalid bytes become U+FFFD.

    Line ends are kept as they are in the file: a line feed, a carriage return or both.
    """
    buffered = io.BufferedReader(file)
    return io.TextIOWrapper(buffered, json.detect_encoding(buffered.peek(4)[:4]), errors="replace", newline="")


def pair_folded(images: Mapping[str, str], texts: Mapping[str, str]) -> dict[str, str]:
    """Pair images and texts whose names are equal except for upper case and the Unicode form of accents (NFC, NFD).

    They are paired only if the match is unique: no other image and no other text has such a name.

    Args:
        images: names of the images, by unique identifiers.
        texts: names of the texts, by unique identifiers.

    Returns:
        The identifier of the text by that of its image.
    """
    folded: dict[str, tuple[list[str], list[str]]] = {}
    for side, names in enumerate((images, texts)):
        for own, name in names.items():
            folded.setdefault(fold(name), ([], []))[side].append(own)
    return {ones[0]: others[0] for ones, others in folded.values() if len(ones) == len(others) == 1}


def split_suffix(name: str) -> tuple[str, str]:
    """Split a file name into the name without suffix, and the suffix in lower case without its dot ('' if none)."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    return folder + slash + (stem if dot else base), suffix.lower() if dot else ""


def fold(name: str) -> str:
    """Return a key that is equal for names that differ only in upper case or the form of accents (NFC, NFD)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def load_json(data: bytes | str) -> Any:
    """Parse a JSON text; its strings may contain lone surrogates, which `clean` and `strings` replace.

    Raises:
        ValueError: the text is not JSON; json.JSONDecodeError if the place is known.
    """
    try:
        return _JSON.decode(data.decode(json.detect_encoding(data), "replace") if isinstance(data, bytes) else data)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error


def json_lines(lines: Iterable[bytes | str]) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line that is not blank.

    Raises:
        ValueError: a line is not JSON; the message names it.
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
    """Yield the place (`line 3`, `entry 3`) and value of each line of JSONL, or of each entry of a JSON array.

    Only a chunk of the text and one entry are held in memory.

    Raises:
        ValueError: the text is not JSON; the message names the place.
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
    """Yield the entries of a JSON array, after its opening bracket."""
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
            # doubled each time, since a long entry is parsed again after each chunk
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
    """Build a text column: strings and numbers as they were written, None as '', everything else as JSON."""
    return pa.array([_string(value) for value in values], pa.string())


def text_column(column: pa.ChunkedArray, what: str) -> pa.ChunkedArray | pa.Array:
    """Convert an Arrow column to text, lists and structs to JSON; nulls become ''.

    Args:
        column: a column of any type that can be converted to text.
        what: name of the column in messages.

    Raises:
        ValueError: its type cannot be converted.
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
    # Arrow does not validate UTF-8 when it reads Parquet, and invalid text would raise later
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
    """Convert dates, decimals and similar values in lists and structs of Parquet to text."""
    if isinstance(value, bytes):
        raise TypeError("it holds bytes")
    return str(value)


_SPELLING = json.JSONEncoder(ensure_ascii=False, sort_keys=True, default=_in_json)
