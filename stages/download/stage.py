"""The stage that turns image-text pairs into image shards: WebDataset tars and one metadata row per input.

The rows are fixed first (filtered, in order, divided into shards of a fixed number of rows). Then each shard is
fetched, URLs by img2dataset and files by their source. What was fetched is checked by decoding, sorted into the list's
order and stored, failures included. Duplicates are searched for at the end, when all rows are known.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from models.config import Config, Fraction
from models.images import MOST_PIXELS, Limits
from stages.artifacts.rows import CODE_TABLE_COLUMNS, OK, SPLIT, TRAIN
from stages.artifacts.shards import images_file, metadata_file, shards_of
from stages.download.counts import DownloadedShard, Totals
from stages.download.duplicates import LeaveOut, ShardFiles, find_duplicates
from stages.download.filters import PERCEPTUAL_HASH, FilterConfig
from stages.download.shard import DownloadWorker, RowRange
from stages.download.sources.conversations import ConversationFiles
from stages.download.sources.folder import FolderFiles
from stages.download.sources.guarded_http import Guard
from stages.download.sources.parquet_images import ParquetFiles
from stages.download.sources.source import PLACE, URL, Source, SourceOptions
from stages.download.sources.url_list import SAMPLE, HttpConfig, UrlList
from stages.download.sources.web_dataset import WebDatasetFiles
from stages.download.splits import hold_out, split_counts, split_problem
from stages.mapped.engine import FailureLimit, Job, finish_shards
from stages.protocol import DoesNotAffectResult, Outcome, RuntimeInt, RuntimeStr, Stage, StageContext
from stages.runtime.progress import tracked
from storage.digests import sha256_file
from storage.manifest import FileEntry
from storage.store import Store
from storage.tables import IMAGE_METADATA_SCHEMA, write_table

logger = logging.getLogger(__name__)

FilesConfig = Annotated[
    WebDatasetFiles  # one line for each kind of source
    | ParquetFiles
    | FolderFiles
    | ConversationFiles,
    Field(discriminator="kind"),
]
"""The kinds of files that can be read. The class of a kind opens its source (`open(SourceOptions) -> Source`)."""


class DownloadConfig(Config):
    """The source of the images, which of them to use, and the limits of fetching them."""

    url_list: RuntimeStr = SAMPLE
    """`sample` for the embedded emoji, or a list in CSV, TSV, JSON, JSONL or Parquet: a file, a folder or a pattern
    such as `parts/*.parquet`, compressed or not, local or `s3://`. Its content enters the action key, not its path."""
    url_column: str = "url"
    """Column of the list with the images' URLs."""
    tsv_quotes: bool = False
    """Whether double quotes enclose values in lists separated by tabs, as pandas writes them; otherwise quotes are
    text."""
    files: FilesConfig | None = None
    """Existing images, instead of `url_list`: `{kind: webdataset, path: ...}`, or another kind with its fields."""
    caption_column: str = "caption"
    """Column with the images' captions."""
    extra_columns: tuple[str, ...] = ()
    """Further columns to keep, as strings. The column `split` (values `train`, `test`) determines the held-out rows."""
    held_out_fraction: Fraction = 0.0
    """Fraction of the rows that is held out by a hash of their addresses, if there is no column `split`."""
    keep: dict[str, tuple[str, ...]] = {}
    """Only rows with one of these values in a column are used, for example `{category: [food & drink]}`."""
    max_rows: PositiveInt | None = None
    """Number of first rows of the (filtered) list that are used; `null` uses all."""
    filters: FilterConfig = FilterConfig()
    """Conditions on captions and images."""
    rows_per_shard: PositiveInt = 1000
    """Number of rows per shard, the unit of work that is lost by a crash."""
    max_bytes: PositiveInt = 32_000_000
    """Largest size of an image file in bytes; of a larger file no more is read."""
    max_pixels: Annotated[int, Field(gt=0, le=MOST_PIXELS)] = 64_000_000
    """Largest width times height of an image; a small file can contain an image that fills the memory."""
    timeout_s: RuntimeInt = 10
    """Deadline of one request in seconds, however much has arrived."""
    retries: Annotated[NonNegativeInt, DoesNotAffectResult] = 2
    """Number of retries of a URL after a transient failure: time-outs, broken connections, 429 and 5xx."""
    http: HttpConfig = HttpConfig()
    """Rate limits and safety of requests to the hosts of a URL list."""
    max_failed_fraction: Annotated[Fraction, DoesNotAffectResult] = 0.2
    """The stage stops as soon as it is certain that a larger fraction of the rows fails."""
    attempt: NonNegativeInt = 0
    """Number of the attempt, which enters the action key. An attempt from 1 on fetches the failed rows of the previous
    one again and keeps the others; `--retry-failed` adds one."""
    num_workers: RuntimeInt = 1
    """Number of workers, each of which downloads a shard at a time."""
    connections_per_worker: RuntimeInt = 32
    """Number of concurrent connections of each worker."""

    @field_validator("extra_columns")
    @classmethod
    def _not_ours(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        own = {*IMAGE_METADATA_SCHEMA.names, PERCEPTUAL_HASH, PLACE, *CODE_TABLE_COLUMNS}
        if taken := sorted(own & set(value)):
            raise ValueError(
                f"columns {', '.join(taken)} are of our own tables, where they mean something else; rename them in "
                "the data"
            )
        if twice := sorted({name for name in value if value.count(name) > 1}):
            raise ValueError(f"columns {', '.join(twice)} are named twice; name each once")
        return value

    @model_validator(mode="after")
    def _one_split(self) -> DownloadConfig:
        if self.held_out_fraction and SPLIT in self.extra_columns:
            raise ValueError(
                "held_out_fraction and a column `split` in extra_columns both say what is held out; keep one"
            )
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are kept in addition to image and caption."""
        return (*self.extra_columns, SPLIT) if self.held_out_fraction else self.extra_columns

    @property
    def limits(self) -> Limits:
        """Limits on the size of an image file and of the decoded image."""
        return Limits(self.max_bytes, self.max_pixels)


@dataclass
class _Done:
    """What the outcome needs from the receipts of finished shards."""

    files: dict[str, tuple[FileEntry, ...]] = field(default_factory=dict)
    """Files of each shard."""
    totals: Totals = field(default_factory=Totals)

    def add(self, shard: str, receipt: DownloadedShard) -> None:
        self.files[shard] = receipt.files
        self.totals.add(receipt)


def run(context: StageContext[DownloadConfig]) -> Outcome:
    """Make the `image_shards` artifact: `images/NNNNN.tar` and `metadata/NNNNN.parquet`.

    Raises:
        ValueError: the source cannot be read, lacks a column or is empty; or too many rows failed.
    """
    config = context.config
    plan = _Plan.of(context.store.work(context.action_key).read_plan() or _make_plan(context))
    done = _download(context, plan)
    _check_images(context)
    if not done.totals["status"][OK]:
        reasons = done.totals.reasons("errors", "filters")
        raise ValueError(
            f"none of {done.totals.num_rows} rows gave an image ({reasons}); mend the list or loosen download.filters"
        )
    if config.filters.exact_duplicates or config.filters.near_duplicate_bits is not None:
        _leave_out_duplicates(context, done)
    files = [entry for entries in done.files.values() for entry in entries]
    metadata = {"splits": dict(done.totals["splits"])}
    return Outcome("image_shards", files, metrics=done.totals.metrics(), metadata=metadata)


def open_source(config: DownloadConfig) -> Source:
    """Open the source of a config's images."""
    if config.files is not None:
        return config.files.open(SourceOptions(config.caption_column, config.max_bytes, config.tsv_quotes))
    http = config.http
    guard = Guard(
        timeout_s=config.timeout_s,
        retries=config.retries,
        max_bytes=config.max_bytes,
        max_redirects=http.max_redirects,
        max_retry_after_s=http.max_retry_after_s,
        connections_per_host=http.connections_per_host,
        allow_private_addresses=http.allow_private_addresses,
        private_hosts=http.private_hosts,
    )
    connections = config.connections_per_worker
    return UrlList(config.url_list, config.url_column, http, guard, connections, config.tsv_quotes)


def read_rows(config: DownloadConfig) -> pa.Table:
    """Read the rows to fetch: url, caption and extra columns as strings, filtered, in the list's order.

    Raises:
        ValueError: the source cannot be read or has no rows; the message names the source and what was expected.
    """
    source = open_source(config)
    table = source.rows(list(dict.fromkeys([config.caption_column, *config.extra_columns, *config.keep])))
    for name, values in config.keep.items():
        table = table.filter(pc.is_in(pc.cast(table[name], pa.string()), pa.array(values, pa.string())))
    table = table.slice(0, config.max_rows)
    if table.num_rows == 0:
        reason = f" after download.keep={config.keep}" if config.keep else ""
        raise ValueError(f"{source.what} has no rows{reason}; give at least one image")
    wanted = {URL: URL, "caption": config.caption_column, PLACE: PLACE} | {name: name for name in config.extra_columns}
    rows = pa.table({name: pc.fill_null(pc.cast(table[column], pa.string()), "") for name, column in wanted.items()})
    return hold_out(rows, config.held_out_fraction) if config.held_out_fraction else rows


def next_attempt(config: DownloadConfig, seed: int, store: Store) -> int:
    """Return the number of the attempt that fetches failed rows again, or of the last complete one if no row failed.

    An attempt that was started but not finished is continued before a new one is started.
    """
    attempt = config.attempt
    while True:
        key = _attempt_key(config, attempt, seed)
        artifact, known = store.lookup(key), store.work(key).read_plan()
        if artifact is not None:
            failed = bool(artifact.metrics["num_failed"])
        elif known is not None:
            plan = _Plan.of(known)
            receipts = store.work(key).receipts([shard.shard for shard in plan.shards])
            totals = Totals(DownloadedShard.from_json(receipt) for _, receipt in receipts)
            may_end_well = not _limit(config, plan.num_rows).is_passed(totals.num_failed)
            if totals.num_rows < plan.num_rows and may_end_well:
                return attempt
            failed = bool(totals.num_failed)
        else:
            return attempt
        if not failed:
            return attempt
        attempt += 1


@dataclass(frozen=True)
class _Plan:
    """The rows of a download and their division into shards."""

    rows: FileEntry
    shards: list[RowRange]

    @classmethod
    def of(cls, plan: dict[str, Any]) -> _Plan:
        """Read a plan of the store."""
        return cls(FileEntry.from_json(plan["rows"]), [RowRange.from_json(shard) for shard in plan["shards"]])

    @property
    def num_rows(self) -> int:
        """Number of rows of all shards."""
        return sum(shard.count for shard in self.shards)


def _make_plan(context: StageContext[DownloadConfig]) -> dict[str, Any]:
    config, store = context.config, context.store
    path, num_rows, splits = _write_rows(context)
    if problem := split_problem(splits):
        logger.warning("%s: %s", open_source(config).what, problem)
    if _attempt_key(config, config.attempt, context.seed) != context.action_key:
        raise ValueError(f"{open_source(config).what} changed while it was read; run the stage again")
    entry = store.put_file(path, "rows.parquet")
    shards = [shard.to_json() for shard in _cut(num_rows, config.rows_per_shard)]
    return store.work(context.action_key).create_plan({"rows": entry.to_json(), "shards": shards})


class _Written(NamedTuple):
    """The local file with the rows to fetch, and counts of them."""

    path: Path
    num_rows: int
    splits: Counter[str]


def _write_rows(context: StageContext[DownloadConfig]) -> _Written:
    rows, path = read_rows(context.config), context.scratch / "rows.parquet"
    write_table(rows, path)
    splits = rows[SPLIT].to_pylist() if SPLIT in rows.column_names else [TRAIN] * rows.num_rows
    return _Written(path, rows.num_rows, split_counts(splits))


def _restore_rows(context: StageContext[DownloadConfig], entry: FileEntry) -> None:
    """Rebuild the plan's table of rows if the store has lost it, since no shard can be made without it.

    Raises:
        ValueError: the source has other rows now.
    """
    store, key = context.store, context.action_key
    if store.holds(entry):
        return
    path = _write_rows(context).path
    found = sha256_file(path)
    if found != entry.sha256:
        raise ValueError(
            f"the store {store.uri} has lost the rows of this download's plan, and {open_source(context.config).what} "
            f"gives others now (sha256 {found[:12]}, not {entry.sha256[:12]}): it changed, or another version of "
            f"musevl made the plan; put it back, or remove plans/{key}.json and receipts/{key}/ from the store to "
            "begin anew"
        )
    store.put_file(path, entry.path)


def _cut(num_rows: int, rows_per_shard: int) -> list[RowRange]:
    return [
        RowRange(f"{index:05d}", start, min(rows_per_shard, num_rows - start))
        for index, start in enumerate(range(0, num_rows, rows_per_shard))
    ]


def _download(context: StageContext[DownloadConfig], plan: _Plan) -> _Done:
    """Make the shards that are not finished.

    Returns:
        All shards, in the list's order.

    Raises:
        ValueError: too many rows failed, in these or in earlier shards.
    """
    config, done = context.config, _Done()
    job = Job(_worker(context, plan), RowRange, DownloadedShard, "download shards", "rows", _num_rows)

    def prepare(left: list[RowRange]) -> list[RowRange]:
        _restore_rows(context, plan.rows)
        earlier = _earlier_shards(context, [shard.shard for shard in left])
        return [replace(shard, earlier=earlier.get(shard.shard, ())) for shard in left]

    with closing(finish_shards(context, plan.shards, job, num_workers=config.num_workers, prepare=prepare)) as finished:
        for shard, receipt in finished:
            done.add(shard, receipt)
            _check_failures(context, done.totals, plan.num_rows)
    done.files = {shard.shard: done.files[shard.shard] for shard in plan.shards}
    return done


def _num_rows(receipt: DownloadedShard) -> int:
    return sum(receipt.status.values())


def _worker(context: StageContext[DownloadConfig], plan: _Plan) -> Callable[[], DownloadWorker]:
    config = context.config
    hashed = (PERCEPTUAL_HASH,) if config.filters.near_duplicate_bits is not None else ()
    return partial(
        DownloadWorker,
        store=context.store,
        rows=plan.rows,
        source=partial(open_source, config),
        filters=config.filters,
        limits=config.limits,
        extra_columns=config.columns,
        metadata_columns=(*config.columns, *hashed),
    )


def _earlier_shards(context: StageContext[DownloadConfig], shards: list[str]) -> dict[str, tuple[FileEntry, ...]]:
    """Return the files of shards of earlier attempts, each from the latest attempt that has it."""
    store, found = context.store, dict[str, tuple[FileEntry, ...]]()
    for attempt in range(context.config.attempt):
        key = _attempt_key(context.config, attempt, context.seed)
        if (artifact := store.lookup(key)) is not None:
            for shard in shards_of(artifact):
                found[shard] = (artifact.file(images_file(shard)), artifact.file(metadata_file(shard)))
        for shard, receipt in store.work(key).receipts(shards):
            found[shard] = DownloadedShard.from_json(receipt).files
    return found


def _attempt_key(config: DownloadConfig, attempt: int, seed: int) -> str:
    return STAGE.action_key(config.model_copy(update={"attempt": attempt}), seed, {})


def _check_failures(context: StageContext[DownloadConfig], totals: Totals, num_rows: int) -> None:
    """Raise ValueError as soon as it is certain that too many rows fail, whatever the remaining rows give."""
    config, limit = context.config, _limit(context.config, num_rows)
    if limit.is_passed(totals.num_failed):
        _check_images(context)  # they may have failed because the files were moved
        remedy = (
            "mend the list, raise the limit, or fetch the failed ones again with `--retry-failed` or "
            f"`--set download.attempt={config.attempt + 1}`; what arrived is kept"
        )
        to_come = num_rows - totals.num_rows
        raise limit.error(totals.num_failed, totals.reasons("errors"), remedy, to_come=to_come)


def _limit(config: DownloadConfig, num_rows: int) -> FailureLimit:
    return FailureLimit("download.max_failed_fraction", config.max_failed_fraction, num_rows, "images failed")


def _check_images(context: StageContext[DownloadConfig]) -> None:
    """Raise ValueError if the source's files are no longer those of the action key.

    This does not apply to URLs, whose images enter no key: a list may change once its rows are in the plan.
    """
    config, store, key = context.config, context.store, context.action_key
    if config.files is None or _attempt_key(config, config.attempt, context.seed) == key:
        return
    # Otherwise a later run with the old files would take the shards for finished, although they have other images
    store.work(key).drop_receipts()
    raise ValueError(
        f"{open_source(config).what} changed while its images were read, so the shards that were made of it are thrown "
        "away; run the stage again, and change nothing there meanwhile"
    )


def _leave_out_duplicates(context: StageContext[DownloadConfig], done: _Done) -> None:
    """Rewrite the shards that contain a duplicate of an earlier image."""
    config, names = context.config, list(done.files)
    files = {name: ShardFiles(*done.files[name]) for name in names}
    found = find_duplicates(context.store, list(files.values()), config.filters)
    items = [
        {
            "shard": names[index],
            "images": files[names[index]].images.to_json(),
            "metadata": files[names[index]].metadata.to_json(),
            "rows": {str(row): reason for row, reason in rows.items()},
        }
        for index, rows in found.items()
    ]
    worker = LeaveOut(context.store)
    results = context.executor.map(lambda: worker, items, num_workers=config.num_workers)
    for result in tracked(results, len(items), "leave out duplicates"):
        done.totals.take_back(DownloadedShard.from_json(result["before"]))
        done.add(result["shard"], DownloadedShard.from_json(result["after"]))


def _external_inputs(config: DownloadConfig) -> dict[str, str]:
    """Return digests of the contents of lists and files, which do not depend on their paths."""
    return open_source(config).content()


STAGE = Stage(
    name="download",
    section="download",
    inputs=(),
    run=run,
    version=6,  # images as a browser shows them; none without a caption is `ok`; lists and files as people have them
    external_inputs=_external_inputs,
)
