from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.code_table import (
    CodeTableInfo,
    check_tokenizer,
    check_written,
    read_code_table,
    read_info,
    write_code_shard,
)
from storage.digests import sha256_file
from storage.errors import DamagedObject, TokenizerMismatch
from storage.tables import read_table

INFO = CodeTableInfo(
    code_shape=(2, 3, 4, 5),
    codebook_names=("pixel", "semantic"),
    codebook_sizes=(1024, 300),
    tokenizer_digest="a" * 64,
    transform={"resize": 64, "crop": "center", "mean": [0.5, 0.5, 0.5]},
)


def random_codes(num_samples: int, info: CodeTableInfo = INFO, seed: int = 0) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    books = [random.integers(0, size, (num_samples, *info.code_shape[1:])) for size in info.codebook_sizes]
    return np.stack(books, axis=1)


def keys_of(num_samples: int, start: int = 0) -> list[str]:
    return [f"{start + index:05d}" for index in range(num_samples)]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard.parquet"
    write_code_shard(path, INFO, keys_of(7), {"caption": ["ü", None, *"abcde"]}, random_codes(7))
    return path


def test_shards_come_back_as_one_table(tmp_path: Path) -> None:
    codes = random_codes(10)
    write_code_shard(tmp_path / "0", INFO, keys_of(7), {"caption": list("abcdefg"), "style": [None] * 7}, codes[:7])
    write_code_shard(tmp_path / "1", INFO, keys_of(3, 7), {"caption": [*"hi", None], "style": list("xyz")}, codes[7:])
    write_code_shard(tmp_path / "2", INFO, [], {"caption": [], "style": []}, codes[:0])
    table = read_code_table([tmp_path / "0", tmp_path / "1", tmp_path / "2"])
    assert table.info == INFO == read_info(tmp_path / "1")
    assert table.keys == keys_of(10)
    assert table.columns == {"caption": [*"abcdefghi", None], "style": [*[None] * 7, *"xyz"]}
    assert table.codes.dtype == np.uint16
    np.testing.assert_array_equal(table.codes, codes)


@pytest.mark.parametrize(
    ("size", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_codes_are_kept_in_the_smallest_type_that_holds_the_largest(size: int, dtype: str, tmp_path: Path) -> None:
    info = replace(INFO, code_shape=(1, 1, 1, 2), codebook_names=("one",), codebook_sizes=(size,))
    codes = np.array([0, size - 1]).reshape(1, 1, 1, 1, 2)
    write_code_shard(tmp_path / "t", info, ["a"], {}, codes)
    assert read_table(tmp_path / "t").schema.field("codes").type.value_type == dtype
    np.testing.assert_array_equal(read_code_table([tmp_path / "t"]).codes, codes)


def test_equal_codes_give_equal_bytes_whatever_their_type_and_strides(tmp_path: Path) -> None:
    codes = random_codes(50)
    variants = [codes, codes.astype(np.int32), codes.astype(np.uint16), np.asfortranarray(codes)]
    for number, variant in enumerate(variants):
        write_code_shard(tmp_path / str(number), INFO, keys_of(50), {"caption": ["x"] * 50}, variant)
    assert len({sha256_file(tmp_path / str(number)) for number in range(len(variants))}) == 1


def test_pandas_duckdb_and_polars_read_a_shard_alone(shard: Path) -> None:
    import duckdb
    import pandas as pd
    import polars as pl

    codes = random_codes(7)
    flat = codes.reshape(7, -1)
    frame = pd.read_parquet(shard)
    np.testing.assert_array_equal(np.stack(frame["codes"].tolist()).reshape(codes.shape), codes)
    assert frame["key"].tolist() == keys_of(7)
    polars = pl.read_parquet(shard)
    np.testing.assert_array_equal(np.array(polars["codes"].to_list()), flat)
    assert polars["caption"].to_list() == ["ü", None, *"abcde"]
    rows = (
        duckdb.connect()
        .execute("select key, caption, codes from read_parquet(?) order by key", [str(shard)])
        .fetchall()
    )
    np.testing.assert_array_equal(np.array([row[2] for row in rows]), flat)
    assert [row[:2] for row in rows] == list(zip(keys_of(7), ["ü", None, *"abcde"], strict=True))


@pytest.mark.parametrize(("book", "code"), [(0, 1024), (1, 300), (1, 1023), (0, -1)])
def test_codes_outside_their_own_codebook_are_refused(book: int, code: int, tmp_path: Path) -> None:
    codes = random_codes(3)
    codes[1, book, 2, 3, 4] = code
    with pytest.raises(ValueError, match=f"book '{INFO.codebook_names[book]}'.*outside its"):
        write_code_shard(tmp_path / "t", INFO, keys_of(3), {}, codes)
    assert not (tmp_path / "t").exists()


def test_codes_outside_the_codebook_are_refused_on_reading_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(3)
    codes[0, 1] = 301
    with monkeypatch.context() as patch:
        patch.setattr("storage.code_table._check_codes", lambda *arguments: None)
        write_code_shard(tmp_path / "t", INFO, keys_of(3), {}, codes)
    with pytest.raises(ValueError, match="book 'semantic'.*outside its 300"):
        read_code_table([tmp_path / "t"])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tokenizer_digest": "b" * 64}, "tokenizer_digest"),
        ({"transform": {"resize": 32}}, "transform"),
        ({"codebook_names": ("pixel", "other")}, "codebook_names"),
        ({"codebook_sizes": (1024, 1024)}, "codebook_sizes"),
    ],
)
def test_shards_of_different_tables_are_not_mixed(change: dict[str, Any], field: str, shard: Path) -> None:
    other = shard.parent / "other"
    write_code_shard(other, replace(INFO, **change), keys_of(7), {"caption": ["x"] * 7}, random_codes(7))
    with pytest.raises(ValueError, match=f"shards of different code tables.*differ in {field}"):
        read_code_table([shard, other])


