"""Published weights become a tokenizer artifact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infra.executors import LocalExecutor
from stages.execution import run_stage
from stages.import_tokenizer import import_weights
from stages.loading import load_tokenizer, read_state
from stages.recipe import load_recipe
from tests.llamagen import Reference
from tests.tiny import TinyRun

VQGAN = ["tokenizer.kind=vqgan"]
SIZES = [
    *VQGAN,
    "tokenizer.transform.image_size=16",
    "tokenizer.conv={channels: 32, channel_multipliers: [1, 2, 2], decoder_blocks: 3, latent_channels: 16}",
    "tokenizer.quantizer={codebook_size: 24, code_dim: 4, update: gradient}",
]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@torch.no_grad()
def test_a_checkpoint_becomes_an_artifact_as_it_is(
    tiny_run: TinyRun,
    tmp_path: Path,
    reference: Reference,
) -> None:
    torch.save({"model": reference.state}, tmp_path / "vq.pt")
    import_weights(tmp_path / "vq.pt", load_recipe("tiny", SIZES), tmp_path / "made/vq.safetensors")
    recipe = load_recipe("tiny", [*SIZES, f"tokenizer.weights={tmp_path}/made/vq.safetensors", "tokenizer.steps=0"])
    store = tiny_run.store_before("train_tokenizer", tmp_path / "store")
    result = run_stage("train_tokenizer", recipe, store, LocalExecutor())
    tokenizer = load_tokenizer(store, result.digest)
    assert torch.equal(tokenizer.encode(reference.images)[:, 0, 0], reference.encode(reference.images))
    assert result.manifest.metrics["psnr"] > 0

    other = {name: value + 1 for name, value in read_state(tmp_path / "made/vq.safetensors").items()}
    from safetensors.torch import save_file

    save_file(other, tmp_path / "made/vq.safetensors")
    assert run_stage("train_tokenizer", recipe, store, LocalExecutor()).digest != result.digest, "the content counts"


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, reference: Reference) -> None:
    torch.save({"model": reference.state}, tmp_path / "vq.pt")
    (tmp_path / "vq.pt").write_bytes((tmp_path / "vq.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"vq\.pt is no checkpoint, or a damaged one: .*; fetch the file again"):
        import_weights(tmp_path / "vq.pt", load_recipe("tiny", SIZES), tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        import_weights(tmp_path / "missing.pt", load_recipe("tiny", SIZES), tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("override", "message"),
    [("tokenizer.steps=0", "trains nothing"), ("tokenizer.weights=nowhere.safetensors", "import-tokenizer")],
)
def test_weights_that_are_not_there_are_refused(tiny_run: TinyRun, tmp_path: Path, override: str, message: str) -> None:
    store = tiny_run.store_before("train_tokenizer", tmp_path / "store")
    with pytest.raises(ValueError, match=message):
        run_stage("train_tokenizer", load_recipe("tiny", [*VQGAN, override]), store, LocalExecutor())
