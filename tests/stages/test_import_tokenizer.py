"""Published weights become a tokenizer artifact."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infra.executors import LocalExecutor
from stages.execution import run_stage
from stages.import_tokenizer import import_weights
from stages.loading import load_tokenizer, read_state
from stages.recipe import load_recipe
from tests import dualtoken
from tests.dualtoken import DualTokenReference
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
    save_file(other, tmp_path / "made/vq.safetensors")
    assert run_stage("train_tokenizer", recipe, store, LocalExecutor()).digest != result.digest, "the content counts"


def dualtoken_overrides(folder: Path) -> list[str]:
    residual = f"{{codebook_size: {dualtoken.CODES}, code_dim: {dualtoken.CODE_DIM}, depth: {dualtoken.DEPTH}}}"
    conv = f"{{channels: {dualtoken.CHANNELS}, channel_multipliers: [1, 1], decoder_blocks: 2, encoder_blocks: 1"
    return [
        f"teacher.model={{kind: transformers, path: {folder}}}",
        "tokenizer.kind=dualtoken",
        "tokenizer.released_layout=true",
        f"tokenizer.transform.image_size={dualtoken.SIDE}",
        f"tokenizer.code_grid={dualtoken.GRID}",
        f"tokenizer.pixel_layers=[{dualtoken.PIXEL_LAYER}, {dualtoken.SHORTCUT_LAYER}]",
        f"tokenizer.semantic_layer={dualtoken.SEMANTIC_LAYER}",
        f"tokenizer.residual={residual}",
        f"tokenizer.conv={conv}, latent_channels: {dualtoken.LATENT}}}",
        "tokenizer.loss.perceptual=none",
        "tokenizer.precision=fp32",
    ]


@torch.no_grad()
def test_dualtokens_checkpoint_and_its_siglip_become_artifacts(tiny_run: TinyRun, tmp_path: Path) -> None:
    """From a Hugging Face folder and a checkpoint to codes and zero-shot accuracy; nothing is trained."""
    theirs = DualTokenReference(tmp_path / "siglip")
    torch.save({"state_dict": theirs.state, "epoch": 3}, tmp_path / "epoch_3.pt")
    given = dualtoken_overrides(theirs.folder)
    import_weights(tmp_path / "epoch_3.pt", load_recipe("tiny", given), tmp_path / "dualtoken.safetensors")
    recipe = load_recipe("tiny", [*given, f"tokenizer.weights={tmp_path}/dualtoken.safetensors", "tokenizer.steps=0"])
    store = tiny_run.store_before("prepare_teacher", tmp_path / "store")
    run_stage("prepare_teacher", recipe, store, LocalExecutor())
    result = run_stage("train_tokenizer", recipe, store, LocalExecutor())
    tokenizer = load_tokenizer(store, result.digest)
    assert torch.equal(tokenizer.encode(theirs.images), theirs.encode(theirs.images).codes)
    assert {"zero_shot_top1", "zero_shot_teacher_top1", "frechet_teacher"} <= set(result.manifest.metrics)


def test_kinds_without_a_published_layout_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.kind=sde is known here; vqgan takes LlamaGen's"):
        import_weights(tmp_path / "any.pt", load_recipe("tiny"), tmp_path / "out.safetensors")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "any.pt")
    recipe = load_recipe("tiny", ["tokenizer.kind=dualtoken"])
    with pytest.raises(ValueError, match=r"teacher\.model\.kind=backbone: DualToken's checkpoints name the tower"):
        import_weights(tmp_path / "any.pt", recipe, tmp_path / "out.safetensors")


def refusal(path: Path, out: Path) -> str:
    with pytest.raises(ValueError, match=re.escape(path.name)) as refused:
        import_weights(path, load_recipe("tiny", SIZES), out)
    return str(refused.value)


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, reference: Reference) -> None:
    torch.save({"model": reference.state}, tmp_path / "vq.pt")
    (tmp_path / "vq.pt").write_bytes((tmp_path / "vq.pt").read_bytes()[:5000])
    (tmp_path / "text.pt").write_bytes(b"hello, I am a page that says 404")  # a KeyError of the unpickler
    (tmp_path / "empty.pt").touch()
    save_file(reference.state, tmp_path / "vq.safetensors")
    (tmp_path / "vq.safetensors").write_bytes((tmp_path / "vq.safetensors").read_bytes()[:5000])
    for name in ("vq.pt", "text.pt", "empty.pt", "vq.safetensors"):
        message = refusal(tmp_path / name, tmp_path / "out.safetensors")
        assert re.search(rf"checkpoint='.*{name}' is damaged, or no weights: .+; fetch the file again", message), name
    assert "does not exist" in refusal(tmp_path / "missing.pt", tmp_path / "out.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    assert "holds a list, no state dict" in refusal(tmp_path / "list.pt", tmp_path / "out.safetensors")


def test_a_training_checkpoint_with_its_arguments_is_not_called_damaged(tmp_path: Path, reference: Reference) -> None:
    """LlamaGen saves `args`, a Namespace, beside the weights."""
    torch.save({"model": reference.state, "steps": 3, "args": Namespace(lr=1e-4)}, tmp_path / "vq.pt")
    message = refusal(tmp_path / "vq.pt", tmp_path / "out.safetensors")
    assert "holds more than tensors (argparse.Namespace)" in message and "damaged" not in message
    remedy = re.search(r"with (torch\.save\(.*\))$", message)
    assert remedy, message
    exec(remedy[1], {"torch": torch, "FILE": tmp_path / "vq.pt", "NEW": tmp_path / "tensors.pt"})
    import_weights(tmp_path / "tensors.pt", load_recipe("tiny", SIZES), tmp_path / "out.safetensors")


def test_damaged_weights_of_a_recipe_are_refused_by_field(tiny_run: TinyRun, tmp_path: Path) -> None:
    store = tiny_run.store_before("train_tokenizer", tmp_path / "store")
    damaged, other = tmp_path / "damaged.safetensors", tmp_path / "other.safetensors"
    damaged.write_bytes(b"no header")
    save_file({"layer.weight": torch.zeros(2)}, other)
    vgg = "tokenizer.loss.perceptual=lpips"
    cases = {
        r"tokenizer\.weights='.*' is damaged, or no weights": [f"tokenizer.weights={damaged}"],
        r"tokenizer\.weights='.*' are not those of this recipe's tokenizer: .*Missing key.*encoder": [
            f"tokenizer.weights={other}"
        ],
        r"tokenizer\.loss\.lpips_vgg_weights='.*' is damaged, or no weights": [
            vgg,
            f"tokenizer.loss.lpips_vgg_weights={damaged}",
        ],
        r"tokenizer\.loss\.lpips_vgg_weights has no `features.0.bias`": [
            vgg,
            f"tokenizer.loss.lpips_vgg_weights={other}",
        ],
    }
    for message, overrides in cases.items():
        with pytest.raises(ValueError, match=message):
            run_stage("train_tokenizer", load_recipe("tiny", [*VQGAN, *overrides]), store, LocalExecutor())


@pytest.mark.parametrize(
    ("override", "message"),
    [("tokenizer.steps=0", "trains nothing"), ("tokenizer.weights=nowhere.safetensors", "import-tokenizer")],
)
def test_weights_that_are_not_there_are_refused(tiny_run: TinyRun, tmp_path: Path, override: str, message: str) -> None:
    store = tiny_run.store_before("train_tokenizer", tmp_path / "store")
    with pytest.raises(ValueError, match=message):
        run_stage("train_tokenizer", load_recipe("tiny", [*VQGAN, override]), store, LocalExecutor())
