"""Published weights become a tokenizer artifact."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from infra.executors import LocalExecutor
from stages.artifacts.models import load_tokenizer, read_state
from stages.pipeline.execution import run_stage
from stages.pipeline.import_tokenizer import import_weights
from stages.pipeline.recipe import load_recipe
from tests.helpers import dualtoken
from tests.helpers.dualtoken import DualTokenReference
from tests.helpers.llamagen import Reference
from tests.helpers.tiny import TinyRun

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
    assert result.manifest.metrics["reconstruction"]["psnr"] > 0

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
    state = {f"module.{name}": value for name, value in theirs.state.items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "epoch_3.pt")
    given = dualtoken_overrides(theirs.folder)
    import_weights(tmp_path / "epoch_3.pt", load_recipe("tiny", given), tmp_path / "dualtoken.safetensors")
    recipe = load_recipe("tiny", [*given, f"tokenizer.weights={tmp_path}/dualtoken.safetensors", "tokenizer.steps=0"])
    store = tiny_run.store_before("prepare_teacher", tmp_path / "store")
    run_stage("prepare_teacher", recipe, store, LocalExecutor())
    result = run_stage("train_tokenizer", recipe, store, LocalExecutor())
    tokenizer = load_tokenizer(store, result.digest)
    assert torch.equal(tokenizer.encode(theirs.images), theirs.encode(theirs.images).codes)
    metrics = result.manifest.metrics
    assert "frechet_teacher" in metrics["reconstruction"]
    assert "zero_shot_accuracy.top1" in metrics["zero_shot"] and metrics["teacher"]["zero_shot"]


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


def imported(checkpoint: Any, folder: Path, which: str | None = None) -> tuple[dict[str, torch.Tensor], str]:
    """What becomes of a checkpoint, and which of its weights were taken."""
    torch.save(checkpoint, folder / "vq.pt")
    taken = import_weights(folder / "vq.pt", load_recipe("tiny", SIZES), folder / "out.safetensors", which)
    return read_state(folder / "out.safetensors"), taken


def test_averaged_weights_are_taken_and_said_unless_others_are_asked_for(tmp_path: Path, reference: Reference) -> None:
    """LlamaGen's trainings hold both and, as Namespace, their arguments; its own loaders prefer `ema`."""
    averaged = {name: value + 1 for name, value in reference.state.items()}
    state = {f"module._orig_mod.{name}": value for name, value in reference.state.items()}
    training = {"model": state, "ema": averaged, "optimizer": {"state": {}}, "args": Namespace(lr=1)}
    name = "decoder.to_rgb.bias"
    last, mean = reference.state["decoder.conv_out.bias"], averaged["decoder.conv_out.bias"]
    weights, taken = imported(training, tmp_path)
    assert torch.equal(weights[name], mean) and taken == "took the weights under 'ema'; the file also has 'model'"
    weights, taken = imported(training, tmp_path, which="model")
    assert torch.equal(weights[name], last) and taken == "took the weights under 'model'; the file also has 'ema'"
    with pytest.raises(ValueError, match=r"vq\.pt' holds no weights under the key 'best'; it has model, ema"):
        imported(training, tmp_path, which="best")


def test_weights_that_are_no_numbers_are_refused_by_file(tmp_path: Path, reference: Reference) -> None:
    bad = {**reference.state, "quantize.embedding.weight": torch.full((24, 4), torch.nan)}
    with pytest.raises(ValueError, match=r"vq\.pt' holds NaN or infinite values in 1 of \d+ tensors \(quantize"):
        imported({"module.model": 1, "state_dict": bad}, tmp_path)


class Program:
    """What a malicious checkpoint holds: unpickled, it runs a command."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self.function, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize("function", [os.system, eval, exec, Path], ids=lambda function: function.__name__)
def test_code_in_a_checkpoint_is_refused_without_advice_to_run_it(
    tmp_path: Path, reference: Reference, function: Any
) -> None:
    torch.save({"model": reference.state, "extra": Program(function)}, tmp_path / "vq.pt")
    message = refusal(tmp_path / "vq.pt", tmp_path / "out.safetensors")
    assert re.search(r"holds more than tensors \([\w.]+\), and to load such a thing can run code", message)
    assert "damaged" not in message and "weights_only" not in message and "allowlist" not in message


def test_files_that_are_no_weights_are_called_what_they_are(tmp_path: Path) -> None:
    """None of the messages passes on torch's advice to load the file unsafely."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 287920306\n"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(tmp_path / "program.pt"))
    (tmp_path / "folder.pt").mkdir()
    for name, content, message in (
        ("pointer.pt", pointer, "is a git-LFS pointer .* run `git lfs pull`"),
        ("pointer.safetensors", pointer, "is a git-LFS pointer"),
        ("page.pt", b"\n<!DOCTYPE html><html>Not found</html>", "is a web page, no weights"),
        ("program.pt", None, "is a TorchScript program, no weights"),
        ("folder.pt", None, "is a folder; give the path of the .safetensors or .pth file in it"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        said = refusal(tmp_path / name, tmp_path / "out.safetensors")
        assert re.search(message, said) and "weights_only" not in said and "operand" not in said, said


def test_what_a_file_is_shows_in_its_content_not_in_its_name(tmp_path: Path, reference: Reference) -> None:
    save_file(reference.state, tmp_path / "vq.bin")
    torch.save(reference.state, tmp_path / "vq.safetensors")
    for name in ("vq.bin", "vq.safetensors"):
        assert torch.equal(read_state(tmp_path / name)["quant_conv.bias"], reference.state["quant_conv.bias"])


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


def test_a_kind_whose_checkpoints_nobody_published_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no published checkpoint of tokenizer.kind=sde"):
        import_weights(tmp_path / "checkpoint.pt", load_recipe("tiny"), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
