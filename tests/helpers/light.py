"""A store in which `tokenize` can start at once: random images, and a small tokenizer that has learnt nothing.

It stands under the keys that the recipe gives, so `python -m stages.tokenize` finds it as it would find a real run's.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from models.tokenizers.kinds import build_tokenizer, tokenizer_config
from stages.artifacts.models import WEIGHTS, put_json
from stages.pipeline.recipe import STAGES, Recipe, load_recipe
from stages.protocol import normalised_config
from stages.runtime.devices import with_precision
from storage.image_shards import ImageSample, write_image_shard
from storage.manifest import FileEntry, Manifest
from storage.store import Store


@dataclass(frozen=True)
class LightRun:
    """What a test needs to run tokenize."""

    recipe: Recipe
    recipe_path: Path
    action_key: str
    """Of tokenize."""
    keys: list[str]
    """Of the images, in order."""

    def store(self, uri: str) -> Store:
        """Fill a store, empty or not, with what tokenize starts from."""
        store = Store(uri)
        _fill(store, self.recipe, self._images())
        return store

    def _images(self) -> list[list[ImageSample]]:
        folder = self.recipe_path.parent
        shards: list[list[ImageSample]] = []
        for key in self.keys:
            if int(key) % self.recipe.download.rows_per_shard == 0:
                shards.append([])
            shards[-1].append(ImageSample(key, (folder / f"{key}.png").read_bytes(), "png", f"image {key}", {}))
        return shards


def light_run(
    folder: Path,
    *,
    num_images: int,
    rows_per_shard: int,
    sections: dict[str, Any] | None = None,
    side: int = 32,
    tokenizer: dict[str, Any] | None = None,
) -> LightRun:
    """Make the images and the recipe.

    Args:
        folder: for both; must exist as long as the run.
        num_images: how many; random, smooth, with a little noise.
        rows_per_shard: images of a shard.
        sections: what else the recipe changes of `tiny`.
        side: of the stored images, pixels.
        tokenizer: section of the recipe; default that of `tiny`, of the kind that needs no teacher.
    """
    keys = [f"{number:09d}" for number in range(num_images)]
    random = np.random.default_rng(0)
    for key in keys:
        smooth = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).resize((side, side))
        noisy = np.asarray(smooth) + random.integers(-4, 5, (side, side, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{key}.png")
    changes: dict[str, Any] = {"extends": "tiny", "name": "light", "tokenizer": {"kind": "vqgan"} | (tokenizer or {})}
    changes["download"] = {"rows_per_shard": rows_per_shard}
    changes["tokenize"] = {"batch_size": 4, "threads_per_worker": 1, "views": {"count": 1}}
    for section, values in (sections or {}).items():
        changes[section] = changes.get(section, {}) | values
    path = folder / "light.yaml"
    path.write_text(yaml.safe_dump(changes))
    recipe = load_recipe(str(path))
    run = LightRun(recipe, path, "", keys)
    with tempfile.TemporaryDirectory() as scratch:
        digests = _fill(Store(scratch), recipe, run._images())
    stage, config = STAGES["tokenize"], with_precision(recipe.tokenize, {})
    inputs = {feeder: digests[feeder] for feeder in stage.feeders(config)}
    return replace(run, action_key=stage.action_key(config, recipe.seed, inputs))


def _fill(store: Store, recipe: Recipe, shards: list[list[ImageSample]]) -> dict[str, str]:
    """Commit the three artifacts that tokenize starts from; return their digests."""
    digests: dict[str, str] = {}
    with store.scratch_dir() as scratch:
        images = []
        for number, samples in enumerate(shards):
            write_image_shard(scratch / "shard.tar", samples)
            images.append(store.put_file(scratch / "shard.tar", f"images/{number:05d}.tar"))
        metrics = {"num_ok": sum(map(len, shards))}
        _commit(store, recipe, "download", "image_shards", images, digests, metrics)
        _commit(store, recipe, "prepare_teacher", "teacher", [], digests)
        config = tokenizer_config(recipe.tokenizer.model_dump())
        torch.manual_seed(0)
        tokenizer = build_tokenizer(config, None)
        files = [put_json(store, config.model_dump(mode="json"), "tokenizer.json")]
        weights = {name: value.contiguous().clone() for name, value in tokenizer.state_dict().items()}
        save_file(weights, scratch / WEIGHTS)
        files.append(store.put_file(scratch / WEIGHTS, WEIGHTS))
        _commit(store, recipe, "train_tokenizer", "tokenizer", files, digests, code_shape=list(tokenizer.code_shape))
    return digests


def _commit(
    store: Store,
    recipe: Recipe,
    name: str,
    kind: str,
    files: list[FileEntry],
    digests: dict[str, str],
    metrics: dict[str, Any] | None = None,
    **metadata: Any,
) -> None:
    stage = STAGES[name]
    config = with_precision(recipe.section(stage), {})
    inputs = {feeder: digests[feeder] for feeder in stage.feeders(config)}
    manifest = Manifest(kind, 1, name, normalised_config(config), inputs, tuple(files), metrics or {}, metadata)
    digests[name] = store.commit(stage.action_key(config, recipe.seed, inputs), manifest).digest
