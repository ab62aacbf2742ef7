"""The tokenize stage, end to end, against a bare loop of the same encoder and against one `.npy` an image.

    python -m tests.benchmarks.bench_tokenize [--images 2048] [--shard 256]

The encoder of LlamaGen's VQ-16 at a quarter of its width, untrained (what is measured does not depend on its weights),
float32, PNGs of 128 px. All sides use as many threads as the machine has cores: one worker with all of them, or two
with half each.

- ours: `stages.tokenize` on Ray with a local store: read, check, decode, encode, write Parquet, receipts. Steady
  state is from the moment when every worker has delivered a shard; what comes before is a line of its own.
- bare loop: the tokenizer alone, as many images at a time as the stage gives it, all decoded before the clock starts;
  PyTorch's threads share each convolution.
- loop of the stage's encoder: the same, with the encoder of one worker, whose threads take images of their own. What is
  missing to 1 is the price of reading, checking, decoding and writing on the same cores.
- one `.npy` an image: decode, encode at batch 1, `np.save`, as LlamaGen extracts codes.

Each line is a cost (milliseconds an image), so `ratio` 0.9 means nine tenths of the peer's images a second.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infra.executors import Executor, Item, RayExecutor, WorkerFactory
from infra.process_groups import Function
from models.transforms import load_image, normalise
from stages.artifacts.rows import ORIGINAL
from stages.pipeline.execution import find_artifacts
from stages.protocol import StageContext
from stages.tokenize.encoding import CPU_CHUNK, Encoder, EncoderFactory, ImageBatch
from stages.tokenize.stage import STAGE
from storage.store import Store
from tests.benchmarks.measuring import report
from tests.helpers.light import LightRun, light_run

TOKENIZER: dict[str, Any] = {
    "transform": {"image_size": 128},
    "conv": {
        "patch_size": 1,
        "channels": 32,
        "channel_multipliers": [1, 1, 2, 2, 4],
        "encoder_blocks": 2,
        "latent_channels": 64,
        "attention": True,
    },
    "quantizer": {"codebook_size": 4096, "code_dim": 8},
}


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--shard", type=int, default=256, help="images of a shard")
    arguments = parser.parse_args()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {workers: _run(folder, workers, cores, arguments) for workers in (1, 2)}
        loop = _bare_loop(runs[1], folder / "loop")
        own_loop = _loop_of_the_stages_encoder(runs[1], folder / "own loop")
        files = _one_file_an_image(runs[1], folder / "files")
        for workers, run in runs.items():
            executor = _Timed(RayExecutor())
            try:
                cost, start_up = _stage(run, folder / f"store{workers}", executor, workers, arguments.shard)
            finally:
                executor.close()
            label = f"tokenize, {workers} worker{'s' if workers > 1 else ''} of {max(1, cores // workers)} threads"
            report(f"{label}, against a bare loop of the encoder", cost, loop, "ms/img")
            report(f"{label}, against a loop of the stage's encoder", cost, own_loop, "ms/img")
            report(f"{label}, against one .npy an image at batch 1", cost, files, "ms/img")
            report(f"{label}: start-up and first shards, against their images in a bare loop", *start_up, "s")


def _run(folder: Path, workers: int, cores: int, arguments: argparse.Namespace) -> LightRun:
    tokenize = {
        "batch_size": 32,
        "precision": "fp32",
        "num_workers": workers,
        "threads_per_worker": max(1, cores // workers),
        "views": {"count": 0},
    }
    own = folder / f"run{workers}"
    own.mkdir()
    return light_run(
        own,
        num_images=arguments.images,
        rows_per_shard=arguments.shard,
        side=128,
        tokenizer=TOKENIZER,
        sections={"tokenize": tokenize},
    )


class _Timed:
    """An executor that notes when each result comes."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self.times: list[float] = []

    def map(
        self, factory: WorkerFactory, items: list[Item], *, num_workers: int, num_gpus: float = 0
    ) -> Iterator[Item]:
        for result in self._inner.map(factory, items, num_workers=num_workers, num_gpus=num_gpus):
            self.times.append(time.perf_counter())
            yield result

    @property
    def on_this_machine(self) -> bool:
        return self._inner.on_this_machine

    def run_together(
        self, function: Function, *, num_processes: int, num_gpus: float = 0, scratch: Path | None = None
    ) -> Any:
        return self._inner.run_together(function, num_processes=num_processes, num_gpus=num_gpus, scratch=scratch)

    def close(self) -> None:
        self._inner.close()


