"""Scores of captions by a worker's encoder: what they must not depend on."""

from __future__ import annotations

import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.teachers.teacher import Teacher
from models.transforms import ViewsConfig
from stages.artifacts.rows import FILTERED
from stages.mapped.engine import Shard
from stages.pipeline.execution import find_artifacts
from stages.tokenize import encoding
from stages.tokenize.encoding import CPU_CHUNK, Encoder, EncoderFactory, Pixels
from stages.tokenize.worker import FAILED, TokenizeWorkerFactory
from tests.helpers.light import light_run


class _Teacher(Teacher):
    """One convolution and a matrix for images, a random vector for each text; it keeps how it was called."""

    has_text = True
    hated = "none"

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kernel = torch.randn((16, 3, 5, 5), generator=generator)
        self.matrix = torch.randn((16 * 14 * 14, 32), generator=generator)
        self.calls: list[tuple[str, int]] = []

    def embed_images(self, images: Tensor) -> Tensor:
        self.calls.append((threading.current_thread().name, len(images)))
        return F.normalize(F.conv2d(images, self.kernel, stride=2).flatten(1) @ self.matrix, dim=-1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        if self.hated in texts:
            raise ValueError("cannot read this one")
        seeds = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in texts]
        return F.normalize(torch.stack([torch.randn(32, generator=seed) for seed in seeds]), dim=-1)


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> _Teacher:
    made = _Teacher()
    monkeypatch.setattr(encoding, "load_teacher", lambda store, manifest: made)
    return made


@pytest.fixture
def encoder(teacher: _Teacher, tmp_path: Path) -> Encoder:
    run = light_run(tmp_path, num_images=1, rows_per_shard=1)
    store = run.store(str(tmp_path / "store"))
    found = find_artifacts(run.recipe, store, ["prepare_teacher", "train_tokenizer"])
    digests = [manifest.digest for manifest in found.values() if manifest is not None]
    factory = EncoderFactory(store, digests[1], digests[0], ViewsConfig(), "fp32", on_gpu=False, num_threads=2, seed=0)
    return factory()


def _images(count: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def test_no_score_depends_on_the_images_beside_it(encoder: Encoder) -> None:
    pixels, captions = _images(19), [f"caption {number}" for number in range(19)]
    together = encoder.scores(pixels, captions, list(range(19)))
    assert len(set(together.tolist())) == 19
    for size in (1, 3, 8, 11):
        parts = [slice(start, start + size) for start in range(0, 19, size)]
        apart = [encoder.scores(pixels[at], captions[at], list(range(len(pixels[at])))) for at in parts]
        assert np.array_equal(np.concatenate(apart), together), size
    some = [2, 7, 8, 18]
    assert np.array_equal(encoder.scores(pixels, captions, some), together[some])


def test_scores_are_worked_out_by_all_threads_of_the_encoder(encoder: Encoder, teacher: _Teacher) -> None:
    encoder.scores(_images(12), ["x"] * 12, list(range(12)))
    assert [size for _, size in teacher.calls] == [CPU_CHUNK, CPU_CHUNK]
    assert all(name.startswith("encode") for name, _ in teacher.calls)


def test_a_pair_that_cannot_be_scored_is_a_row_and_the_others_are_scored(teacher: _Teacher, tmp_path: Path) -> None:
    run = light_run(tmp_path, num_images=6, rows_per_shard=6)
    store = run.store(str(tmp_path / "store"))
    found = find_artifacts(run.recipe, store, ["download", "prepare_teacher", "train_tokenizer"])
    digests = [manifest.digest for manifest in found.values() if manifest is not None]
    encoder = EncoderFactory(store, digests[2], digests[1], ViewsConfig(count=1), "fp32", False, 2, seed=0)
    worker = TokenizeWorkerFactory(encoder, digests[0], batch_size=4, decode_threads=2, min_caption_match=0.0)

    def left_out() -> dict[str, tuple[str, str]]:
        receipt = worker().make(Shard("00000"), isolated=False)
        assert receipt.rows == 2 * (6 - len(receipt.left_out)), "views go with their image"
        return {row.key: (row.status, row.error) for row in receipt.left_out}

    before = left_out()
    assert 0 < len(before) < 6
    assert all(
        status == FILTERED and error.startswith("image and caption match below 0 (-0.")
        for status, error in before.values()
    )
    teacher.hated = "image 000000003"
    assert left_out() == before | {"000000003": (FAILED, "ValueError: cannot read this one")}
