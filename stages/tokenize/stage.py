"""Images to code tables: one Parquet file per image shard, made by workers that each hold the encoder once.

An image that the encoder cannot take is a row of `left_out/`, not the end of the run, and so is one that does not fit
its caption where a least score is asked for.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from models.transforms import ViewsConfig
from stages.artifacts import external_codes
from stages.artifacts.rows import FILTERED
from stages.artifacts.shards import shards_of
from stages.mapped.engine import FailureLimit, Job, LeftOut, Shard, finish_shards, gather_receipts
from stages.protocol import Outcome, RuntimeFloat, RuntimeFraction, RuntimeInt, Stage, StageContext
from stages.runtime.devices import Precision, PrecisionConfig
from stages.tokenize.encoding import EncoderFactory
from stages.tokenize.worker import EncodedShard, TokenizeWorkerFactory
from storage.manifest import FileEntry, Manifest


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
        ValueError: too many images failed, or captions are to be scored by a teacher that cannot.
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


def _failures(receipt: EncodedShard) -> list[LeftOut]:
    """Images that could not be decoded or encoded."""
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
    config_class=TokenizeConfig,
    inputs=("download", "prepare_teacher", "train_tokenizer"),
    unused_inputs=_unused_inputs,
    run=run,
    version=5,  # images of all depths and colour profiles arrive as sRGB
)
