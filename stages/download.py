"""URL lists to image shards: WebDataset tars and one metadata row per URL, failures included.

The list is fixed first (filtered, in order, cut into shards of a fixed number of rows), then img2dataset fetches shard
after shard in private folders; what it fetched is sorted back into the list's order, checked by decoding, and stored.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from pydantic import NonNegativeInt, PositiveInt

from infra.sample_data.server import SAMPLE_LIST, SampleServer
from models.config import Config, Fraction
from models.transforms import TransformConfig, load_image
from stages.stage import Outcome, RuntimeInt, RuntimeStr, Stage, StageContext
from stages.standalone import run_standalone
from stages.training import tracked
from storage.digests import sha256_bytes
from storage.image_shards import ImageSample, write_image_shard
from storage.manifest import FileEntry
from storage.store import Store
from storage.tables import image_metadata_table, write_table

SAMPLE = "sample"
_ROW = "musevl_row"
"""Extra column that carries a row's position through img2dataset, which returns rows in completion order."""


_CALL = "import json, sys; from img2dataset import download; download(**json.loads(sys.argv[1]))"


class DownloadConfig(Config):
    """Which images, from where, and how hard to try."""

    url_list: RuntimeStr = SAMPLE
    """`sample` for the embedded emoji, or a CSV, TSV, JSONL or Parquet file, local or `s3://`; its content counts, not
    its path."""
    url_column: str = "url"
    """Column with the image's URL."""
    caption_column: str = "caption"
    """Column with its text."""
    extra_columns: tuple[str, ...] = ()
    """Further columns to keep, as strings. `split` (values `train`, `test`) decides what is held out."""
    keep: dict[str, tuple[str, ...]] = {}
    """Only rows whose column has one of these values, for example `{category: [food & drink]}`."""
    max_rows: int | None = None
    """Only the first rows of the (filtered) list."""
    rows_per_shard: PositiveInt = 1000
    """Rows of a shard: what is downloaded, and lost by a crash, together."""
    timeout_s: PositiveInt = 10
    """Seconds before an attempt at one URL is given up."""
    retries: NonNegativeInt = 2
    """Further attempts at a URL that failed."""
    max_failed_fraction: Fraction = 0.2
    """The stage stops when a larger part of the rows failed."""
    attempt: int = 0
    """Part of the identity of the result: raise it to download everything once more."""
    num_workers: RuntimeInt = 1
    """Shards downloaded at a time."""
    threads_per_worker: RuntimeInt = 32
    """Connections at a time in each worker."""


def run(context: StageContext[DownloadConfig]) -> Outcome:
    """Make the `image_shards` artifact: `images/NNNNN.tar` and `metadata/NNNNN.parquet`.

    Raises:
        ValueError: the list cannot be read, lacks a column or is empty; or too many rows failed.
    """
    config, store, key = context.config, context.store, context.action_key
    rows = read_url_list(config)
    local = context.scratch / "rows.parquet"
    write_table(rows, local)
    plan = store.create_plan(
        key, {"rows": store.put_file(local, "rows.parquet").to_json(), "shards": _cut(rows, config)}
    )
    done = store.receipts(key)
    items = [item | {"rows": plan["rows"]} for item in plan["shards"] if item["shard"] not in done]
    worker = DownloadWorker(store, key, config)
    results = context.executor.map(lambda: worker, items, num_workers=config.num_workers)
    for _ in tracked(results, len(items), "download shards"):
        pass
    return _outcome(config, store.receipts(key, done), plan)


def read_url_list(config: DownloadConfig) -> pa.Table:
    """The rows to fetch: url, caption and extra columns as strings, filtered, in the list's order.

    Raises:
        ValueError: naming the file and what was expected of it.
    """
    path = _list_path(config)
    table = _read_table(path)
    wanted = {"url": config.url_column, "caption": config.caption_column} | {
        name: name for name in config.extra_columns
    }
    for source in [*wanted.values(), *config.keep]:
        if source not in table.column_names:
            raise ValueError(
                f"URL list {path} has no column {source!r}; it has {', '.join(table.column_names)}: set "
                f"download.url_column, .caption_column, .extra_columns and .keep to what the list has"
            )
    for name, values in config.keep.items():
        table = table.filter(pc.is_in(pc.cast(table[name], pa.string()), pa.array(values, pa.string())))
    table = table.slice(0, config.max_rows)
    if table.num_rows == 0:
        reason = f" after download.keep={config.keep}" if config.keep else ""
        raise ValueError(f"URL list {path} has no rows{reason}; give at least one URL")
    columns = {name: pc.fill_null(pc.cast(table[source], pa.string()), "") for name, source in wanted.items()}
    return pa.table(columns)


