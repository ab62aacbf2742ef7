"""Text that strangers wrote, as Unicode that our tables hold: the same rules for every source.

A caption with bytes that are no UTF-8, or with half of a cut emoji, loses those characters and nothing more: they
become U+FFFD. What a list spells as a number or a date stays as it was spelled.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

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


def decode(data: bytes) -> str:
    """Bytes as text; what is not UTF-8 becomes U+FFFD."""
    return data.decode("utf-8-sig", errors="replace")


def clean(text: str) -> str:
    """Text with U+FFFD for lone surrogates, which the escapes of JSON and the names of files can hold and UTF-8 not."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
    return text


def load_json(data: bytes) -> Any:
    """The value of a JSON text; its strings may hold lone surrogates, which `clean` and `strings` remove.

    Raises:
        ValueError: it is none; json.JSONDecodeError where that has a place.
    """
    try:
        return _JSON.decode(data.decode(json.detect_encoding(data), errors="replace"))
    except RecursionError as error:
        raise ValueError("values are nested too deeply") from error


def json_lines(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each line that is not blank.

    Raises:
        ValueError: a line is no JSON; the message names it.
    """
    for number, line in enumerate(io.BytesIO(data), start=1):
        if not line.strip():
            continue
        try:
            value = load_json(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        yield number, value


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
