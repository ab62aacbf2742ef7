"""A kind of source is one config class that opens it, and its line in the union of `FilesConfig`."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import pytest
from pydantic import Field, ValidationError

from models.config import Config
from stages.download.sources.source import PLACE, URL, Fetched, Row, Source, SourceOptions, find_columns, place, placed
from stages.download.sources.text import strings
from stages.download.stage import STAGE, DownloadConfig, FilesConfig
from stages.protocol import RuntimeStr
from storage.digests import sha256_file
from tests.helpers.given_files import CAPTIONS, IMAGES, run_download


class SqliteFiles(Config):
    """A table `pairs` of SQLite with the columns `image` and `caption`."""

    kind: Literal["sqlite"]
    path: RuntimeStr

    def open(self, options: SourceOptions) -> Source:
        return SqliteImages(self, options)


class SqliteImages:
    def __init__(self, config: SqliteFiles, options: SourceOptions) -> None:
        self._path, self._max_bytes = config.path, options.max_bytes
        self.what = f"SQLite {config.path}"

    def content(self) -> dict[str, str]:
        return {"files": sha256_file(self._path)}

    def rows(self, columns: Sequence[str]) -> pa.Table:
        with closing(sqlite3.connect(self._path)) as database:
            table = database.execute("SELECT rowid, caption FROM pairs ORDER BY rowid").fetchall()
        found = find_columns(self.what, columns, ["caption"])
        keys = [str(key) for key, _ in table]
        captions = {name: strings([caption for _, caption in table]) for name in found}
        return pa.table(captions | {URL: strings(keys), PLACE: strings([place(key) for key in keys])})

    def fetch(self, rows: list[Row], scratch: Path) -> Iterator[tuple[int, Fetched]]:
        with closing(sqlite3.connect(self._path)) as database:
            for position, found in placed(rows, "the row"):
                assert isinstance(found, list)
                (image,) = database.execute("SELECT image FROM pairs WHERE rowid = ?", found).fetchone()
                yield position, image[: self._max_bytes + 1]


class DownloadWithSqlite(DownloadConfig):
    """What a line in the union of `FilesConfig` makes of the stage's config."""

    files: Annotated[FilesConfig | SqliteFiles, Field(discriminator="kind")] | None = None


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE pairs (image BLOB, caption TEXT)")
        connection.executemany("INSERT INTO pairs VALUES (?, ?)", zip(IMAGES, CAPTIONS, strict=True))
    return path


def test_a_class_and_a_line_are_a_source(database: Path, tmp_path: Path) -> None:
    config = DownloadWithSqlite(files={"kind": "sqlite", "path": str(database)}, rows_per_shard=2)
    rows, samples, outcome = run_download(config, tmp_path)
    assert [row["caption"] for row in rows] == CAPTIONS
    assert [(sample.image, sample.text) for sample in samples] == list(zip(IMAGES, CAPTIONS, strict=True))
    assert outcome.metrics["num_ok"] == 3


def test_its_content_counts_and_not_its_path(database: Path, tmp_path: Path) -> None:
    def key(path: Path) -> str:
        return STAGE.action_key(DownloadWithSqlite(files={"kind": "sqlite", "path": str(path)}), 0, {})

    first = key(database)
    assert key(database.rename(tmp_path / "moved.sqlite")) == first
    with closing(sqlite3.connect(tmp_path / "moved.sqlite")) as connection, connection:
        connection.execute("UPDATE pairs SET caption = 'another'")
    assert key(tmp_path / "moved.sqlite") != first


def test_a_kind_without_a_line_is_refused() -> None:
    with pytest.raises(ValidationError, match="sqlite"):
        DownloadConfig(files={"kind": "sqlite", "path": "pairs.sqlite"})