@dataclass(frozen=True)
class DownloadWorker:
    """Fetches one shard, stores it and writes its receipt."""

    store: Store
    action_key: str
    config: DownloadConfig

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        table = pq.read_table(self.store.fetch(FileEntry.from_json(item["rows"])))
        rows = table.slice(item["start"], item["count"]).to_pylist()
        with self.store.attempt_dir() as scratch:
            fetched = _fetch(rows, self.config, scratch)
            receipt = self._store_shard(item, rows, fetched, scratch)
        self.store.write_receipt(self.action_key, item["shard"], receipt)
        return {"shard": item["shard"]}

    def _store_shard(
        self, item: dict[str, Any], rows: list[dict[str, Any]], fetched: dict[int, dict[str, Any]], scratch: Path
    ) -> dict[str, Any]:
        metadata, samples = [], []
        for position, row in enumerate(rows):
            sample_key = f"{item['start'] + position:09d}"
            described, image = _describe(sample_key, row, fetched.get(position), item["shard"])
            metadata.append(described)
            if image is not None:
                extra = {name: row[name] for name in self.config.extra_columns}
                samples.append(ImageSample(sample_key, image[0], image[1], row["caption"], extra | {"url": row["url"]}))
        write_image_shard(scratch / "shard.tar", samples)
        write_table(image_metadata_table(metadata, self.config.extra_columns), scratch / "shard.parquet")
        files = [
            self.store.put_file(scratch / "shard.tar", f"images/{item['shard']}.tar"),
            self.store.put_file(scratch / "shard.parquet", f"metadata/{item['shard']}.parquet"),
        ]
        splits = Counter(
            row.get("split") or "train" for row, m in zip(rows, metadata, strict=True) if m["status"] == "ok"
        )
        return {
            "files": [entry.to_json() for entry in files],
            "status": dict(Counter(row["status"] for row in metadata)),
            "errors": dict(Counter(row["error"] for row in metadata if row["error"])),
            "splits": dict(splits),
        }


def _fetch(rows: list[dict[str, Any]], config: DownloadConfig, scratch: Path) -> dict[int, dict[str, Any]]:
    """Run img2dataset over the rows; returns what it has to say of each position."""
    if any(row["url"].startswith("sample://") for row in rows):
        with SampleServer() as server:
            return _run_img2dataset([server.resolve(row["url"]) for row in rows], config, scratch)
    return _run_img2dataset([row["url"] for row in rows], config, scratch)


