"""Images to code tables: one Parquet file per image shard, made by workers that each hold the encoder once.

In a worker, threads decode images a little ahead of the encoder, so that it never waits for them. An image that the
encoder cannot take is a row of `left_out/`, not the end of the run, and so is one that does not fit its caption where a
least score is asked for.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Annotated, Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, PositiveInt

from models.transforms import TransformConfig, ViewsConfig, load_image
from stages.artifacts import external_codes
from stages.artifacts.images import table_columns
from stages.artifacts.rows import (
    FILTERED,
    ORIGINAL,
    SPLIT,
    TRAIN,
    UNDECODABLE,
    VIEW,
    image_key,
    row_key,
    split_of,
    view_name,
)
from stages.protocol import Outcome, RuntimeFloat, RuntimeFraction, RuntimeInt, Stage, StageContext
from stages.runtime.child_process import DEATHS_BEFORE_ISOLATION
from stages.runtime.devices import Precision, PrecisionConfig
from stages.runtime.progress import progress
from stages.tokenize.encoding import Batch, Codes, Encoder, EncoderFactory
from stages.tokenize.isolation import Sandbox, isolate, loses_device
from storage.code_table import CodeTableInfo, check_written, write_code_shard
from storage.image_shards import ImageSample, read_image_shard
from storage.manifest import FileEntry, Manifest
from storage.store import Store
from storage.tables import write_table

logger = logging.getLogger(__name__)

AGREEMENT = 0.5
"""Least part of the codes of a spot-checked row that a second encoding gives again. Other kernels may round a code to
its neighbour, and a residual code with all that follow it; a row with another image's codes agrees by chance only."""
_SPOT_CHECKS = 2
"""Images of a shard that are encoded twice."""
_T = TypeVar("_T")