def test_shards_with_other_columns_are_not_mixed(shard: Path) -> None:
    write_code_shard(shard.parent / "other", INFO, keys_of(7), {}, random_codes(7))
    with pytest.raises(ValueError, match="has columns"):
        read_code_table([shard, shard.parent / "other"])


def test_rows_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    codes = random_codes(2)
    bad: list[tuple[list[str], dict[str, list[str | None]], Any, str]] = [
        (["a"], {}, codes, "different lengths"),
        (["a", "b"], {"caption": ["x"]}, codes, "different lengths"),
        (["a", "a"], {}, codes, "keys occur twice"),
        (["a", "b"], {"codes": ["x", "y"]}, codes, "reserved"),
        (["a", "b"], {}, codes[:, :1], "of shape"),
        (["a", "b"], {}, codes.astype(np.float32), "give integers"),
    ]
    for keys, columns, values, message in bad:
        with pytest.raises(ValueError, match=message):
            write_code_shard(tmp_path / "t", INFO, keys, columns, values)


def test_another_tokenizer_is_refused_and_both_are_named() -> None:
    check_tokenizer(INFO, "a" * 64)
    with pytest.raises(TokenizerMismatch, match=f"{'a' * 64}.*{'b' * 64}"):
        check_tokenizer(INFO, "b" * 64)


def test_a_parquet_file_that_is_no_code_table_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "t")
    with pytest.raises(ValueError, match="is not a code table"):
        read_info(tmp_path / "t")
    with pytest.raises(ValueError, match="at least one"):
        read_code_table([])


@pytest.mark.parametrize(
    "change",
    [
        {"code_shape": (2, 3, 4)},
        {"code_shape": (2, 0, 4, 5)},
        {"codebook_names": ("pixel",)},
        {"codebook_sizes": (1024, 0)},
        {"tokenizer_digest": ""},
        {"schema_version": 99},
        {"transform": {"size": (1, 2)}},
    ],
)
def test_an_info_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give|sizes lie|tokenize again|not JSON"):
        replace(INFO, **change)


def test_a_shard_that_does_not_give_back_what_was_written_is_noticed(shard: Path) -> None:
    check_written(shard, keys_of(7), random_codes(7))
    changed = random_codes(7)
    changed[3, 0, 0, 0, 0] ^= 1
    for keys, codes in ((keys_of(7, 1), random_codes(7)), (keys_of(7), changed), (keys_of(6), random_codes(7)[:6])):
        with pytest.raises(DamagedObject, match="does not give back"):
            check_written(shard, keys, codes)


