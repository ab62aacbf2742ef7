"""A kind of tokenizer is a config class and a tokenizer class in one file, and a line in `KINDS`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from infra.executors import LocalExecutor
from models.tokenizers.config import OneCodeConfig
from models.tokenizers.convolutional import ConvConfig, ConvDecoder
from models.tokenizers.kinds import KINDS
from models.tokenizers.losses import LossConfig
from models.tokenizers.one_code import OneCodeTokenizer
from models.tokenizers.quantizers import VectorQuantizerConfig
from models.transforms import TransformConfig
from stages.artifacts.models import load_tokenizer
from stages.download.stage import DownloadConfig
from stages.protocol import Outcome, StageContext
from stages.train_tokenizer.stage import STAGE, training_config
from storage.manifest import Manifest
from storage.store import Store
from tests.helpers.given_files import make_webdataset, run_download


class PatchesConfig(OneCodeConfig):
    """Patches through one linear layer, as a ViT folds them."""

    kind: Literal["patches"] = "patches"


class PatchesTokenizer(OneCodeTokenizer):
    config_class = PatchesConfig
    config: PatchesConfig
    book_names = ("patches",)
    needs_teacher = False

    def _build(self) -> None:
        side, code_dim = self.config.conv.downsampling, self.config.quantizer.code_dim
        self.encoder = nn.Conv2d(3, code_dim, side, stride=side)
        self.quantizer = self.config.quantizer.build()
        self.post_quant = nn.Linear(code_dim, self.config.conv.latent_channels)
        self.decoder = ConvDecoder(self.config.conv)

    def _before_quantization(self, images: Tensor, target: Tensor | None) -> Tensor:
        return self.encoder(images).permute(0, 2, 3, 1)


def test_a_file_and_a_line_are_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, PatchesTokenizer.config_class.model_fields["kind"].default, PatchesTokenizer)
    *_, downloaded = run_download(DownloadConfig(files=make_webdataset(tmp_path), held_out_fraction=0.5), tmp_path)
    store = Store(str(tmp_path / "store"))
    download = commit(store, "download", downloaded, {})
    config = training_config(PatchesTokenizer)(
        transform=TransformConfig(image_size=16),
        conv=ConvConfig(channels=32, channel_multipliers=(1, 2), latent_channels=8),
        quantizer=VectorQuantizerConfig(codebook_size=16, code_dim=4),
        loss=LossConfig(perceptual="none"),
        steps=2,
        batch_size=2,
        precision="fp32",
    )
    with store.scratch_dir() as scratch:
        context = StageContext(config, 0, {"download": download}, store, "0" * 64, LocalExecutor(), scratch)
        outcome = STAGE.run(context)
    made = commit(store, "train_tokenizer", outcome, {"download": download.digest})
    tokenizer = load_tokenizer(store, made.digest)
    assert isinstance(tokenizer, PatchesTokenizer)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 1, 1, 8, 8) == (2, *tokenizer.code_shape)
    assert tokenizer.decode(codes).shape == images.shape


def commit(store: Store, stage: str, outcome: Outcome, inputs: dict[str, str]) -> Manifest:
    files = tuple(outcome.files)
    manifest = Manifest(outcome.kind, 1, stage, {}, inputs, files, outcome.metrics, outcome.metadata)
    return store.load(store.commit(f"{stage}-key", manifest).digest)
