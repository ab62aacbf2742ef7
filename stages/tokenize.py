"""Images to code tables: one Parquet file per image shard, made by workers that each hold the encoder once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from models.config import Config
from models.image_tokenizer import ImageTokenizer
from models.transforms import ViewsConfig, load_image, normalise, random_view, to_tensor
from stages import external_codes
from stages.image_data import ORIGINAL, table_columns
from stages.loading import load_tokenizer
from stages.stage import Outcome, RuntimeFloat, RuntimeInt, Stage, StageContext
from stages.standalone import run_standalone
from stages.training import autocast, mix_seed, tracked
from storage.code_table import CodeTableInfo, write_code_shard
from storage.image_shards import ImageSample, read_image_shard
from storage.manifest import FileEntry, Manifest
from storage.store import Store


class TokenizeConfig(Config):
    """How images become rows of codes."""

    views: ViewsConfig = ViewsConfig()
    """Random views of each training image that are tokenized beside it, as rows of their own (column `view`): the
    augmentation of a language model that reads codes, as LlamaGen tokenizes ten crops of each image."""
    precision: str = "bf16"
    """Autocast type of the encoder, `bf16` or `fp32`; distances to the codebook are float32 in both."""
    batch_size: PositiveInt = 32
    """Images encoded at a time. Part of the identity of the result: on some devices the last bits of a convolution,
    and so now and then a code, depend on the batch."""
    num_workers: RuntimeInt = 1
    """Encoders at a time."""
    gpus_per_worker: RuntimeFloat = 0.0
    """Share of a GPU that each encoder holds; 0 encodes on the CPU."""
    threads_per_worker: PositiveInt = 2
    """CPU threads of each encoder; part of the identity of the result as in training."""


def run(context: StageContext[TokenizeConfig]) -> Outcome:
    """Make the `code_table` artifact: `codes/NNNNN.parquet`."""
    config, store, key = context.config, context.store, context.action_key
    download, tokenizer = context.inputs["download"], context.inputs["train_tokenizer"]
    if tokenizer.kind == external_codes.KIND:
        return external_codes.join(context)
    shards = [entry.path.removeprefix("images/").removesuffix(".tar") for entry in download.files_under("images")]
    plan = store.create_plan(key, {"shards": shards})
    done = store.receipts(key)
    items = [{"shard": shard} for shard in plan["shards"] if shard not in done]
    factory = WorkerFactory(store, key, config, context.seed, download.digest, tokenizer.digest)
    results = context.executor.map(factory, items, num_workers=config.num_workers, num_gpus=config.gpus_per_worker)
    for _ in tracked(results, len(items), "tokenize shards"):
        pass
    receipts = store.receipts(key, done)
    missing = [shard for shard in plan["shards"] if shard not in receipts]
    assert not missing, f"every shard was mapped, yet {missing} have no receipt"
    files = [FileEntry.from_json(entry) for shard in plan["shards"] for entry in receipts[shard]["files"]]
    rows = sum(receipt["rows"] for receipt in receipts.values())
    metadata = {"tokenizer": tokenizer.digest, "code_shape": tokenizer.metadata["code_shape"]}
    return Outcome("code_table", files, metrics={"num_rows": rows}, metadata=metadata)


@dataclass(frozen=True)
class WorkerFactory:
    """What travels to a worker process; calling it there loads the encoder."""

    store: Store
    action_key: str
    config: TokenizeConfig
    seed: int
    download_digest: str
    tokenizer_digest: str

    def __call__(self) -> TokenizeWorker:
        return TokenizeWorker(self)


class TokenizeWorker:
    """Holds one encoder; each call encodes one shard, stores it and writes its receipt."""

    def __init__(self, job: WorkerFactory) -> None:
        self.job = job
        self.device = torch.device("cuda" if job.config.gpus_per_worker else "cpu")
        torch.set_num_threads(job.config.threads_per_worker)
        self.download: Manifest = job.store.load(job.download_digest)
        self.tokenizer: ImageTokenizer = load_tokenizer(job.store, job.tokenizer_digest).to(self.device)
        if self.tokenizer.teacher is not None:
            self.tokenizer.teacher.to(self.device)
        self.transform = self.tokenizer.config.transform

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        shard, store = item["shard"], self.job.store
        samples = list(read_image_shard(store.fetch(self.download.file(f"images/{shard}.tar"))))
        keys: list[str] = []
        rows: list[dict[str, str | None]] = []
        codes: list[Tensor] = []
        for start in range(0, len(samples), self.job.config.batch_size):
            batch = samples[start : start + self.job.config.batch_size]
            images = self._decode(batch)
            for view, kept in self._views(batch):
                shown = [batch[position] for position in kept]
                keys += [sample.key if view == ORIGINAL else f"{sample.key}_{view}" for sample in shown]
                rows += [table_columns(sample, view) for sample in shown]
                codes.append(self._encode(images[kept], [sample.key for sample in shown], view))
        entries = [self._store_table(shard, keys, rows, torch.cat(codes))] if keys else []  # every URL may have failed
        receipt = {"files": [entry.to_json() for entry in entries], "rows": len(keys)}
        store.write_receipt(self.job.action_key, shard, receipt)
        return {"shard": shard, "rows": len(keys)}

    def _store_table(self, shard: str, keys: list[str], rows: list[dict[str, str | None]], codes: Tensor) -> FileEntry:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        info = CodeTableInfo(
            code_shape=self.tokenizer.code_shape,
            codebook_names=self.tokenizer.book_names,
            codebook_sizes=self.tokenizer.codebook_sizes,
            tokenizer_digest=self.job.tokenizer_digest,
            transform=self.transform.model_dump(mode="json"),
        )
        with self.job.store.attempt_dir() as scratch:
            write_code_shard(scratch / "codes.parquet", info, keys, columns, codes.cpu().numpy())
            return self.job.store.put_file(scratch / "codes.parquet", f"codes/{shard}.parquet")

    def _views(self, batch: list[ImageSample]) -> list[tuple[str, list[int]]]:
        """Each view and the positions in the batch of the samples that it is made of."""
        everyone = list(range(len(batch)))
        trained_on = [at for at in everyone if (batch[at].json.get("split") or "train") == "train"]
        views = [(f"view_{number}", trained_on) for number in range(1, self.job.config.views.count + 1)]
        return [(view, kept) for view, kept in [(ORIGINAL, everyone), *views] if kept]

    def _decode(self, samples: list[ImageSample]) -> Tensor:
        """float `[B, 3, H, W]` in [-1, 1] on the device."""
        pixels = to_tensor([load_image(sample.image, self.transform) for sample in samples])
        return normalise(pixels.to(self.device))

    @torch.no_grad()
    def _encode(self, images: Tensor, keys: list[str], view: str) -> Tensor:
        """Codes `[B, N, D, h, w]` of a view of the images with these keys."""
        if view != ORIGINAL:
            generators = [torch.Generator().manual_seed(mix_seed(self.job.seed, view, key)) for key in keys]
            views = self.job.config.views
            images = torch.stack(
                [random_view(image, views, own) for image, own in zip(images, generators, strict=True)]
            )
        with autocast(self.device, self.job.config.precision):
            return self.tokenizer.encode(images)


STAGE = Stage(
    name="tokenize",
    section="tokenize",
    config_class=TokenizeConfig,
    inputs=("download", "prepare_teacher", "train_tokenizer"),
    run=run,
)

if __name__ == "__main__":
    raise SystemExit(run_standalone(STAGE.name))