def test_info_survives_the_round_trip() -> None:
    assert CodeTableInfo.from_bytes(INFO.to_bytes()) == INFO


SMALL = CodeTableInfo((1, 1, 2, 3), ("theirs",), (64,), "SEED-2", {})


def write_theirs(path: Path, **columns: Any) -> Path:
    """Rows as another project may write them: pandas' lists of 64 bits, with our schema metadata."""
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata({b"musevl": SMALL.to_bytes()}), path)
    return path


@pytest.mark.parametrize("kind", ["list", "large", "fixed", "nested", "whole shape", "nested fixed", "unsigned"])
def test_codes_are_read_from_lists_of_any_form_that_has_their_shape(tmp_path: Path, kind: str) -> None:
    codes = random_codes(4, SMALL)
    flat, grid = [row.ravel().tolist() for row in codes], [row[0, 0].tolist() for row in codes]
    column = {
        "list": lambda: pa.array(flat),
        "large": lambda: pa.array(flat, pa.large_list(pa.int32())),
        "fixed": lambda: pa.array(flat, pa.list_(pa.int64(), 6)),
        "nested": lambda: pa.array(grid),
        "whole shape": lambda: pa.array(codes.tolist()),
        "nested fixed": lambda: pa.array(grid, pa.list_(pa.list_(pa.uint8(), 3), 2)),
        "unsigned": lambda: pa.array(flat, pa.list_(pa.uint16())),
    }[kind]()
    paths = [
        write_theirs(tmp_path / f"{part}.parquet", key=keys_of(2, start), codes=column[start : start + 2])
        for part, start in enumerate((0, 2))
    ]
    table = read_code_table(paths)
    np.testing.assert_array_equal(table.codes, codes)
    assert table.keys == keys_of(4)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"key": ["a", "b"], "codes": [[1] * 6, [1] * 5]}, r"different lengths \(6, 5\); every image has 6 codes"),
        ({"key": ["a", "b"], "codes": [[1] * 6, None]}, r"different lengths \(6, none\)"),
        ({"key": ["a"], "codes": [[[1, 2], [3, 4], [5, 6]]]}, r"have the shape \[3, 2\], code_shape is \[1, 1, 2, 3\]"),
        ({"key": ["a"], "codes": [[[1, 2, 3], [4, 5]]]}, "different lengths"),
        ({"key": ["a"], "codes": [[1] * 5]}, r"have the shape \[5\], code_shape is .* as one list of 6"),
        ({"key": ["a"], "codes": [[1, 2, 3, 4, 5, None]]}, "holds 1 empty places; give a list of integers"),
        ({"key": ["a"], "codes": [[0.5] * 6]}, "holds values of type double; give a list of integers"),
        ({"key": ["a"], "codes": ["1 2 3 4 5 6"]}, "holds values of type string; give a list of integers"),
        ({"key": [7], "codes": [[1] * 6]}, "keys are of type int64; give the texts of the metadata tables"),
        ({"name": ["a"], "codes": [[1] * 6]}, "has no column 'key'; it has name, codes"),
        ({"key": ["a"], "tokens": [[1] * 6]}, "has no column 'codes'; it has key, tokens"),
    ],
)
def test_codes_of_another_form_are_refused_by_file_and_with_what_is_right(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    path = write_theirs(tmp_path / "theirs.parquet", **columns)
    with pytest.raises(ValueError, match=rf"^{path}.*{message}"):
        read_code_table([path])


def test_a_text_column_may_be_empty_in_one_shard(tmp_path: Path) -> None:
    codes = [[1] * 6]
    first = write_theirs(tmp_path / "0.parquet", key=["a"], view=pa.nulls(1), codes=codes)
    second = write_theirs(tmp_path / "1.parquet", key=["b"], view=["view_1"], codes=codes)
    assert read_code_table([first, second]).columns == {"view": [None, "view_1"]}
    third = write_theirs(tmp_path / "2.parquet", key=["c"], view=[3], codes=codes)
    with pytest.raises(ValueError, match="columns of different types"):
        read_code_table([second, third])
