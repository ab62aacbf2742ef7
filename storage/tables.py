"""The schemas and checks of the tables in artifacts, and deterministic writing of Parquet."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.digests import canonical_json
from storage.files import atomic_path

ROW_GROUP_ROWS = 8192

IMAGE_METADATA_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("sha256", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("shard", pa.string()),
    ]
)
"""One row per URL, failures included: width and height in pixels, and sha256 and size of the stored image. String
columns of the data set (concept, category, style, split ...) may follow."""

METRICS_SCHEMA = pa.schema(
    [
        pa.field("model", pa.string(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("benchmark", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("qualifier", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("ci_low", pa.float64()),
        pa.field("ci_high", pa.float64()),
        pa.field("num_samples", pa.int64()),
        pa.field("settings", pa.string(), nullable=False),
    ]
)
"""One row per model, benchmark, split, metric and qualifier. The qualifier tells the numbers of one metric apart (the
codebook, say), and is empty where there is one. `role` is one of `ROLES`. `settings` is canonical JSON with all that a
comparison needs: crop, image format, guidance convention and scale, sampling."""

Role = Literal["ours", "baseline", "ceiling", "published"]
OURS: Role = "ours"
"""The row is of the model that is evaluated."""
BASELINE: Role = "baseline"
"""The row is of a simpler method, which ours should beat."""
CEILING: Role = "ceiling"
"""The row is an upper bound for ours: of the teacher, or of the real images."""
PUBLISHED: Role = "published"
"""The row quotes a paper; its number of samples may be unknown."""
ROLES: tuple[Role, ...] = (OURS, BASELINE, CEILING, PUBLISHED)


def image_metadata_table(rows: Sequence[dict[str, Any]], extra_columns: Sequence[str] = ()) -> pa.Table:
    """Build an image metadata table from rows; missing columns of a row are null.

    Raises:
        ValueError: a row has a column that is neither in the schema nor in `extra_columns`, or a check fails.
    """
    schema = pa.schema([*IMAGE_METADATA_SCHEMA, *(pa.field(name, pa.string()) for name in extra_columns)])
    table = _table_of(rows, schema, "image metadata")
    validate_image_metadata(table)
    return table


def metrics_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Build a metrics table from rows, whose `settings` may be a dict.

    Raises:
        ValueError: a row has another column, or a check fails.
    """
    spelled = [
        row | {"settings": canonical_json(row["settings"]).decode()} if isinstance(row.get("settings"), dict) else row
        for row in rows
    ]
    table = _table_of(spelled, METRICS_SCHEMA, "metrics")
    validate_metrics(table)
    return table


def validate_image_metadata(table: pa.Table) -> None:
    """Raise ValueError unless `table` has the image metadata schema, then string columns only, and unique keys."""
    _check_leading_columns(table, IMAGE_METADATA_SCHEMA, "image metadata")
    for field in list(table.schema)[len(IMAGE_METADATA_SCHEMA) :]:
        if field.type != pa.string():
            raise ValueError(
                f"image metadata: extra column {field.name!r} is {field.type}; only string columns may follow"
            )
    _check_unique(table, ["key"], "image metadata")


def validate_metrics(table: pa.Table) -> None:
    """Raise ValueError unless `table` has exactly the metrics schema, known roles, and one row for each number."""
    _check_leading_columns(table, METRICS_SCHEMA, "metrics")
    if table.num_columns != len(METRICS_SCHEMA):
        raise ValueError(f"metrics: extra columns {table.column_names[len(METRICS_SCHEMA) :]}; put them into settings")
    if unknown := sorted(set(table["role"].to_pylist()) - set(ROLES)):
        raise ValueError(f"metrics: the roles {unknown} are none of {list(ROLES)}")
    measured = table.filter(pc.not_equal(table["role"], PUBLISHED))
    if missing := measured["num_samples"].null_count:
        raise ValueError(f"metrics: {missing} rows that are not published lack num_samples; say how many were measured")
    _check_unique(table, ["model", "role", "benchmark", "split", "metric", "qualifier", "settings"], "metrics")


def write_table(table: pa.Table, path: str | Path) -> None:
    """Write a table to one Parquet file, whose bytes depend on its schema and rows alone, by an atomic rename.

    The bytes do not depend on the chunks of the table in memory or on metadata that pandas has left.
    """
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != b"pandas"}
    plain = table.replace_schema_metadata(dict(sorted(metadata.items())) or None).combine_chunks()
    with atomic_path(path) as private:
        pq.write_table(
            plain,
            private,
            compression="zstd",
            compression_level=3,
            row_group_size=ROW_GROUP_ROWS,
            version="2.6",
            data_page_version="1.0",
            use_dictionary=True,
            write_statistics=True,
        )


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one Parquet file, or some columns of it; no columns are derived from the folder's name."""
    with pq.ParquetFile(path) as file:
        if columns is not None and (unknown := sorted(set(columns) - set(file.schema_arrow.names))):
            raise ValueError(f"{path} has no columns {unknown}; it has {file.schema_arrow.names}")
        return file.read(columns=None if columns is None else list(columns))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics table, with their settings as dicts.

    Raises:
        ValueError: the file has another layout, as that of an older version has.
    """
    table = read_table(path)
    try:
        validate_metrics(table)
    except ValueError as error:
        raise ValueError(f"{error}; another version wrote this table, so run the stage that makes it again") from error
    return [row | {"settings": json.loads(row["settings"])} for row in table.to_pylist()]


def _table_of(rows: Sequence[dict[str, Any]], schema: pa.Schema, what: str) -> pa.Table:
    for index, row in enumerate(rows):
        if unknown := sorted(set(row) - set(schema.names)):
            raise ValueError(f"{what}: row {index} has the columns {unknown}, which are not in {schema.names}")
    try:
        # Column by column, so that the error names the column.
        arrays = [_array(rows, field) for field in schema]
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{what}: {error}") from error
    return pa.table(arrays, schema=schema)


def _array(rows: Sequence[dict[str, Any]], field: pa.Field) -> pa.Array:
    try:
        return pa.array([row.get(field.name) for row in rows], field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise pa.ArrowInvalid(f"column {field.name!r} ({field.type}): {error}") from error


def _check_leading_columns(table: pa.Table, schema: pa.Schema, what: str) -> None:
    if table.column_names[: len(schema)] != schema.names:
        raise ValueError(f"{what}: columns are {table.column_names}; they must begin with {schema.names}")
    for field in schema:
        column = table.column(field.name)
        if column.type != field.type:
            raise ValueError(f"{what}: column {field.name!r} is {column.type}; it must be {field.type}")
        if not field.nullable and column.null_count:
            raise ValueError(f"{what}: column {field.name!r} has {column.null_count} nulls; give each row a value")


def _check_unique(table: pa.Table, columns: list[str], what: str) -> None:
    counts = table.group_by(columns).aggregate([([], "count_all")])
    repeated = counts.filter(pc.greater(counts["count_all"], 1))
    if repeated.num_rows:
        example = repeated.select(columns).slice(0, 1).to_pylist()[0]
        raise ValueError(f"{what}: {repeated.num_rows} values of {columns} appear twice, first {example}; keep one row")
