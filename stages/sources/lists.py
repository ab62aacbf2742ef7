"""Lists in CSV, TSV, JSONL or Parquet: their columns as text, spelled as they are in the file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from stages.sources.text import clean, decode, json_lines, strings, text_column
from storage.input_files import read_input

EXPECTED = "a CSV, TSV, JSONL or Parquet file"
_ROWS_TOGETHER = 10_000
"""Rows of JSONL that are Python objects at a time, which take ten times the memory of an Arrow column."""
_CSV_BLOCK_BYTES = 64 << 20
"""No row may be longer: Arrow reads CSV in blocks, of 1 MB unless told."""


class TextTable:
    """The columns of a list as text; each is converted when it is asked for, since of a wide list few ever are.

    Args:
        what: how messages name the list.
        table: what it holds.
    """

    def __init__(self, what: str, table: pa.Table) -> None:
        self._what, self._table = what, table
        self.column_names: list[str] = table.column_names
        self.num_rows: int = table.num_rows

    def __getitem__(self, name: str) -> pa.ChunkedArray | pa.Array:
        """A column without nulls.

        Raises:
            ValueError: there are several of that name, or its values have no text.
        """
        at = [index for index, own in enumerate(self.column_names) if own == name]
        if len(at) != 1:
            raise ValueError(f"{self._what} has {len(at)} columns {name!r}; give each its own name")
        return text_column(self._table.column(at[0]), f"{self._what}: column {name!r}")


def read_list(path: str, what: str, field: str, expected: str = EXPECTED) -> TextTable:
    """Read a list.

    Args:
        path: local or s3://.
        what: how messages name it, for example `URL list`.
        field: the config's field that names it, for example `download.url_list`.
        expected: what else it could be, for messages.

    Raises:
        ValueError: naming the file and what was expected of it.
    """
    return parse_list(read_input(path, field, expected), path, what)


def parse_list(data: bytes, path: str, what: str) -> TextTable:
    """Read a list from its bytes; arguments and errors as of `read_list`."""
    suffix = Path(path).suffix.lower()
    readers = {
        ".parquet": lambda: pq.read_table(pa.BufferReader(data)),
        ".csv": lambda: _read_csv(data, ","),
        ".tsv": lambda: _read_csv(data, "\t"),
    } | dict.fromkeys((".jsonl", ".ndjson", ".json"), lambda: _read_jsonl(data))
    if suffix not in readers:
        raise ValueError(f"{what} {path} has unknown suffix {suffix!r}; use .csv, .tsv, .jsonl or .parquet")
    try:
        return TextTable(f"{what} {path}", readers[suffix]())
    except (pa.ArrowException, ValueError, OSError) as error:  # OSError: how Arrow says that Parquet is damaged
        raise ValueError(f"{what} {path} is not readable as {suffix[1:]}: {error}; check the file") from error


def _read_csv(data: bytes, separator: str) -> pa.Table:
    readable = _utf8(data)
    reading = pyarrow.csv.ReadOptions(block_size=_CSV_BLOCK_BYTES)
    parsing = pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    names = pyarrow.csv.open_csv(pa.BufferReader(readable), reading, parsing).schema.names
    converting = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    return pyarrow.csv.read_csv(pa.BufferReader(readable), reading, parsing, converting)


def _utf8(data: bytes) -> bytes:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return decode(data).encode("utf-8")
    return data


def _read_jsonl(data: bytes) -> pa.Table:
    """Not by Arrow's reader: it makes timestamps of dates, and an error of a cut emoji or of a column of two types."""
    lines = json_lines(data)
    names: dict[str, None] = {}
    tables = []
    while batch := list(islice(lines, _ROWS_TOGETHER)):
        for number, row in batch:
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is {str(row)[:40]!r}, not an object {{column: value, ...}}")
            names |= dict.fromkeys(row)
        tables.append(pa.table({clean(name): strings([row.get(name) for _, row in batch]) for name in names}))
    if not names:
        raise ValueError("it is empty")
    return pa.concat_tables(tables, promote_options="default")
