"""Source of Parquet files with image bytes, as of Hugging Face data sets: a column of `{bytes, path}` or of bytes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from models.config import Config
from stages.download.sources.source import (
    MISSING,
    PLACE,
    URL,
    Failure,
    Fetched,
    Row,
    SourceOptions,
    find_columns,
    place,
    placed,
    say_left_out,
)
from stages.download.sources.text import strings, text_column
from stages.protocol import RuntimeStr
from storage.input_files import InputFiles, is_clutter

logger = logging.getLogger(__name__)

_BATCH_ROWS = 64


class ParquetFiles(Config):
    """Parquet files that contain the images' bytes."""

    kind: Literal["parquet"]
    """Selects this layout."""
    path: RuntimeStr
    """A file, a folder or a pattern such as `s3://bucket/train-*.parquet`. Names and contents enter the digest, not the
    folder's path."""
    image_column: str = "image"
    """Column of `{bytes, path}` structs (Hugging Face's layout) or of binary values."""

    def open(self, options: SourceOptions) -> ParquetImages:
        """Open the source of the files' rows."""
        return ParquetImages(self)


class ParquetImages:
    """Source with the rows of Parquet files, in the order of the files' names.

    Args:
        config: path of the files, and the column with images.
    """

    def __init__(self, config: ParquetFiles) -> None:
        self.what = f"Parquet {config.path}"
        self._files = InputFiles(config.path, "download.files.path")
        self._image_column = config.image_column

    def content(self) -> dict[str, str]:
        return {"files": self._files.digest(self._names())}

    def rows(self, columns: Sequence[str]) -> pa.Table:
        names = self._names()
        others = sorted(set(self._files.names()) - set(names))
        say_left_out(logger, self.what, others, "files that are no Parquet")
        return pa.concat_tables([self._rows_of(name, columns) for name in names], promote_options="default")

    def fetch(self, rows: list[Row], scratch: Path) -> Iterator[tuple[int, Fetched]]:
        wanted: dict[tuple[str, int], dict[int, int]] = {}
        for position, found in placed(rows, "the row"):
            assert not isinstance(found, Failure), "every row of a Parquet file has a place"
            name, group, row = found
            wanted.setdefault((name, group), {})[row] = position
        for (name, group), positions in wanted.items():
            yield from self._fetch_group(name, group, positions)

    def _fetch_group(self, name: str, group: int, positions: dict[int, int]) -> Iterator[tuple[int, Fetched]]:
        """Read some rows of one row group in small batches, because a whole group may be larger than memory."""
        start = 0
        with self._files.open(name) as file, pq.ParquetFile(file) as parquet:
            batches = parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[self._image_column])
            for batch in batches:
                for row in range(start, start + batch.num_rows):
                    if row in positions:
                        yield positions[row], _bytes(batch.column(0)[row - start].as_py())
                start += batch.num_rows
                if start > max(positions):
                    return

    def _rows_of(self, name: str, columns: Sequence[str]) -> pa.Table:
        try:
            with self._files.open(name) as file, pq.ParquetFile(file) as parquet:
                self._check(name, parquet.schema_arrow)
                found = find_columns(f"{self.what}: {name}", columns, parquet.schema_arrow.names)
                table = parquet.read(columns=list(found.values()))
                groups = [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.what}: {name} is not readable as Parquet: {error}; check the file") from error
        places = [place(name, group, row) for group, count in enumerate(groups) for row in range(count)]
        urls = [f"{name}#{row}" for row in range(len(places))]
        return pa.table(
            {column: text_column(table[own], f"{self.what}: column {own!r} of {name}") for column, own in found.items()}
            | {URL: strings(urls), PLACE: strings(places)}
        )

    def _check(self, name: str, schema: pa.Schema) -> None:
        column = self._image_column
        held = ", ".join(f"{field.name} ({field.type})" for field in schema)
        if column not in schema.names:
            raise ValueError(
                f"{self.what}: {name} has no column {column!r}; it has {held}: set download.files.image_column"
            )
        kind = schema.field(column).type
        names = [kind.field(index).name for index in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        if "bytes" not in names and not _is_binary(kind):
            raise ValueError(
                f"{self.what}: column {column!r} of {name} is {kind}; it must hold bytes, or structs with a field "
                f"'bytes': set download.files.image_column to one that does ({held})"
            )

    def _names(self) -> list[str]:
        names = self._files.names()
        found = [name for name in names if name.lower().endswith(".parquet") and not is_clutter(name)]
        if not found:
            raise ValueError(f"{self.what} holds no .parquet file, but {names[0]!r}; correct the path")
        return found


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _bytes(value: Any) -> Fetched:
    data = value["bytes"] if isinstance(value, dict) else value
    return Failure(MISSING, "the row holds no image bytes") if data is None else bytes(data)
