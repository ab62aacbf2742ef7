"""Code tables: the codes that a tokenizer made of images, as Parquet files that any reader can open.

The columns are key, text columns, and `codes`, a fixed-size list of the smallest unsigned integer that fits. The schema
metadata holds the rest as JSON under `musevl`. Shapes: B samples, N books, D depth (residual levels), h w code grid.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.digests import canonical_json
from storage.errors import DamagedObject, TokenizerMismatch, on_one_line
from storage.tables import read_table, write_table

SCHEMA_VERSION = 1
_METADATA_KEY = b"musevl"
_RESERVED_COLUMNS = ("key", "codes")


@dataclass(frozen=True)
class CodeTableInfo:
    """What a reader must know to use the codes; it is the same in all shards of a table."""

    code_shape: tuple[int, int, int, int]
    """Shape of one sample's codes: N books, D depth, h rows, w columns."""
    codebook_names: tuple[str, ...]
    """Name of each book."""
    codebook_sizes: tuple[int, ...]
    """Number of entries of each book; codes of all depths are smaller than that."""
    tokenizer_digest: str
    """Artifact digest of the tokenizer that made the codes."""
    transform: dict[str, Any]
    """The image transform as JSON."""
    schema_version: int = SCHEMA_VERSION
    """Version of this layout."""

    def __post_init__(self) -> None:
        if len(self.code_shape) != 4 or min(self.code_shape) < 1:
            raise ValueError(f"code_shape is {self.code_shape}; give (books, depth, h, w), each at least 1")
        for name in ("codebook_names", "codebook_sizes"):
            if len(getattr(self, name)) != self.code_shape[0]:
                raise ValueError(f"{name} is {getattr(self, name)}; give one for each of {self.code_shape[0]} books")
        if min(self.codebook_sizes) < 1 or max(self.codebook_sizes) > 2**32:
            raise ValueError(f"codebook_sizes is {self.codebook_sizes}; sizes lie between 1 and 2**32")
        if not self.tokenizer_digest:
            raise ValueError("tokenizer_digest is empty; give the digest of the tokenizer's artifact")
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"code table schema_version is {self.schema_version}, this code reads {SCHEMA_VERSION}; tokenize again"
            )
        canonical_json(self.transform)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned integer type that holds every code."""
        return np.min_scalar_type(max(self.codebook_sizes) - 1)

    def to_bytes(self) -> bytes:
        """Return the info as canonical JSON."""
        return canonical_json(
            {
                "code_shape": list(self.code_shape),
                "codebook_names": list(self.codebook_names),
                "codebook_sizes": list(self.codebook_sizes),
                "tokenizer_digest": self.tokenizer_digest,
                "transform": self.transform,
                "schema_version": self.schema_version,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "CodeTableInfo":
        """Read the JSON of `to_bytes`; raise ValueError if it is something else."""
        try:
            value = json.loads(data)
            books, depth, height, width = value["code_shape"]
            return cls(
                code_shape=(books, depth, height, width),
                codebook_names=tuple(value["codebook_names"]),
                codebook_sizes=tuple(value["codebook_sizes"]),
                tokenizer_digest=value["tokenizer_digest"],
                transform=value["transform"],
                schema_version=value["schema_version"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the metadata of a code table: {error}") from error


@dataclass(frozen=True)
class CodeTable:
    """A code table in memory."""

    info: CodeTableInfo
    keys: list[str]
    """Keys of the B samples."""
    columns: dict[str, list[str | None]]
    """Text columns by name, with B values each."""
    codes: npt.NDArray[np.unsignedinteger[Any]]
    """Codes `[B, N, D, h, w]`."""


def write_code_shard(
    path: str | Path,
    info: CodeTableInfo,
    keys: Sequence[str],
    columns: dict[str, list[str | None]],
    codes: npt.NDArray[np.integer[Any]],
) -> None:
    """Write one shard of a code table by an atomic rename; equal arguments give equal bytes.

    Args:
        path: path of the Parquet file.
        info: metadata of the table, the same for all its shards.
        keys: unique keys of the B samples.
        columns: text columns by name, with B values each.
        codes: `[B, N, D, h, w]` codes of any integer type.

    Raises:
        ValueError: lengths or shapes disagree, a code lies outside its codebook, or a key occurs twice.
    """
    _check_rows(path, keys, columns, len(codes))
    _check_codes(path, info, codes)
    flat = pa.array(np.ascontiguousarray(codes, dtype=info.dtype).reshape(-1))
    item = pa.field("element", flat.type, nullable=False)
    code_lists = pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(item, prod(info.code_shape)))
    fields = [pa.field("key", pa.string(), nullable=False)]
    fields += [pa.field(name, pa.string()) for name in columns]
    fields += [pa.field("codes", code_lists.type, nullable=False)]
    texts = [pa.array(values, pa.string()) for values in columns.values()]
    schema = pa.schema(fields, metadata={_METADATA_KEY: info.to_bytes()})
    write_table(pa.table([pa.array(keys, pa.string()), *texts, code_lists], schema=schema), path)


def check_written(path: str | Path, keys: Sequence[str], codes: npt.NDArray[np.integer[Any]]) -> None:
    """Read a shard back and raise DamagedObject unless it has the keys and codes that were written."""
    table = read_code_table([path])
    if table.keys != list(keys) or not np.array_equal(table.codes, codes):
        raise DamagedObject(f"{path} does not give back the {len(keys)} rows that were written; check disk and memory")


def read_info(path: str | Path) -> CodeTableInfo:
    """Read the metadata of a shard; raise ValueError if the file is not a shard of a code table."""
    metadata = pq.read_schema(path).metadata or {}
    if _METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} is not a code table: its schema metadata lacks 'musevl'; give files that tokenize or "
            f"storage.code_table.write_code_shard wrote (docs/tokenizers.md, codes of another project)"
        )
    try:
        return CodeTableInfo.from_bytes(metadata[_METADATA_KEY])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def code_files(folder: str | Path, what: str) -> list[Path]:
    """Return the Parquet files of a folder of codes, sorted.

    Args:
        folder: a local folder.
        what: name of the folder in the message.

    Raises:
        ValueError: the folder has no Parquet file.
    """
    found = sorted(Path(folder).glob("*.parquet")) if str(folder) else []
    if not found:
        raise ValueError(
            f"{what}: {str(folder)!r} holds no .parquet file; give the folder of the codes that a tokenizer of another "
            "project made (see docs/tokenizers.md)"
        )
    return found


def read_code_table(paths: Iterable[str | Path]) -> CodeTable:
    """Read shards into one table, with the rows in the order of `paths`.

    Raises:
        ValueError: there are no shards, their metadata or columns differ, the codes do not have the shape that the
            metadata says, or a code lies outside its codebook.
    """
    shards = list(paths)
    if not shards:
        raise ValueError("no shards of a code table were given; give at least one Parquet file")
    info = read_info(shards[0])
    tables, parts = [], [np.zeros((0, *info.code_shape), info.dtype)]
    for path in shards:
        if (other := read_info(path)) != info:
            raise ValueError(
                f"shards of different code tables: {shards[0]} and {path} differ in {_difference(info, other)}; "
                "read tables of one tokenizer and transform at a time"
            )
        shard = read_table(path)
        if missing := [name for name in _RESERVED_COLUMNS if name not in shard.column_names]:
            raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(shard.column_names)}")
        parts += [_codes_of(chunk, info, path) for chunk in shard.column("codes").chunks]
        tables.append(shard.drop_columns(["codes"]))
        if tables[-1].column_names != tables[0].column_names:
            raise ValueError(f"{path} has columns {tables[-1].column_names}, {shards[0]} {tables[0].column_names}")
    try:
        table = pa.concat_tables(tables, promote_options="default")  # a text column may be empty in one shard
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        reason = on_one_line(error)
        raise ValueError(f"{shards[0]} and the other shards have columns of different types: {reason}") from error
    if not pa.types.is_string(kind := table.schema.field("key").type) and not pa.types.is_large_string(kind):
        raise ValueError(f"{shards[0]}: keys are of type {kind}; give the texts of the metadata tables' column `key`")
    codes = np.concatenate(parts)
    _check_codes(shards[0], info, codes)
    columns = {name: table.column(name).to_pylist() for name in table.column_names if name not in _RESERVED_COLUMNS}
    return CodeTable(info=info, keys=table.column("key").to_pylist(), columns=columns, codes=codes)


def _codes_of(values: pa.Array, info: CodeTableInfo, path: str | Path) -> npt.NDArray[Any]:
    """Convert lists, flat as tokenize writes them or nested as pandas does, to codes `[B, N, D, h, w]`.

    Raises:
        ValueError: a list is missing or does not fit the shape, or it does not hold integers.
    """
    nested: list[int] = []
    while pa.types.is_list(kind := values.type) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if values.null_count or len(lengths) > 1:
            shown = ", ".join("none" if length is None else str(length) for length in lengths[:4])
            raise ValueError(
                f"{path}: lists in `codes` have different lengths ({shown}); every image has {prod(info.code_shape)} "
                f"codes, those of code_shape {list(info.code_shape)}"
            )
        nested += lengths
        values = values.flatten()
    if not pa.types.is_integer(kind) or values.null_count:
        held = f"{values.null_count} empty places" if values.null_count else f"values of type {kind}"
        raise ValueError(f"{path}: `codes` holds {held}; give a list of integers for each row")
    if nested and _squeezed(nested) not in (_squeezed(info.code_shape), _squeezed([prod(info.code_shape)])):
        raise ValueError(
            f"{path}: lists in `codes` have the shape {nested}, code_shape is {list(info.code_shape)}; write the codes "
            f"of an image as one list of {prod(info.code_shape)}, in the order books, depth, rows, columns"
        )
    return values.to_numpy(zero_copy_only=False).reshape(-1, *info.code_shape)


def _squeezed(shape: Sequence[int]) -> list[int]:
    return [length for length in shape if length != 1]


def check_tokenizer(info: CodeTableInfo, expected_digest: str) -> None:
    """Raise TokenizerMismatch, which names both digests, unless the codes were made by the expected tokenizer."""
    if info.tokenizer_digest != expected_digest:
        raise TokenizerMismatch(
            f"the code table was made by tokenizer {info.tokenizer_digest}, but this run uses tokenizer "
            f"{expected_digest}; tokenize the images again, or use the table's own tokenizer"
        )


def _check_rows(path: str | Path, keys: Sequence[str], columns: dict[str, list[str | None]], num_codes: int) -> None:
    lengths = {"keys": len(keys), "codes": num_codes} | {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{path}: keys, columns and codes have different lengths: {lengths}")
    if len(set(keys)) != len(keys):
        raise ValueError(f"{path}: {len(keys) - len(set(keys))} keys occur twice; give each sample its own key")
    if taken := sorted(set(columns) & set(_RESERVED_COLUMNS)):
        raise ValueError(f"{path}: text columns {taken} have reserved names; rename them")


def _check_codes(path: str | Path, info: CodeTableInfo, codes: npt.NDArray[Any]) -> None:
    if codes.shape[1:] != info.code_shape or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(
            f"{path}: codes are {codes.dtype} of shape {codes.shape}; give integers [B, books, depth, h, w] "
            f"with {info.code_shape} after B"
        )
    if not len(codes):
        return
    for book, (name, size) in enumerate(zip(info.codebook_names, info.codebook_sizes, strict=True)):
        lowest, highest = int(codes[:, book].min()), int(codes[:, book].max())
        if lowest < 0 or highest >= size:
            raise ValueError(
                f"{path}: codes of book {name!r} run from {lowest} to {highest}, outside its {size} entries; "
                "check that the table belongs to this codebook"
            )


def _difference(one: CodeTableInfo, other: CodeTableInfo) -> str:
    first, second = json.loads(one.to_bytes()), json.loads(other.to_bytes())
    return ", ".join(f"{name} ({first[name]} and {second[name]})" for name in first if first[name] != second[name])
