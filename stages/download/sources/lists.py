"""Lists of rows in CSV, TSV, JSON, JSONL or Parquet: requested columns as text, spelled as in the file.

A list is one file, or all files of a folder or a pattern, compressed or not. It is read in chunks, and only the
requested columns are kept.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from stages.download.sources.source import TAKE_COLUMNS, find_columns, same_column, say_left_out
from stages.download.sources.text import clean, json_entries, open_text, strings, text_column
from storage.digests import digest_of
from storage.input_files import COMPRESSION_ERRORS, InputFiles, decompressed, is_clutter

logger = logging.getLogger(__name__)

EXPECTED = "a CSV, TSV, JSON, JSONL or Parquet file, or a folder or pattern of such"
_ROWS_TOGETHER = 10_000
"""Number of rows held as Python objects at a time, which take ten times the memory of an Arrow column."""
_LONGEST_VALUE = 64 << 20
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_PARQUET, _CSV, _TSV, _JSON, _PLAIN = "parquet", "csv", "tsv", "json", "txt"
_FORMATS = {
    ".parquet": _PARQUET,
    ".pq": _PARQUET,
    ".csv": _CSV,
    ".tsv": _TSV,
    ".tab": _TSV,
    ".jsonl": _JSON,
    ".ndjson": _JSON,
    ".json": _JSON,
    ".txt": _PLAIN,
}
_SEPARATORS = {_CSV: ",;\t|", _TSV: "\t,;|", _PLAIN: "\t,;|"}
"""Possible separators, the most likely first; the one with which the header names the key column is used."""


@dataclass(frozen=True)
class Sought:
    """The key column that a list must have, and the remedy for the message if it has none."""

    column: str
    remedy: str


class RowList:
    """A list of rows.

    Args:
        path: path of a file, a folder or a pattern; local or s3://.
        name: name of the list in messages, for example `URL list`.
        field: the config's field that holds the path, for example `download.url_list`.
        expected: what the field may hold, for messages.
        tsv_quotes: whether double quotes enclose values in lists separated by tabs.
    """

    def __init__(self, path: str, name: str, field: str, expected: str = EXPECTED, *, tsv_quotes: bool = False) -> None:
        self.what = f"{name} {path}"
        self.files = InputFiles(path, field)
        self._expected, self._tsv_quotes = expected, tsv_quotes

    def digest(self) -> str:
        """Return the digest of what determines the rows: formats and contents of the files in order, and `tsv_quotes`.

        Raises:
            ValueError: there is no such list.
        """
        names = self.names()
        found = zip(map(_format, names), self.files.sha256s(names), strict=True)
        return digest_of([self._tsv_quotes, *map(list, found)])

    def names(self) -> list[str]:
        """Return the names of the list's files in order.

        Raises:
            ValueError: there are no lists, or lists of several formats.
        """
        names = self.files.names()
        if len(names) == 1:
            if _format(names[0]) is None:
                raise ValueError(
                    f"{self.what} has unknown suffix {PurePosixPath(names[0]).suffix!r}; give {self._expected}"
                )
            return names
        kinds: dict[str, list[str]] = {}
        for name in names:
            kind = None if is_clutter(name) or PurePosixPath(name).name.startswith("_") else _format(name)
            kinds.setdefault(kind or "", []).append(name)
        others = kinds.pop("", [])
        if kinds.keys() - {_PLAIN}:  # a README.txt next to lists is no list
            others += kinds.pop(_PLAIN, [])
        if len(kinds) != 1:
            held = ", ".join(f"{len(found)} x {kind}" for kind, found in kinds.items()) or f"{len(others)} other files"
            raise ValueError(
                f"{self.what} holds {held}, not lists of one kind; give a pattern such as FOLDER/*.parquet"
            )
        say_left_out(logger, self.what, others, "files that are no lists")
        (found,) = kinds.values()
        return found

    def read(self, sought: Sought, columns: Sequence[str]) -> pa.Table:
        """Read the key column and `columns` as text without nulls.

        Raises:
            ValueError: a file is not readable or lacks a column; the message names the file and what was expected.
        """
        wanted = list(dict.fromkeys([sought.column, *columns]))
        schema = pa.schema([pa.field(name, pa.string()) for name in wanted])
        names = self.names()
        batches = []
        for name in names:
            reading = _Reading(
                self.what if len(names) == 1 else f"{self.what}: {name}", sought, wanted, self._tsv_quotes
            )
            with self.files.open(name) as file:
                batches += [table.cast(schema) for table in reading.tables(file, _format(name) or "")]
        return pa.concat_tables(batches) if batches else schema.empty_table()


def _format(name: str) -> str | None:
    """Return the format of a file by its suffix before that of a compression, or None if it is no list."""
    path = PurePosixPath(name.lower())
    return _FORMATS.get(PurePosixPath(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix)


@dataclass
class _Reading:
    """Reads one file of a list."""

    what: str
    sought: Sought
    wanted: list[str]
    tsv_quotes: bool

    def tables(self, file: Any, kind: str) -> Iterator[pa.Table]:
        """Yield the rows in batches, with the requested columns under the requested names."""
        problem = (pa.ArrowException, OSError, _Damaged, *COMPRESSION_ERRORS)
        try:
            if kind == _PARQUET:
                yield from self._parquet(file)
            else:
                text = self._text(file)
                rows = self._json(text) if kind == _JSON else self._separated(text, kind)
                while batch := list(islice(rows, _ROWS_TOGETHER)):
                    yield pa.table(dict(zip(self.wanted, map(strings, zip(*batch, strict=True)), strict=True)))
        except problem as error:  # damaged Parquet raises OSError too
            raise ValueError(f"{self.what} is not readable as {kind}: {error}; check the file") from error

    def _text(self, file: Any) -> TextIO:
        try:
            return open_text(decompressed(file))
        except ValueError as error:
            raise ValueError(f"{self.what} is no list: {error}") from error

    def _find(self, available: Sequence[str]) -> dict[str, str]:
        find_columns(self.what, [self.sought.column], available, self.sought.remedy)
        return find_columns(self.what, self.wanted, available, TAKE_COLUMNS)

    def _parquet(self, file: Any) -> Iterator[pa.Table]:
        with pq.ParquetFile(file) as parquet:
            columns = self._find(parquet.schema_arrow.names)
            for batch in parquet.iter_batches(_ROWS_TOGETHER, columns=list(dict.fromkeys(columns.values()))):
                yield pa.table(
                    {
                        name: text_column(pa.chunked_array([batch.column(own)]), f"{self.what}: column {own!r}")
                        for name, own in columns.items()
                    }
                )

    def _separated(self, text: TextIO, kind: str) -> Iterator[list[str]]:
        """Read separated values with Python's csv: Arrow's reader takes all after an unclosed quote for one value."""
        csv.field_size_limit(_LONGEST_VALUE)
        first = next((line for line in text if line.strip()), "")
        if not first:
            raise _Damaged("it is empty")
        separator, header = self._header(first, kind)
        # in `url, caption` the space, and a quote after it, are not part of the value
        spaced = separator != "\t" and len(header) > 1 and all(name.startswith(" ") for name in header[1:])
        quoting = self._quoting(separator)
        reader = csv.reader(
            chain([first], text), delimiter=separator, quoting=quoting, skipinitialspace=spaced, strict=True
        )
        places = [header.index(own) for own in self._find(header).values()]
        for row in _checked(reader, header):
            yield [row[place] for place in places]

    def _quoting(self, separator: str) -> Any:
        return csv.QUOTE_NONE if separator == "\t" and not self.tsv_quotes else csv.QUOTE_MINIMAL

    def _header(self, first: str, kind: str) -> tuple[str, list[str]]:
        """Return the separator and the names of the columns.

        Raises:
            ValueError: the first line is no header with the key column.
        """
        headers = {}
        for separator in _SEPARATORS[kind]:
            reader = csv.reader([first], delimiter=separator, quoting=self._quoting(separator))
            headers[separator] = [clean(name) for name in next(reader)]
            if any(same_column(name, self.sought.column) for name in headers[separator]):
                return separator, headers[separator]
        separator, header = next(((each, found) for each, found in headers.items() if len(found) > 1), ("", [first]))
        if any(value.strip().strip('"').startswith(("http://", "https://")) for value in header):
            columns = f"a first line such as `{self.sought.column}{separator or ','}caption`"
            alone = "" if separator else "; URLs alone have no captions: give them in a second column"
            raise ValueError(
                f"{self.what}: its first line is a row, not the names of its columns; write {columns}{alone}"
            )
        if separator == "\t" and any(name.startswith('"') for name in header):
            raise ValueError(f"{self.what}: its columns are {', '.join(header)}; set download.tsv_quotes=true")
        return _SEPARATORS[kind][0], headers[_SEPARATORS[kind][0]]

    def _json(self, text: TextIO) -> Iterator[list[Any]]:
        """Read JSON with our own parser: Arrow's turns dates into timestamps and fails on cut emoji and mixed types."""
        spellings: dict[str, list[str]] = {name: [] for name in self.wanted}
        seen: dict[str, None] = {}  # keys as they are spelled, in order
        for place, row in _damaged_where_no_json(json_entries(text)):
            if not isinstance(row, dict):
                raise _Damaged(f"{place} is {str(row)[:40]!r}, not an object {{column: value, ...}}")
            for key in [key for key in row if key not in seen]:
                seen[key] = None
                for name, keys in spellings.items():
                    if same_column(key, name):
                        keys.insert(0 if key == name else len(keys), key)
            values = [next((row[key] for key in keys if key in row), None) for keys in spellings.values()]
            if isinstance(values[0], dict | list):
                raise _Damaged(f"{place}: {self.sought.column!r} is {str(values[0])[:40]}; write one object per row")
            yield values
        if not seen:
            raise _Damaged("it is empty")
        self._find(list(map(clean, seen)))


class _Damaged(ValueError):
    """Raised inside this module with what is wrong with a file."""


def _damaged_where_no_json(entries: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    try:
        yield from entries
    except ValueError as error:
        raise _Damaged(error) from error


def _checked(reader: Any, header: list[str]) -> Iterator[list[str]]:
    """Yield the rows after the header, each with a value for every column.

    Raises:
        _Damaged: a line has another number of values, or an unclosed quote.
    """
    begins = 1
    try:
        for row in reader:
            if len(row) > len(header) and not any(row[len(header) :]):
                row = row[: len(header)]
            if row and len(row) != len(header):
                raise _Damaged(
                    f"line {begins} has {len(row)} values, the first line names {len(header)} columns; put a value "
                    "that holds the separator in double quotes (a TSV also needs download.tsv_quotes=true)"
                )
            if row and begins > 1:
                yield row
            begins = reader.line_num + 1
    except csv.Error as error:
        raise _Damaged(
            f"line {begins}: a value in double quotes ends in the middle or nowhere ({error}); write a quote within a "
            "quoted value twice"
        ) from error
