"""Size of a code table, and shuffled reading of it against WebDataset tars of `.npy` and one `.npy` an image.

    python -m tests.benchmarks.bench_code_table [--images 20000]

Codes are drawn evenly from a codebook of 32,768, 16 x 16 an image, so nothing can be compressed: the worst case.
Reading is one epoch in random order from files that were just written (warm page cache on all sides), in one process.
"""

from __future__ import annotations

import argparse
import io
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import webdataset

from storage.code_table import CodeTableInfo, read_code_table, write_code_shard
from tests.benchmarks.measuring import report

CODEBOOK, SHAPE = 32_768, (1, 1, 16, 16)
SHARD = 5_000
SHUFFLE_BUFFER = 1_000
"""WebDataset's usual way to shuffle a stream; ours and single files are shuffled over everything."""


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    count = parser.parse_args().images
    codes = np.random.default_rng(0).integers(0, CODEBOOK, (count, *SHAPE))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tables = _write_tables(folder, codes)
        _size(tables, count)
        tars = _write_tars(folder, codes)
        files = _write_files(folder, codes)
        own = _time(lambda: _read_tables(tables, codes), count)
        report(
            f"shuffled read of {count} against WebDataset tars", own, _time(lambda: _read_tars(tars), count), "us/img"
        )
        report(f"shuffled read of {count} against files", own, _time(lambda: _read_files(files), count), "us/img")


def _keys(count: int) -> list[str]:
    return [f"{number:09d}" for number in range(count)]


def _write_tables(folder: Path, codes: np.ndarray) -> list[Path]:
    info = CodeTableInfo(SHAPE, ("semantic_discrete",), (CODEBOOK,), "0" * 64, {"image_size": 256})
    keys, paths = _keys(len(codes)), []
    for start in range(0, len(codes), SHARD):
        paths.append(folder / f"{start:09d}.parquet")
        part = slice(start, start + SHARD)
        write_code_shard(paths[-1], info, keys[part], {"text": ["a caption"] * len(keys[part])}, codes[part])
    return paths


def _size(paths: list[Path], count: int) -> None:
    """Bytes an image of the codes column alone, against what the information needs."""
    total = 0
    for path in paths:
        metadata = pq.ParquetFile(path).metadata
        for group in range(metadata.num_row_groups):
            columns = [metadata.row_group(group).column(index) for index in range(metadata.num_columns)]
            total += sum(
                column.total_compressed_size for column in columns if column.path_in_schema.startswith("codes")
            )
    least = math.log2(CODEBOOK) * math.prod(SHAPE) / 8
    report(f"bytes an image, {math.prod(SHAPE)} codes of {CODEBOOK}", total / count, least, "bytes")


def _write_tars(folder: Path, codes: np.ndarray) -> list[str]:
    paths = []
    for start in range(0, len(codes), SHARD):
        paths.append(str(folder / f"{start:09d}.tar"))
        with webdataset.TarWriter(paths[-1]) as writer:
            for number in range(start, min(start + SHARD, len(codes))):
                writer.write({"__key__": f"{number:09d}", "npy": _npy(codes[number]), "txt": "a caption"})
    return paths


def _npy(codes: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, codes.astype(np.uint16))
    return buffer.getvalue()


def _write_files(folder: Path, codes: np.ndarray) -> list[Path]:
    (folder / "files").mkdir()
    paths = [folder / "files" / f"{key}.npy" for key in _keys(len(codes))]
    for path, row in zip(paths, codes, strict=True):
        path.write_bytes(_npy(row))
    return paths


def _read_tables(paths: list[Path], codes: np.ndarray) -> int:
    table = read_code_table(paths)
    total = 0
    for row in np.random.default_rng(1).permutation(len(table.keys)):
        total += len(table.columns["text"][row] or "") + table.codes[row].astype(np.int64).shape[-1]
    assert (table.codes[-1] == codes[-1]).all(), "the right codes are read"
    return total


def _read_tars(paths: list[str]) -> int:
    total = 0
    dataset = webdataset.WebDataset(paths, shardshuffle=False).shuffle(SHUFFLE_BUFFER).decode()
    for sample in dataset:
        total += len(sample["txt"]) + sample["npy"].astype(np.int64).shape[-1]
    return total


def _read_files(paths: list[Path]) -> int:
    return sum(
        np.load(paths[row]).astype(np.int64).shape[-1] for row in np.random.default_rng(1).permutation(len(paths))
    )


def _time(read: Callable[[], int], count: int) -> float:
    """Microseconds an image."""
    start = time.perf_counter()
    assert read() > 0
    return (time.perf_counter() - start) / count * 1e6


if __name__ == "__main__":
    main()
