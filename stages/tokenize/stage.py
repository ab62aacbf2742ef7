"""The stage that encodes images into code tables, with one Parquet file per image shard.

An image that the encoder cannot process becomes a row of `left_out/` and does not end the run, and so does an image
that does not match its caption, if a minimum score is set.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from models.transforms import ViewsConfig
from stages.artifacts import external_codes
from stages.artifacts.rows import FILTERED
from stages.artifacts.shards import shards_of
from stages.mapped.engine import FailureLimit, Job, LeftOut, Shard, finish_shards, gather_receipts
from stages.protocol import GpuShare, Outcome, RuntimeFraction, RuntimeInt, Stage, StageContext
from stages.runtime.devices import Precision, PrecisionConfig
from stages.tokenize.encoding import EncoderFactory
from stages.tokenize.worker import EncodedShard, TokenizeWorkerFactory
from storage.manifest import FileEntry, Manifest


class TokenizeConfig(PrecisionConfig):
    """How images are encoded into rows of codes."""

    views: ViewsConfig = ViewsConfig()
    """Random views of each training image that are tokenized in addition to it, as rows of their own (column `view`):
    the augmentation for a language model that reads codes, as LlamaGen tokenizes ten crops of each image."""
    precision: Precision = "auto"
    """Autocast type of the encoder; distances to the codebook are always float32. `auto` is `bf16` on a GPU and on a
    CPU with bf16 instructions, else `fp32`, and `fp32` for imported weights that were not trained further."""
    batch_size: PositiveInt = 32
    """Number of images encoded at a time on a GPU. It enters the action key, because the last bits of a convolution,
    and so sometimes a code, depend on the batch size there. A CPU always takes eight at a time, so that the same images
    have the same codes."""
    min_caption_match: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Training images with a lower cosine similarity to their caption, in the space of the recipe's teacher, are left
    out; the teacher needs a text tower. All held-out images stay. LAION-400M used 0.3 with CLIP ViT-B/32; other
    teachers have other scales."""
    max_failed_fraction: RuntimeFraction = 0.01
    """The stage stops as soon as a larger fraction of all images is known to be undecodable or impossible to encode;
    finished shards are kept, and a run with a higher limit continues from there."""
    num_workers: RuntimeInt = 1
    """Number of workers, each with an encoder."""
    decode_threads: RuntimeInt = 2
    """Number of threads of each worker that decode its next images."""
    gpus_per_worker: GpuShare = 0.0
    """Number of GPUs, or fraction of a GPU, that each encoder reserves; 0 encodes on the CPU."""
    threads_per_worker: RuntimeInt = 2
    """Number of CPU threads of each encoder, each of which encodes its own images."""

    def computes_on(self) -> str:
        return "cuda" if self.gpus_per_worker else "cpu"


def run(context: StageContext[TokenizeConfig]) -> Outcome:
    """Make the `code_table` artifact: `codes/NNNNN.parquet`, and `left_out/NNNNN.parquet` for shards with such images.

    Raises:
        ValueError: too many images failed, or the teacher that is to score captions has no text tower.
    """
    config, download, tokenizer = context.config, context.inputs["download"], context.inputs["train_tokenizer"]
    if tokenizer.kind == external_codes.KIND:
        return external_codes.join(context)
    factory = _worker_factory(context)
    planned = [Shard(name).to_json() for name in shards_of(download)]
    plan = context.store.work(context.action_key).create_plan({"shards": planned})
    shards = [Shard.from_json(shard) for shard in plan["shards"]]
    job = Job(factory, Shard, EncodedShard, "tokenize shards", "images", lambda receipt: receipt.rows)
    limit = FailureLimit(
        "tokenize.max_failed_fraction",
        config.max_failed_fraction,
        download.metrics["num_ok"],
        "images could not be tokenized",
    )
    receipts = gather_receipts(
        finish_shards(context, shards, job, num_workers=config.num_workers, num_gpus=config.gpus_per_worker),
        limit,
        _failures,
        "take them out of the download, or raise the limit: what is done is kept",
    )
    metrics = _counts(config, list(receipts.values()))
    files: list[FileEntry] = [entry for shard in shards for entry in receipts[shard.shard].files]
    metadata = {"tokenizer": tokenizer.digest, "code_shape": tokenizer.metadata["code_shape"]}
    return Outcome("code_table", files, metrics=metrics, metadata=metadata)


def _worker_factory(context: StageContext[TokenizeConfig]) -> TokenizeWorkerFactory:
    config = context.config
    encoder = EncoderFactory(
        store=context.store,
        tokenizer_digest=context.inputs["train_tokenizer"].digest,
        scorer_digest=_scorer(config, context.inputs.get("prepare_teacher")),
        views=config.views,
        precision=config.precision,
        on_gpu=config.gpus_per_worker > 0,
        num_threads=config.threads_per_worker,
        seed=context.seed,
    )
    return TokenizeWorkerFactory(
        encoder=encoder,
        download_digest=context.inputs["download"].digest,
        batch_size=config.batch_size,
        decode_threads=config.decode_threads,
        min_caption_match=config.min_caption_match,
    )


def _scorer(config: TokenizeConfig, teacher: Manifest | None) -> str | None:
    """Return the digest of the teacher that scores captions, or None if none are scored."""
    if config.min_caption_match is None:
        return None
    assert teacher is not None, "see unused_inputs"
    if not teacher.metadata["has_text"]:
        raise ValueError(
            f"tokenize.min_caption_match={config.min_caption_match} needs a teacher with a text tower; choose one in "
            "teacher.model, or take the setting out"
        )
    return teacher.digest


def _failures(receipt: EncodedShard) -> list[LeftOut]:
    """Return the images that could not be decoded or encoded."""
    return [image for image in receipt.left_out if image.status != FILTERED]


def _counts(config: TokenizeConfig, receipts: list[EncodedShard]) -> dict[str, int]:
    num_rows = sum(receipt.rows for receipt in receipts)
    if not num_rows:
        raise ValueError(
            f"none of {sum(receipt.images for receipt in receipts)} images is left; lower "
            f"tokenize.min_caption_match={config.min_caption_match}, whose scale depends on the teacher"
        )
    num_left_out = sum(len(receipt.left_out) for receipt in receipts)
    num_failed = sum(len(_failures(receipt)) for receipt in receipts)
    return {"num_rows": num_rows, "num_filtered": num_left_out - num_failed, "num_failed": num_failed}


def _unused_inputs(config: TokenizeConfig) -> tuple[str, ...]:
    return ("prepare_teacher",) if config.min_caption_match is None else ()


STAGE = Stage(
    name="tokenize",
    section="tokenize",
    inputs=("download", "prepare_teacher", "train_tokenizer"),
    unused_inputs=_unused_inputs,
    run=run,
    version=5,  # images of all depths and colour profiles arrive as sRGB
)