def _run_img2dataset(urls: list[str], config: DownloadConfig, scratch: Path) -> dict[int, dict[str, Any]]:
    pq.write_table(pa.table({"url": urls, _ROW: [str(row) for row in range(len(urls))]}), scratch / "urls.parquet")
    arguments = {
        "url_list": str(scratch / "urls.parquet"),
        "input_format": "parquet",
        "url_col": "url",
        "save_additional_columns": [_ROW],
        "output_folder": str(scratch / "fetched"),
        "output_format": "parquet",
        "number_sample_per_shard": len(urls),
        "processes_count": 1,
        "thread_count": config.threads_per_worker,
        "timeout": config.timeout_s,
        "retries": config.retries,
        "resize_mode": "no",
        "disable_all_reencoding": True,
        "extract_exif": False,
        "compute_hash": None,
        "enable_wandb": False,
    }
    # A process of its own: img2dataset spawns workers, and spawning imports the caller's main module once more, which
    # would run a script without a main guard again and again.
    ended = subprocess.run(
        [sys.executable, "-c", _CALL, json.dumps(arguments)],
        env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"},  # albumentations else asks the network at import
        capture_output=True,
        text=True,
    )
    if ended.returncode != 0:
        last = (ended.stderr.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"img2dataset ended with exit code {ended.returncode}: {last}")
    fetched = {}
    for path in sorted((scratch / "fetched").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            fetched[int(row[_ROW])] = row
    return fetched


def _describe(
    key: str, row: dict[str, Any], fetched: dict[str, Any] | None, shard: str
) -> tuple[dict[str, Any], tuple[bytes, str] | None]:
    """The metadata row of one URL, and its image's bytes and extension if it is good."""
    described = row | {"key": key, "status": "ok", "error": None, "shard": shard}
    described |= {"width": None, "height": None, "sha256": None, "bytes": None}
    if fetched is None:
        return described | {"status": "failed_to_download", "error": "no answer from img2dataset"}, None
    if fetched["status"] != "success":
        return described | {"status": fetched["status"], "error": fetched["error_message"]}, None
    data = fetched["jpg"]  # img2dataset names the column so whatever the format is
    try:
        width, height, extension = _inspect(data)
    except OSError as error:
        return described | {"status": "undecodable", "error": f"{type(error).__name__}: {error}"[:200]}, None
    facts = {"width": width, "height": height, "sha256": sha256_bytes(data), "bytes": len(data)}
    return described | facts, (data, extension)


def _inspect(data: bytes) -> tuple[int, int, str]:
    """Width, height and format of an image that decodes to its last row."""
    import io

    from PIL import Image

    load_image(data, TransformConfig(image_size=8))  # first: it turns whatever Pillow raises into OSError
    with Image.open(io.BytesIO(data)) as image:
        width, height, extension = image.width, image.height, (image.format or "").lower()
    return width, height, {"jpeg": "jpg"}.get(extension, extension)


def _cut(rows: pa.Table, config: DownloadConfig) -> list[dict[str, Any]]:
    starts = range(0, rows.num_rows, config.rows_per_shard)
    counts = [min(config.rows_per_shard, rows.num_rows - start) for start in starts]
    pairs = enumerate(zip(starts, counts, strict=True))
    return [{"shard": f"{index:05d}", "start": start, "count": count} for index, (start, count) in pairs]


def _outcome(config: DownloadConfig, receipts: dict[str, dict[str, Any]], plan: dict[str, Any]) -> Outcome:
    missing = [item["shard"] for item in plan["shards"] if item["shard"] not in receipts]
    assert not missing, f"every shard was mapped, yet {missing} have no receipt"
    status, errors, splits = Counter[str](), Counter[str](), Counter[str]()
    files = []
    for receipt in receipts.values():
        status.update(receipt["status"])
        errors.update(receipt["errors"])
        splits.update(receipt["splits"])
        files += [FileEntry.from_json(entry) for entry in receipt["files"]]
    num_rows, num_ok = sum(status.values()), status["ok"]
    if num_rows - num_ok > config.max_failed_fraction * num_rows:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in errors.most_common(3))
        raise ValueError(
            f"{num_rows - num_ok} of {num_rows} URLs failed, more than download.max_failed_fraction="
            f"{config.max_failed_fraction} ({reasons}); mend the list, raise the limit, or try again with "
            f"`--set download.attempt={config.attempt + 1}`"
        )
    metrics = {"num_rows": num_rows, "num_ok": num_ok, "status": dict(status), "errors": dict(errors.most_common(20))}
    return Outcome("image_shards", files, metrics=metrics, metadata={"splits": dict(splits)})


def _list_path(config: DownloadConfig) -> str:
    return str(SAMPLE_LIST) if config.url_list == SAMPLE else config.url_list


def _read_bytes(path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read download.url_list={path!r}: {error}; give a CSV, TSV, JSONL or Parquet file, or `sample`"
        ) from error


def _read_table(path: str) -> pa.Table:
    buffer = pa.BufferReader(_read_bytes(path))
    suffix = Path(path).suffix.lower()
    try:
        if suffix == ".parquet":
            return pq.read_table(buffer)
        if suffix in (".jsonl", ".ndjson", ".json"):
            return pyarrow.json.read_json(buffer)
        if suffix in (".csv", ".tsv"):
            separator = "\t" if suffix == ".tsv" else ","
            names = pyarrow.csv.open_csv(pa.BufferReader(_read_bytes(path)), parse_options=_csv(separator)).schema.names
            options = pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
            )
            return pyarrow.csv.read_csv(buffer, parse_options=_csv(separator), convert_options=options)
    except pa.ArrowInvalid as error:
        raise ValueError(f"URL list {path} is not readable as {suffix[1:]}: {error}; check the file") from error
    raise ValueError(f"URL list {path} has unknown suffix {suffix!r}; use .csv, .tsv, .jsonl or .parquet")


def _csv(separator: str) -> pyarrow.csv.ParseOptions:
    return pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True)


def _external_inputs(config: DownloadConfig) -> dict[str, str]:
    """The list counts by its content, not by its path."""
    return {"url_list": sha256_bytes(_read_bytes(_list_path(config)))}


STAGE = Stage(
    name="download",
    section="download",
    config_class=DownloadConfig,
    inputs=(),
    run=run,
    external_inputs=_external_inputs,
)

if __name__ == "__main__":
    raise SystemExit(run_standalone(STAGE.name))
