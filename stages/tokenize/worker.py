"""The worker of `tokenize`: it decodes the images of one shard, encodes them, and checks and stores their codes.

Threads decode images ahead of the encoder, so that it never waits for them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra.terminal import on_one_line
from models.transforms import TransformConfig, load_image
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
from stages.artifacts.shards import codes_file, images_file, left_out_file
from stages.mapped.engine import LeftOut, Receipt, Shard
from stages.mapped.isolation import InputFailure, Sandbox, Wording, isolate, loses_device
from stages.tokenize.encoding import CodeArray, Encoder, EncoderFactory, ImageBatch, Pixels, Scores
from storage.code_table import CodeTableInfo, check_written, write_code_shard
from storage.image_shards import ImageSample, read_image_shard
from storage.manifest import FileEntry, Manifest
from storage.tables import write_table

logger = logging.getLogger(__name__)

AGREEMENT = 0.5
"""Smallest fraction of the codes of a spot-checked row that a second encoding must give again. Other kernels may round
a code to its neighbour, and all residual codes after it; a row with another image's codes agrees by chance only."""
CRASHED, FAILED = "crashed_encoder", "failed_to_encode"
"""Statuses of images that cannot be encoded."""
WORDING = Wording(
    input="image",
    done="encoded",
    worker="encoder",
    remedy="check the tokenizer, memory and tokenize.batch_size",
    memory_remedy="lower tokenize.batch_size or tokenize.num_workers",
)
_SPOT_CHECKS = 2
"""Number of images of a shard that are encoded twice."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class EncodedShard(Receipt):
    """The receipt of a shard of codes."""

    rows: int
    """Number of rows of the code table: images and their views."""
    images: int
    """Number of images of the download, including those without codes."""
    left_out: tuple[LeftOut, ...]
    """Images without codes."""


class Encodes(Protocol):
    """The interface of an encoder in this process or in a child process; see `stages.tokenize.encoding.Encoder`."""

    def encode(self, batch: ImageBatch, slots: list[int]) -> CodeArray:
        """Return the codes of the images at these positions."""
        ...

    def scores(self, pixels: Pixels, captions: list[str], slots: list[int]) -> Scores:
        """Score the images at these positions against their captions."""
        ...


class EncoderSandbox:
    """An encoder in a child process, which an image may crash.

    Args:
        factory: builds the encoder in the child process.
    """

    def __init__(self, factory: Callable[[], Encodes]) -> None:
        self._sandbox = Sandbox(factory, WORDING)

    def encode(self, batch: ImageBatch, slots: list[int]) -> CodeArray:
        """Encode as the encoder itself does; raises the same as `Sandbox.call`."""
        codes: CodeArray = self._sandbox.call("encode", batch, slots)
        return codes

    def scores(self, pixels: Pixels, captions: list[str], slots: list[int]) -> Scores:
        """Score as the encoder itself does; raises the same as `Sandbox.call`."""
        scores: Scores = self._sandbox.call("scores", pixels, captions, slots)
        return scores

    def close(self) -> None:
        """End the child process; another one starts when it is needed."""
        self._sandbox.close()


@dataclass(frozen=True)
class TokenizeWorkerFactory:
    """Picklable description of a worker; calling it in the worker process loads the encoder."""

    encoder: EncoderFactory
    download_digest: str
    batch_size: int
    decode_threads: int
    min_caption_match: float | None

    def __call__(self) -> TokenizeWorker:
        return TokenizeWorker(self)


@dataclass(frozen=True)
class _Decoded:
    """A decoded image or view to encode."""

    sample: ImageSample
    pixels: npt.NDArray[np.uint8]
    """`[3, H, W]` pixels."""
    view: str


@dataclass
class _Rows:
    """The rows of a shard, collected one by one."""

    keys: list[str]
    """Keys of the rows."""
    columns: list[dict[str, str | None]]
    codes: list[CodeArray]
    """Codes of each row, `[N, D, h, w]`."""
    left_out: list[LeftOut]
    """Images without codes."""

    def add(self, row: _Decoded, codes: CodeArray) -> None:
        self.keys.append(row_key(row.sample.key, row.view))
        self.columns.append(table_columns(row.sample, row.view))
        self.codes.append(codes)

    def drop(self, images: set[str]) -> None:
        """Remove the rows of images and of their views, some of which may be encoded before one of them fails."""
        if not images:
            return
        shown = [image_key(key, str(row[VIEW])) for key, row in zip(self.keys, self.columns, strict=True)]
        kept = [at for at, image in enumerate(shown) if image not in images]
        self.keys = [self.keys[at] for at in kept]
        self.columns = [self.columns[at] for at in kept]
        self.codes = [self.codes[at] for at in kept]


class TokenizeWorker:
    """Makes shards of the code table with one encoder."""

    def __init__(self, job: TokenizeWorkerFactory) -> None:
        self.job = job
        self.store = job.encoder.store
        self.download: Manifest = self.store.load(job.download_digest)
        self.encoder: Encoder = job.encoder()
        self.transform: TransformConfig = self.encoder.tokenizer.config.transform
        self._sandbox = EncoderSandbox(job.encoder)
        self._device_lost = False

    def make(self, shard: Shard, *, isolated: bool) -> EncodedShard:
        """Encode the images of a shard and store its tables; see `stages.mapped.engine.MakesShards`."""
        rows = self._rows(shard.shard, isolated)
        return EncodedShard(
            files=tuple(self._store(shard.shard, rows)),
            rows=len(rows.keys),
            images=len(rows.left_out) + sum(column[VIEW] == ORIGINAL for column in rows.columns),
            left_out=tuple(rows.left_out),
        )

    def _rows(self, shard: str, isolated: bool) -> _Rows:
        """Make the rows of a shard, in a child process if workers died of it or this process's device is lost."""
        if not isolated and not self._device_lost:
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
                self._sandbox.close()  # since it needs the memory of a second encoder

    def _encode_shard(self, shard: str, encoder: Encodes) -> _Rows:
        rows = _Rows([], [], [], [])
        decoded = self._decoded(shard, rows.left_out)
        gone: set[str] = set()
        while group := list(islice(decoded, self.job.batch_size)):
            group = [row for row in group if row.sample.key not in gone]  # an image's views are left out with it
            if not group:
                continue
            pixels = np.stack([row.pixels for row in group])
            batch = ImageBatch(pixels, [row.sample.key for row in group], [row.view for row in group])
            isolated = isolate(partial(encoder.encode, batch), batch.keys, WORDING)
            for slot, failure in isolated.failures.items():
                if group[slot].sample.key not in gone:
                    rows.left_out.append(_left_out(group[slot].sample, _status(failure), failure.error))
                gone.add(group[slot].sample.key)
            for slot, codes in zip(isolated.slots, isolated.results, strict=True):
                rows.add(group[slot], codes)
            # scored after encoding, which may have found images that crash the teacher's tower
            encoded = [group[slot] for slot in isolated.slots if group[slot].sample.key not in gone]
            for sample, status, error in self._mismatched(encoded, encoder):
                rows.left_out.append(_left_out(sample, status, error))
                gone.add(sample.key)
        rows.drop(gone)
        self._spot_check(shard, rows, encoder)
        return rows

    def _mismatched(self, group: list[_Decoded], encoder: Encodes) -> Iterator[tuple[ImageSample, str, str]]:
        """Yield training images that do not match their caption or cannot be scored, with status and reason."""
        least = self.job.min_caption_match
        pairs = [row for row in group if row.view == ORIGINAL and _is_train(row.sample)]
        if least is None or not pairs:
            return
        pixels, captions = np.stack([row.pixels for row in pairs]), [row.sample.text for row in pairs]
        scored = isolate(partial(encoder.scores, pixels, captions), [row.sample.key for row in pairs], WORDING)
        for slot, failure in scored.failures.items():
            yield pairs[slot].sample, _status(failure), failure.error
        for slot, score in zip(scored.slots, map(float, scored.results), strict=True):
            if score < least:
                yield pairs[slot].sample, FILTERED, f"image and caption match below {least:g} ({score:.3f})"

    def _decoded(self, shard: str, left_out: list[LeftOut]) -> Iterator[_Decoded]:
        """Yield the rows of a shard, each image followed by its views, decoded at most two batches ahead."""
        samples = read_image_shard(self.store.fetch(self.download.file(images_file(shard))))
        views = [view_name(number) for number in range(1, self.job.encoder.views.count + 1)]
        ahead = max(1, 2 * self.job.batch_size // (1 + len(views)))
        with ThreadPoolExecutor(self.job.decode_threads, thread_name_prefix="decode") as pool:
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
        """Decode and transform an image; uint8 `[3, H, W]`."""
        return np.array(load_image(sample.image, self.transform)).transpose(2, 0, 1)

    def _spot_check(self, shard: str, rows: _Rows, encoder: Encodes) -> None:
        """Encode a few images again, found by their keys, and compare: no row may have another image's codes.

        Raises:
            RuntimeError: a row differs.
        """
        originals = [at for at, column in enumerate(rows.columns) if column[VIEW] == ORIGINAL]
        if not originals:
            return
        chosen = {rows.keys[at]: at for at in originals[:: -max(1, len(originals) // _SPOT_CHECKS)][:_SPOT_CHECKS]}
        tar = self.store.fetch(self.download.file(images_file(shard)))
        samples = [sample for sample in read_image_shard(tar) if sample.key in chosen]
        keys = [sample.key for sample in samples]
        pixels = np.stack([self._pixels(sample) for sample in samples])
        again = encoder.encode(ImageBatch(pixels, keys, [ORIGINAL] * len(keys)), list(range(len(keys))))
        for key, codes in zip(keys, again, strict=True):
            agreement = float((codes == rows.codes[chosen[key]]).mean())
            if agreement < AGREEMENT:
                raise RuntimeError(
                    f"shard {shard}: only {agreement:.0%} of the codes of image {key} come out again when it is "
                    f"encoded once more (at least {AGREEMENT:.0%} must); a fault of the program or the device; "
                    "nothing of the shard is stored"
                )

    def _store(self, shard: str, rows: _Rows) -> list[FileEntry]:
        """Store the shard's table of codes, unless every image is left out, and its table of left-out images."""
        store, entries = self.store, []
        with store.scratch_dir() as scratch:
            if rows.keys:
                columns = {name: [row[name] for row in rows.columns] for name in rows.columns[0]}
                codes = np.stack(rows.codes)
                write_code_shard(scratch / "codes.parquet", self._info(), rows.keys, columns, codes)
                check_written(scratch / "codes.parquet", rows.keys, codes)
                entries.append(store.put_file(scratch / "codes.parquet", codes_file(shard)))
            if rows.left_out:
                names = ("key", "status", "error")
                table = pa.table(
                    {name: pa.array([getattr(row, name) for row in rows.left_out], pa.string()) for name in names}
                )
                write_table(table, scratch / "left_out.parquet")
                entries.append(store.put_file(scratch / "left_out.parquet", left_out_file(shard)))
        return entries

    def _info(self) -> CodeTableInfo:
        tokenizer = self.encoder.tokenizer
        return CodeTableInfo(
            code_shape=tokenizer.code_shape,
            codebook_names=tokenizer.book_names,
            codebook_sizes=tokenizer.codebook_sizes,
            tokenizer_digest=self.job.encoder.tokenizer_digest,
            transform=self.transform.model_dump(mode="json"),
        )


def _is_train(sample: ImageSample) -> bool:
    return split_of(sample.json.get(SPLIT)) == TRAIN


def _left_out(sample: ImageSample, status: str, error: str) -> LeftOut:
    return LeftOut(sample.key, status, on_one_line(error, 200))


def _status(failure: InputFailure) -> str:
    return CRASHED if failure.crashed else FAILED


def _ahead(futures: Iterator[tuple[ImageSample, Future[_T]]], count: int) -> Iterator[tuple[ImageSample, Future[_T]]]:
    """Yield the futures in their order, with the next `count` already submitted."""
    waiting = deque(islice(futures, count))
    while waiting:
        yield waiting.popleft()
        waiting.extend(islice(futures, 1))