class TokenizeConfig(PrecisionConfig):
    """How images become rows of codes."""

    views: ViewsConfig = ViewsConfig()
    """Random views of each training image that are tokenized beside it, as rows of their own (column `view`): the
    augmentation of a language model that reads codes, as LlamaGen tokenizes ten crops of each image."""
    precision: Precision = "auto"
    """Autocast type of the encoder; distances to the codebook are float32 in any. `auto` is `bf16` on a GPU and on a
    CPU that computes in it, else `fp32`, and `fp32` for imported weights that were not trained further."""
    batch_size: PositiveInt = 32
    """Images encoded at a time on a GPU. Part of the identity of the result: there the last bits of a convolution, and
    so now and then a code, depend on the batch. A CPU takes eight at a time whatever is said here, so that the same
    images have the same codes."""
    min_caption_match: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Training images whose caption fits them less are left out: cosine similarity of image and caption in the space of
    the recipe's teacher, which needs a text tower. Held-out images all stay. LAION-400M took 0.3 with CLIP ViT-B/32;
    other teachers have other scales."""
    max_failed_fraction: RuntimeFraction = 0.01
    """The stage stops as soon as a larger part of all images is found that cannot be decoded or encoded; what is done
    stays done, and a run with a higher limit goes on from there."""
    num_workers: RuntimeInt = 1
    """Encoders at a time."""
    decode_threads: RuntimeInt = 2
    """Threads beside each encoder that decode its next images."""
    gpus_per_worker: RuntimeFloat = 0.0
    """Share of a GPU that each encoder holds; 0 encodes on the CPU."""
    threads_per_worker: RuntimeInt = 2
    """CPU threads of each encoder, each with images of its own."""

    def computes_on(self) -> str:
        return "cuda" if self.gpus_per_worker else "cpu"


def run(context: StageContext[TokenizeConfig]) -> Outcome:
    """Make the `code_table` artifact: `codes/NNNNN.parquet`, and `left_out/NNNNN.parquet` for shards that have any.

    Raises:
        ValueError: too many images failed, or captions are to be scored by what cannot.
    """
    config, store, key = context.config, context.store, context.action_key
    download, tokenizer = context.inputs["download"], context.inputs["train_tokenizer"]
    if tokenizer.kind == external_codes.KIND:
        return external_codes.join(context)
    scorer = _scorer(config, context.inputs.get("prepare_teacher"))
    shards = [entry.path.removeprefix("images/").removesuffix(".tar") for entry in download.files_under("images")]
    plan = store.create_plan(key, {"shards": shards})
    receipts = store.receipts(key)
    items = [{"shard": shard} for shard in plan["shards"] if shard not in receipts]
    factory = WorkerFactory(store, key, config, context.seed, download.digest, scorer, tokenizer.digest)
    failures = [row for receipt in receipts.values() for row in _failures(receipt)]
    _check_failures(config, failures, download)
    map_items = partial(context.executor.map, num_workers=config.num_workers, num_gpus=config.gpus_per_worker)
    # closed where the check raises, or workers would go on as long as somebody keeps the exception
    with closing(_followed(map_items(factory, items), len(items))) as results:
        for result in results:
            receipts[result["shard"]] = result["receipt"]
            failures += _failures(result["receipt"])
            _check_failures(config, failures, download)
    missing = [shard for shard in plan["shards"] if shard not in receipts]
    assert not missing, f"every shard was mapped, yet {missing} have no receipt"
    files = [FileEntry.from_json(entry) for shard in plan["shards"] for entry in receipts[shard]["files"]]
    metadata = {"tokenizer": tokenizer.digest, "code_shape": tokenizer.metadata["code_shape"]}
    return Outcome(
        "code_table", files, metrics=_counts(config, list(receipts.values()), len(failures)), metadata=metadata
    )


def _scorer(config: TokenizeConfig, teacher: Manifest | None) -> str | None:
    """Digest of the teacher that scores captions; None where none are scored."""
    if config.min_caption_match is None:
        return None
    assert teacher is not None, "see unused_inputs"
    if not teacher.metadata["has_text"]:
        raise ValueError(
            f"tokenize.min_caption_match={config.min_caption_match} needs a teacher with a text tower; choose one in "
            "teacher.model, or take the setting out"
        )
    return teacher.digest


def _followed(results: Iterator[dict[str, Any]], total: int) -> Generator[dict[str, Any], None, None]:
    """Draw a progress bar over the shards, with rows a second."""
    start, rows = time.monotonic(), 0
    with progress(total, "tokenize shards") as bar:
        for result in results:
            rows += result["receipt"]["rows"]
            bar.set_postfix_str(f"{rows / (time.monotonic() - start):.1f} images/s", refresh=False)
            bar.update()
            yield result


def _failures(receipt: dict[str, Any]) -> list[dict[str, str]]:
    """Images of a shard that could not be decoded or encoded."""
    return [row for row in receipt["left_out"] if row["status"] != FILTERED]


def _check_failures(config: TokenizeConfig, failures: list[dict[str, str]], download: Manifest) -> None:
    """Raise ValueError once it is certain that too many images will have failed, however many are still to come."""
    num_images = download.metrics["num_ok"]
    if len(failures) > config.max_failed_fraction * num_images:
        first = "; ".join(f"{failure['key']}: {failure['error']}" for failure in failures[:3])
        raise ValueError(
            f"{len(failures)} of {num_images} images could not be tokenized, more than "
            f"tokenize.max_failed_fraction={config.max_failed_fraction} (first: {first}); take them out of the "
            "download, or raise the limit: what is done is kept"
        )


def _counts(config: TokenizeConfig, receipts: list[dict[str, Any]], num_failed: int) -> dict[str, int]:
    num_rows = sum(receipt["rows"] for receipt in receipts)
    if not num_rows:
        raise ValueError(
            f"none of {sum(receipt['images'] for receipt in receipts)} images is left; lower "
            f"tokenize.min_caption_match={config.min_caption_match}, whose scale depends on the teacher"
        )
    num_left_out = sum(len(receipt["left_out"]) for receipt in receipts)
    return {"num_rows": num_rows, "num_filtered": num_left_out - num_failed, "num_failed": num_failed}


@dataclass(frozen=True)
class WorkerFactory:
    """What travels to a worker process; calling it there loads the encoder."""

    store: Store
    action_key: str
    config: TokenizeConfig
    seed: int
    download_digest: str
    scorer_digest: str | None
    tokenizer_digest: str

    def __call__(self) -> TokenizeWorker:
        return TokenizeWorker(self)

    def encoder(self) -> EncoderFactory:
        """What makes the encoder, here or in a child process."""
        config = self.config
        return EncoderFactory(
            store=self.store,
            tokenizer_digest=self.tokenizer_digest,
            scorer_digest=self.scorer_digest,
            views=config.views,
            precision=config.precision,
            on_gpu=config.gpus_per_worker > 0,
            num_threads=config.threads_per_worker,
            seed=self.seed,
        )


@dataclass(frozen=True)
class _Decoded:
    """One row to be encoded."""

    sample: ImageSample
    pixels: npt.NDArray[np.uint8]
    """[3, H, W]"""
    view: str


@dataclass
class _Rows:
    """What a shard gives, as it grows."""

    keys: list[str]
    """Of the rows."""
    columns: list[dict[str, str | None]]
    codes: list[Codes]
    """[N, D, h, w] each."""
    left_out: list[dict[str, str]]
    """Images without codes: key, status, error."""

    def add(self, row: _Decoded, codes: Codes) -> None:
        self.keys.append(row_key(row.sample.key, row.view))
        self.columns.append(table_columns(row.sample, row.view))
        self.codes.append(codes)

    def drop(self, images: set[str]) -> None:
        """Take out the rows of images, with their views: some may have been done before one of them failed."""
        if not images:
            return
        shown = [image_key(key, str(row[VIEW])) for key, row in zip(self.keys, self.columns, strict=True)]
        kept = [at for at, image in enumerate(shown) if image not in images]
        self.keys = [self.keys[at] for at in kept]
        self.columns = [self.columns[at] for at in kept]
        self.codes = [self.codes[at] for at in kept]


class TokenizeWorker:
    """Holds one encoder; each call encodes one shard, stores it and writes its receipt."""

    def __init__(self, job: WorkerFactory) -> None:
        self.job = job
        self.download: Manifest = job.store.load(job.download_digest)
        self.encoder: Encoder = job.encoder()()
        self.transform: TransformConfig = self.encoder.tokenizer.config.transform
        self._sandbox = Sandbox(job.encoder())
        self._device_lost = False

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        shard, store, key = item["shard"], self.job.store, self.job.action_key
        if (found := store.receipt(key, shard)) is not None:
            # Another run was here, or this worker's predecessor died between its receipt and its answer
            return {"shard": shard, "receipt": found}
        with store.attempt_at(key, shard) as deaths:
            rows = self._rows(shard, deaths)
            entries = self._store(shard, rows)
            receipt: dict[str, Any] = {"files": [entry.to_json() for entry in entries], "rows": len(rows.keys)}
            receipt["images"] = len(rows.left_out) + sum(column[VIEW] == ORIGINAL for column in rows.columns)
            receipt["left_out"] = rows.left_out
            receipt = store.write_receipt(key, shard, receipt)
        if deaths:
            store.forget_attempts(key, shard)
        return {"shard": shard, "receipt": receipt}

    def _rows(self, shard: str, deaths: int) -> _Rows:
        """The rows of a shard; by an encoder in a child process where workers died of it, or this one cannot go on."""
        if deaths >= DEATHS_BEFORE_ISOLATION:
            logger.warning("%d workers died on shard %s: looking for the image that did it", deaths, shard)
        elif not self._device_lost:
            try:
                return self._encode_shard(shard, self.encoder)
            except Exception as error:
                if not loses_device(error):
                    raise
                self._device_lost = True
                logger.warning("shard %s: %s; from here on this worker encodes in a child process", shard, error)
        try:
            return self._encode_shard(shard, self._sandbox)
        finally:
            if not self._device_lost:
                self._sandbox.close()  # it takes the memory of a second encoder

    def _encode_shard(self, shard: str, encoder: Encoder | Sandbox) -> _Rows:
        rows = _Rows([], [], [], [])
        decoded = self._decoded(shard, rows.left_out)
        gone: set[str] = set()
        while group := list(islice(decoded, self.job.config.batch_size)):
            group = [row for row in group if row.sample.key not in gone]  # an image's views fall with it
            if not group:
                continue
            pixels = np.stack([row.pixels for row in group])
            batch = Batch(pixels, [row.sample.key for row in group], [row.view for row in group])
            isolated = isolate(partial(encoder.encode, batch), batch.keys)
            for slot, (status, error) in isolated.failures.items():
                if group[slot].sample.key not in gone:
                    rows.left_out.append(_left_out(group[slot].sample, status, error))
                gone.add(group[slot].sample.key)
            for slot, codes in zip(isolated.slots, isolated.results, strict=True):
                rows.add(group[slot], codes)
            # after the encoder, which may have found images that bring the teacher's tower down
            encoded = [group[slot] for slot in isolated.slots if group[slot].sample.key not in gone]
            for sample, status, error in self._mismatched(encoded, encoder):
                rows.left_out.append(_left_out(sample, status, error))
                gone.add(sample.key)
        rows.drop(gone)
        self._spot_check(shard, rows, encoder)
        return rows

    def _mismatched(self, group: list[_Decoded], encoder: Encoder | Sandbox) -> Iterator[tuple[ImageSample, str, str]]:
        """The training images among these rows whose caption does not fit them, or cannot be scored; status and why."""
        least = self.job.config.min_caption_match
        pairs = [row for row in group if row.view == ORIGINAL and _is_train(row.sample)]
        if least is None or not pairs:
            return
        pixels, captions = np.stack([row.pixels for row in pairs]), [row.sample.text for row in pairs]
        scored = isolate(partial(encoder.scores, pixels, captions), [row.sample.key for row in pairs])
        for slot, (status, error) in scored.failures.items():
            yield pairs[slot].sample, status, error
        for slot, score in zip(scored.slots, map(float, scored.results), strict=True):
            if score < least:
                yield pairs[slot].sample, FILTERED, f"image and caption match below {least:g} ({score:.3f})"

    def _decoded(self, shard: str, left_out: list[dict[str, str]]) -> Iterator[_Decoded]:
        """The rows of a shard, each image followed by its views; decoded at most two batches ahead."""
        samples = read_image_shard(self.job.store.fetch(self.download.file(f"images/{shard}.tar")))
        views = [view_name(number) for number in range(1, self.job.config.views.count + 1)]
        ahead = max(1, 2 * self.job.config.batch_size // (1 + len(views)))
        with ThreadPoolExecutor(self.job.config.decode_threads, thread_name_prefix="decode") as pool:
            pairs = ((sample, pool.submit(self._pixels, sample)) for sample in samples)
            for sample, future in _ahead(pairs, ahead):
                try:
                    pixels = future.result()
                except OSError as error:
                    left_out.append(_left_out(sample, UNDECODABLE, str(error)))
                    continue
                for view in [ORIGINAL, *(views if _is_train(sample) else [])]:
                    yield _Decoded(sample, pixels, view)

    def _pixels(self, sample: ImageSample) -> npt.NDArray[np.uint8]:
        """uint8 `[3, H, W]`."""
        return np.array(load_image(sample.image, self.transform)).transpose(2, 0, 1)

    def _spot_check(self, shard: str, rows: _Rows, encoder: Encoder | Sandbox) -> None:
        """Encode a few images once more, found by their keys, and compare: no row may hold another image's codes.

        Raises:
            RuntimeError: a row differs.
        """
        originals = [at for at, column in enumerate(rows.columns) if column[VIEW] == ORIGINAL]
        if not originals:
            return
        chosen = {rows.keys[at]: at for at in originals[:: -max(1, len(originals) // _SPOT_CHECKS)][:_SPOT_CHECKS]}
        tar = self.job.store.fetch(self.download.file(f"images/{shard}.tar"))
        samples = [sample for sample in read_image_shard(tar) if sample.key in chosen]
        keys = [sample.key for sample in samples]
        pixels = np.stack([self._pixels(sample) for sample in samples])
        again = encoder.encode(Batch(pixels, keys, [ORIGINAL] * len(keys)), list(range(len(keys))))
        for key, codes in zip(keys, again, strict=True):
            agreement = float((codes == rows.codes[chosen[key]]).mean())
            if agreement < AGREEMENT:
                raise RuntimeError(
                    f"shard {shard}: only {agreement:.0%} of the codes of image {key} come out again when it is "
                    f"encoded once more (at least {AGREEMENT:.0%} must); a fault of the program or the device; "
                    "nothing of the shard is stored"
                )

    def _store(self, shard: str, rows: _Rows) -> list[FileEntry]:
        """Store the shard's tables: of codes, unless every image is left out, and of those that are."""
        store, entries = self.job.store, []
        with store.attempt_dir() as scratch:
            if rows.keys:
                columns = {name: [row[name] for row in rows.columns] for name in rows.columns[0]}
                codes = np.stack(rows.codes)
                write_code_shard(scratch / "codes.parquet", self._info(), rows.keys, columns, codes)
                check_written(scratch / "codes.parquet", rows.keys, codes)
                entries.append(store.put_file(scratch / "codes.parquet", f"codes/{shard}.parquet"))
            if rows.left_out:
                names = ("key", "status", "error")
                table = pa.table({name: pa.array([row[name] for row in rows.left_out], pa.string()) for name in names})
                write_table(table, scratch / "left_out.parquet")
                entries.append(store.put_file(scratch / "left_out.parquet", f"left_out/{shard}.parquet"))
        return entries

    def _info(self) -> CodeTableInfo:
        tokenizer = self.encoder.tokenizer
        return CodeTableInfo(
            code_shape=tokenizer.code_shape,
            codebook_names=tokenizer.book_names,
            codebook_sizes=tokenizer.codebook_sizes,
            tokenizer_digest=self.job.tokenizer_digest,
            transform=self.transform.model_dump(mode="json"),
        )


def _is_train(sample: ImageSample) -> bool:
    return split_of(sample.json.get(SPLIT)) == TRAIN


def _left_out(sample: ImageSample, status: str, error: str) -> dict[str, str]:
    return {"key": sample.key, "status": status, "error": " ".join(error.split())[:200]}


def _ahead(futures: Iterator[tuple[ImageSample, Future[_T]]], count: int) -> Iterator[tuple[ImageSample, Future[_T]]]:
    """The same in the same order, the next `count` being begun already."""
    waiting = deque(islice(futures, count))
    while waiting:
        yield waiting.popleft()
        waiting.extend(islice(futures, 1))


def _unused_inputs(config: TokenizeConfig) -> tuple[str, ...]:
    return ("prepare_teacher",) if config.min_caption_match is None else ()


STAGE = Stage(
    name="tokenize",
    section="tokenize",
    config_class=TokenizeConfig,
    inputs=("download", "prepare_teacher", "train_tokenizer"),
    unused_inputs=_unused_inputs,
    run=run,
    version=5,  # images of all depths and colour profiles arrive as sRGB
)
