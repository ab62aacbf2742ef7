"""Lists in CSV, TSV, JSONL or Parquet as Arrow tables of what they hold."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from storage.input_files import read_input

EXPECTED = "a CSV, TSV, JSONL or Parquet file"


def read_list(path: str, what: str, field: str, expected: str = EXPECTED) -> pa.Table:
    """Read a list; columns of CSV and TSV are strings.

    Args:
        path: local or s3://.
        what: how messages name it, for example `URL list`.
        field: the config's field that names it, for example `download.url_list`.
        expected: what else it could be, for messages.

    Raises:
        ValueError: naming the file and what was expected of it.
    """
    data = read_input(path, field, expected)
    suffix = Path(path).suffix.lower()
    try:
        if suffix == ".parquet":
            return pq.read_table(pa.BufferReader(data))
        if suffix in (".jsonl", ".ndjson", ".json"):
            return pyarrow.json.read_json(pa.BufferReader(data))
        if suffix in (".csv", ".tsv"):
            return _read_csv(data, "\t" if suffix == ".tsv" else ",")
    except pa.ArrowInvalid as error:
        raise ValueError(f"{what} {path} is not readable as {suffix[1:]}: {error}; check the file") from error
    raise ValueError(f"{what} {path} has unknown suffix {suffix!r}; use .csv, .tsv, .jsonl or .parquet")


def _read_csv(data: bytes, separator: str) -> pa.Table:
    parsing = pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    names = pyarrow.csv.open_csv(pa.BufferReader(data), parse_options=parsing).schema.names
    converting = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    return pyarrow.csv.read_csv(pa.BufferReader(data), parse_options=parsing, convert_options=converting)
