import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from storage.digests import sha256_file
from storage.tables import (
    IMAGE_METADATA_SCHEMA,
    METRICS_SCHEMA,
    image_metadata_table,
    metrics_table,
    read_metrics,
    read_table,
    validate_image_metadata,
    validate_metrics,
    write_table,
)

IMAGE_ROW = {
    "key": "000",
    "url": "http://host/a.png",
    "caption": "a cat",
    "status": "success",
    "width": 64,
    "height": 32,
    "sha256": "0" * 64,
    "bytes": 2**40,
    "shard": "00000.tar",
}
METRIC_ROW = {
    "model": "m",
    "role": "ours",
    "benchmark": "reconstruction",
    "split": "test",
    "metric": "psnr",
    "qualifier": "",
    "value": 21.5,
    "ci_low": 21.0,
    "ci_high": 22.0,
    "num_samples": 100,
    "settings": {"crop": "center", "cfg": {"scale": 3.0}},
}


def test_image_metadata_survives_the_round_trip_with_failures_and_extra_columns(tmp_path: Path) -> None:
    failed = {"key": "001", "url": "http://host/b", "status": "failed", "error": "404", "style": "flat"}
    table = image_metadata_table([IMAGE_ROW, failed], extra_columns=["style"])
    write_table(table, tmp_path / "t.parquet")
    again = read_table(tmp_path / "t.parquet")
    assert again.schema.names == [*IMAGE_METADATA_SCHEMA.names, "style"]
    assert again.equals(table)
    assert again.to_pylist()[1]["width"] is None
    assert read_table(tmp_path / "t.parquet", columns=["key"]).to_pydict() == {"key": ["000", "001"]}


def test_metrics_spell_their_settings_in_one_way() -> None:
    reordered = METRIC_ROW | {"settings": {"cfg": {"scale": 3.0}, "crop": "center"}, "metric": "ssim"}
    table = metrics_table([METRIC_ROW, reordered])
    assert table.schema == METRICS_SCHEMA
    one, two = table.column("settings").to_pylist()
    assert one == two
    assert json.loads(one) == METRIC_ROW["settings"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (METRIC_ROW | {"value": None}, "'value' has 1 nulls"),
        (METRIC_ROW | {"value": "high"}, "column 'value'"),
        (METRIC_ROW | {"num_samples": None}, "1 rows that are not published lack num_samples"),
        (METRIC_ROW | {"role": "best"}, r"roles \['best'\] are none of \['ours', 'baseline', 'ceiling', 'published'\]"),
        (METRIC_ROW | {"note": "x"}, r"row 0 has the columns \['note'\]"),
    ],
)
def test_bad_metric_rows_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics_table([row])


def test_a_published_number_need_not_say_of_how_many_samples(tmp_path: Path) -> None:
    quoted = METRIC_ROW | {"role": "published", "num_samples": None}
    write_table(metrics_table([quoted, METRIC_ROW]), tmp_path / "metrics.parquet")
    assert read_metrics(tmp_path / "metrics.parquet") == [quoted, METRIC_ROW]


def test_a_metrics_table_of_another_version_is_told_apart(tmp_path: Path) -> None:
    write_table(metrics_table([METRIC_ROW]).drop_columns(["role"]), tmp_path / "metrics.parquet")
    with pytest.raises(ValueError, match="must begin with.*another version wrote this table, so run the stage that"):
        read_metrics(tmp_path / "metrics.parquet")


def test_two_values_of_one_metric_are_refused() -> None:
    with pytest.raises(ValueError, match="appear twice.*psnr"):
        metrics_table([METRIC_ROW, METRIC_ROW | {"value": 1.0}])


def test_bad_image_metadata_is_refused() -> None:
    good = image_metadata_table([IMAGE_ROW])
    with pytest.raises(ValueError, match="appear twice"):
        validate_image_metadata(pa.concat_tables([good, good]))
    with pytest.raises(ValueError, match="must begin with"):
        validate_image_metadata(good.drop_columns(["url"]))
    with pytest.raises(ValueError, match="'width' is int64; it must be int32"):
        validate_image_metadata(good.set_column(5, "width", pa.array([64], pa.int64())))
    with pytest.raises(ValueError, match="only string columns may follow"):
        validate_image_metadata(good.append_column("score", pa.array([0.5])))
    with pytest.raises(ValueError, match="extra columns"):
        table = metrics_table([METRIC_ROW])
        validate_metrics(table.append_column("note", pa.array(["x"])))


def test_parquet_bytes_depend_on_rows_alone_not_on_chunks_or_pandas(tmp_path: Path) -> None:
    import pandas as pd  # here: what one test needs is not loaded by every test run

    random = np.random.default_rng(0)
    frame = pd.DataFrame({"key": [f"{i:05d}" for i in range(20_000)], "value": random.normal(size=20_000)})
    whole = pa.Table.from_pandas(frame, preserve_index=False)
    chunks = pa.concat_tables([whole.slice(start, 777) for start in range(0, len(whole), 777)])
    plain = whole.replace_schema_metadata(None)
    digests = set()
    for number, table in enumerate([whole, chunks, plain, plain]):
        write_table(table, tmp_path / str(number) / "t.parquet")
        digests.add(sha256_file(tmp_path / str(number) / "t.parquet"))
    assert len(digests) == 1
    assert read_table(tmp_path / "0" / "t.parquet").equals(plain)


def test_a_table_whose_writing_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_table(pa.table({"a": [1]}), path)
    unwritable = pa.table({"a": pa.array([], pa.null()).cast(pa.month_day_nano_interval())})
    with pytest.raises(pa.ArrowException):
        write_table(unwritable, path)
    assert read_table(path).to_pydict() == {"a": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_unknown_columns_are_named(tmp_path: Path) -> None:
    write_table(pa.table({"a": [1]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"no columns \['b'\]; it has \['a'\]"):
        read_table(tmp_path / "t.parquet", columns=["b"])
