"""Lists of rows in CSV, TSV, JSON, JSONL or Parquet: the columns that are asked for, as text, spelled as in the file.

A list is one file or the parts of a folder or pattern, compressed or not. It is read piece by piece, and of its columns
no more is kept than was asked for.
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
"""Rows that are Python objects at a time, which take ten times the memory of an Arrow column."""
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
"""What may stand between values, the most likely first: that with which the header names the column that is sought."""


@dataclass(frozen=True)
class Sought:
    """The column without which a list is none, and what to do where it is not there."""

    column: str
    remedy: str


class RowList:
    """A list of rows.

    Args:
        path: of a file, a folder or a pattern; local or s3://.
        name: what messages call it, for example `URL list`.
        field: the config's field that names it, for example `download.url_list`.
        expected: what else it could be, for messages.
        tsv_quotes: whether double quotes enclose values where tabs separate them.
    """

    def __init__(self, path: str, name: str, field: str, expected: str = EXPECTED, *, tsv_quotes: bool = False) -> None:
        self.what = f"{name} {path}"
        self.files = InputFiles(path, field)
        self._expected, self._tsv_quotes = expected, tsv_quotes

    def digest(self) -> str:
        """The digest of what decides the rows: formats and contents of its files in order, how they are read, no names.

        Raises:
            ValueError: there is no such list.
        """
        names = self.names()
        found = zip(map(_format, names), self.files.sha256s(names), strict=True)
        return digest_of([self._tsv_quotes, *map(list, found)])

    def names(self) -> list[str]:
        """Its files in order.

        Raises:
            ValueError: there are none that are lists, or several kinds.
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
        if kinds.keys() - {_PLAIN}:  # a README.txt is no list
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
        """The column that is sought and `columns`, as text without nulls.

        Raises:
            ValueError: naming the file and what was expected of it.
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
    """The format of a file, by its suffix before that of a compression; None where it is no list."""
    path = PurePosixPath(name.lower())
    return _FORMATS.get(PurePosixPath(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix)


@dataclass
class _Reading:
    """One file."""

    what: str
    sought: Sought
    wanted: list[str]
    tsv_quotes: bool

    def tables(self, file: Any, kind: str) -> Iterator[pa.Table]:
        """Its rows, some at a time: the columns that are wanted under the names by which they are wanted."""
        problem = (pa.ArrowException, OSError, _Damaged, *COMPRESSION_ERRORS)
        try:
            if kind == _PARQUET:
                yield from self._parquet(file)
            else:
                text = self._text(file)
                rows = self._json(text) if kind == _JSON else self._separated(text, kind)
                while batch := list(islice(rows, _ROWS_TOGETHER)):
                    yield pa.table(dict(zip(self.wanted, map(strings, zip(*batch, strict=True)), strict=True)))
        except problem as error:  # OSError also where Parquet is damaged
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
        """Not by Arrow's reader, to which a quote that nothing closes is a value as long as the rest of the file."""
        csv.field_size_limit(_LONGEST_VALUE)
        first = next((line for line in text if line.strip()), "")
        if not first:
            raise _Damaged("it is empty")
        separator, header = self._header(first, kind)
        # `url, caption`: a space, and a quote after it, are no part of the values then
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
        """What separates the values, and the names of the columns.

        Raises:
            ValueError: it names no column that is sought.
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
        """Not by Arrow's reader: it makes timestamps of dates, and an error of a cut emoji or a column of two types."""
        spellings: dict[str, list[str]] = {name: [] for name in self.wanted}
        seen: dict[str, None] = {}  # as they are spelled, in order
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
                raise _Damaged(f"{place}: {self.sought.column!r} is {str(values[0])[:40]}; write an object a row")
            yield values
        if not seen:
            raise _Damaged("it is empty")
        self._find(list(map(clean, seen)))


class _Damaged(ValueError):
    """What is wrong with a file."""


def _damaged_where_no_json(entries: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    try:
        yield from entries
    except ValueError as error:
        raise _Damaged(error) from error


def _checked(reader: Any, header: list[str]) -> Iterator[list[str]]:
    """The rows after the header, each with a value for every column.

    Raises:
        _Damaged: a line has more or fewer, or a quote that nothing closes.
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
