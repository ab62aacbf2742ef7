"""Planning, resuming and committing a tokenize stage of 24 million rows: the stage's own code, synthetic receipts.

    python -m tests.benchmarks.bench_scaling [--rows 24000000] [--rows-per-shard 1000] [--store URI]

Every shard has a receipt already, as after a run whose driver died at the very end, so nothing is encoded. Each case
prints its time or memory as `ours` and the limit (2 minutes, 2 GiB) as `peer`. Writing the receipts is not counted.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.executors import LocalExecutor
from stages.protocol import StageContext
from stages.tokenize.stage import STAGE, TokenizeConfig
from storage.manifest import FileEntry, Manifest
from storage.store import Store
from tests.benchmarks.measuring import report

LIMIT_SECONDS, LIMIT_BYTES = 120.0, 2 << 30
KEY = "0" * 64


def main() -> None:
    """Run all cases on one store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=24_000_000)
    parser.add_argument("--rows-per-shard", type=int, default=1000)
    parser.add_argument("--store", default="", help="a store to use; default a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(arguments.store or str(Path(folder) / "store"))
        shards = [f"{number:06d}" for number in range(-(-arguments.rows // arguments.rows_per_shard))]
        name = f"{arguments.rows} rows in {len(shards)} shards"
        download = _download(shards, arguments.rows)
        for shard, entry in zip(shards, _blobs(store, shards), strict=True):
            counts = {"rows": arguments.rows_per_shard, "images": arguments.rows_per_shard, "left_out": []}
            store.work(KEY).write_receipt(shard, {"files": [entry.to_json()], **counts})

        start = time.perf_counter()
        assert len(dict(store.work(KEY).receipts())) == len(shards)
        report(f"{name}: list receipts", time.perf_counter() - start, LIMIT_SECONDS, "s")

        start = time.perf_counter()
        outcome = STAGE.run(_context(store, download, Path(folder)))
        report(f"{name}: plan and resume", time.perf_counter() - start, LIMIT_SECONDS, "s")
        manifest = Manifest(
            outcome.kind, outcome.schema_version, STAGE.name, {}, {}, tuple(outcome.files), outcome.metrics, {}
        )
        start = time.perf_counter()
        assert store.commit(KEY, manifest).created
        report(f"{name}: commit", time.perf_counter() - start, LIMIT_SECONDS, "s")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report(f"{name}: peak memory of the process", peak / 2**20, LIMIT_BYTES / 2**20, "MiB")


def _download(shards: list[str], num_images: int) -> Manifest:
    """A download of as many shards; its images are never read, so its files need not exist."""
    files = tuple(FileEntry(f"images/{shard}.tar", 1, "0" * 64) for shard in shards)
    return Manifest("image_shards", 1, "download", {}, {}, files, {"num_ok": num_images}, {})


def _blobs(store: Store, shards: list[str]) -> Iterator[FileEntry]:
    for shard in shards:
        yield store.put_bytes(shard.encode(), f"codes/{shard}.parquet")


def _context(store: Store, download: Manifest, scratch: Path) -> StageContext[Any]:
    tokenizer = Manifest("tokenizer", 1, "train_tokenizer", {}, {}, (), {}, {"code_shape": [1, 1, 27, 27]})
    teacher = Manifest("teacher", 1, "prepare_teacher", {}, {}, (), {}, {"has_text": False})
    inputs = {"download": download, "prepare_teacher": teacher, "train_tokenizer": tokenizer}
    return StageContext(TokenizeConfig(), 0, inputs, store, KEY, LocalExecutor(), scratch)


if __name__ == "__main__":
    main()