def _stage(
    run: LightRun, folder: Path, executor: _Timed, workers: int, shard: int
) -> tuple[float, tuple[float, float]]:
    """Milliseconds an image in steady state; seconds before it, and those that a bare loop takes for as many images."""
    store = run.store(str(folder))
    found = find_artifacts(run.recipe, store, list(STAGE.feeders(run.recipe.tokenize)))
    inputs = {name: manifest for name, manifest in found.items() if manifest is not None}
    with store.scratch_dir() as scratch:
        context: StageContext[Any] = StageContext(
            run.recipe.tokenize, run.recipe.seed, inputs, store, run.action_key, executor, scratch
        )
        start = time.perf_counter()
        STAGE.run(context)
        end = time.perf_counter()
    ready = executor.times[workers - 1]
    cost = (end - ready) / (len(run.keys) - workers * shard) * 1e3
    return cost, (ready - start, cost / 1e3 * workers * shard)


def _encoder(run: LightRun, store: Store) -> Encoder:
    tokenizer = find_artifacts(run.recipe, store, ["train_tokenizer"])["train_tokenizer"]
    assert tokenizer is not None
    config = run.recipe.tokenize
    return EncoderFactory(
        store=store,
        tokenizer_digest=tokenizer.digest,
        scorer_digest=None,
        views=config.views,
        precision=config.precision,
        on_gpu=config.gpus_per_worker > 0,
        num_threads=config.threads_per_worker,
        seed=run.recipe.seed,
    )()


def _pixels(run: LightRun, encoder: Encoder, key: str) -> np.ndarray[Any, Any]:
    data = (run.recipe_path.parent / f"{key}.png").read_bytes()
    return np.array(load_image(data, encoder.tokenizer.config.transform)).transpose(2, 0, 1)


def _codes(encoder: Encoder, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return encoder.tokenizer.encode(normalise(torch.from_numpy(pixels))).numpy()


@torch.no_grad()
def _bare_loop(run: LightRun, folder: Path) -> float:
    """Milliseconds an image."""
    encoder = _encoder(run, run.store(str(folder)))
    torch.set_num_threads(os.cpu_count() or 1)  # after the encoder, which has threads of its own
    pixels = np.stack([_pixels(run, encoder, key) for key in run.keys])
    batches = [pixels[start : start + CPU_CHUNK] for start in range(0, len(pixels), CPU_CHUNK)]
    _codes(encoder, batches[0])
    start = time.perf_counter()
    for images in batches:
        _codes(encoder, images)
    return (time.perf_counter() - start) / len(pixels) * 1e3


def _loop_of_the_stages_encoder(run: LightRun, folder: Path) -> float:
    """Milliseconds an image."""
    encoder = _encoder(run, run.store(str(folder)))
    size = run.recipe.tokenize.batch_size
    batches = []
    for start in range(0, len(run.keys), size):
        keys = run.keys[start : start + size]
        pixels = np.stack([_pixels(run, encoder, key) for key in keys])
        batches.append(ImageBatch(pixels, keys, [ORIGINAL] * len(keys)))
    encoder.encode(batches[0], list(range(len(batches[0]))))
    start_s = time.perf_counter()
    for batch in batches:
        encoder.encode(batch, list(range(len(batch))))
    return (time.perf_counter() - start_s) / len(run.keys) * 1e3


@torch.no_grad()
def _one_file_an_image(run: LightRun, folder: Path) -> float:
    """Milliseconds an image, over a quarter of the images."""
    encoder = _encoder(run, run.store(str(folder / "store")))
    torch.set_num_threads(os.cpu_count() or 1)
    keys = run.keys[: max(1, len(run.keys) // 4)]
    start = time.perf_counter()
    for key in keys:
        np.save(folder / f"{key}.npy", _codes(encoder, _pixels(run, encoder, key)[None])[0])
    return (time.perf_counter() - start) / len(keys) * 1e3


if __name__ == "__main__":
    main()
