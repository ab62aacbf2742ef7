"""What the store decides: hits, what a change re-runs, what verify finds and the next run repairs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infra.executors import LocalExecutor, RayExecutor
from models.config import Config
from models.language.vlm import LlmConfig
from models.teachers.backbone import BackboneTeacherConfig
from models.teachers.teacher import OpenClipTeacherConfig, TransformersTeacherConfig
from models.tokenizers.losses import LossConfig
from stages.pipeline import execution
from stages.pipeline.execution import MissingInput, check_ready, find_artifacts, run_stage
from stages.pipeline.recipe import STAGES, load_recipe
from stages.protocol import normalised_config
from storage.manifest import Manifest
from storage.store import Store
from tests.helpers.tiny import TinyRun


def test_second_run_is_all_hits(tiny_run: TinyRun) -> None:
    for name, first in tiny_run.results.items():
        again = run_stage(name, tiny_run.recipe, tiny_run.store, LocalExecutor())
        assert again.hit
        assert again.digest == first.digest


@pytest.mark.parametrize(
    ("override", "rerun"),
    [
        ("sft.steps=31", {"sft", "evaluate"}),
        ("evaluate.num_choices=3", {"evaluate"}),
        ("tokenize.views.flip=false", {"tokenize", "pretrain", "sft", "evaluate"}),
        ("tokenizer.kind=vqgan", {"train_tokenizer", "tokenize", "pretrain", "sft", "evaluate"}),
        ("seed=1", set(STAGES)),
        ("tokenize.num_workers=7", set()),
        ("pretrain.checkpoint_every=3", set()),
    ],
)
def test_change_of_one_field_reruns_what_depends_on_it(tiny_run: TinyRun, override: str, rerun: set[str]) -> None:
    changed = load_recipe("tiny", [override])
    found = find_artifacts(changed, tiny_run.store)
    assert {name for name, manifest in found.items() if manifest is None} == rerun


def test_stage_without_its_inputs_names_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="run `musevl stage download` with the same recipe"):
        run_stage("prepare_teacher", load_recipe("tiny"), Store(str(tmp_path / "store")), LocalExecutor())


def test_runtime_fields_stay_out_of_the_key() -> None:
    config = load_recipe("tiny").tokenizer
    changed = config.model_copy(update={"checkpoint_every": 3, "device": "cpu", "tensorboard": "events"})
    assert normalised_config(config) == normalised_config(changed)
    assert normalised_config(config) != normalised_config(config.model_copy(update={"steps": 31}))


@pytest.mark.parametrize("place", ["file", "folder"])
@pytest.mark.parametrize(
    ("config_class", "field", "before"),
    [
        (TransformersTeacherConfig, "path", ""),
        (OpenClipTeacherConfig, "pretrained", ""),
        (OpenClipTeacherConfig, "name", "local-dir:"),
        (BackboneTeacherConfig, "weights", ""),
        (LossConfig, "lpips_vgg_weights", ""),
        (LlmConfig, "base", ""),
    ],
)
def test_given_weights_count_by_their_content_and_not_by_their_place(
    config_class: type[Config], field: str, before: str, place: str, tmp_path: Path
) -> None:
    def put(name: str, content: bytes) -> Path:
        path = tmp_path / name / "weights" if place == "folder" else tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return tmp_path / name

    def key(value: Path) -> object:
        return normalised_config(config_class(**{field: f"{before}{value}"}))

    # a name that exists is no pattern
    one, same, other = put("weights [1]*?", b"weights"), put("same", b"weights"), put("other", b"others")
    assert key(one) == key(same) != key(other)
    first = key(one)
    put("weights [1]*?", b"edited")
    assert key(one) != first
    assert str(tmp_path) not in str(first)


def test_names_of_a_hub_count_as_they_stand() -> None:
    names = ["google/siglip2-base-patch16-256", "google/siglip-base-patch16-256"]
    keys = [normalised_config(TransformersTeacherConfig(path=name)) for name in names]
    assert [key["path"] for key in keys] == names


def test_threads_of_the_caller_do_not_reach_the_result(tiny_run: TinyRun, tmp_path: Path) -> None:
    before, ambient = torch.get_num_threads(), 2
    assert before != ambient
    torch.set_num_threads(ambient)
    try:
        store = tiny_run.store_before("prepare_teacher", tmp_path / "store")
        result = run_stage("prepare_teacher", tiny_run.recipe, store, LocalExecutor())
        assert torch.get_num_threads() == ambient
    finally:
        torch.set_num_threads(before)
    assert result.digest == tiny_run.results["prepare_teacher"].digest


def test_flipped_byte_is_found_and_repaired_by_the_next_run(tiny_run: TinyRun, tmp_path: Path) -> None:
    store = tiny_run.store_before("pretrain", tmp_path / "store")
    table = tiny_run.results["tokenize"].manifest
    entry = table.files_under("codes")[0]
    blob = store.fetch(entry)
    os.chmod(blob, 0o644)
    damaged = bytearray(blob.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    blob.write_bytes(damaged)

    problems = store.verify()
    assert [(problem.digest, problem.path) for problem in problems] == [(table.digest, entry.path)]
    again = run_stage("tokenize", tiny_run.recipe, store, LocalExecutor())
    assert not again.hit
    assert again.digest == table.digest
    assert store.verify() == []


def test_evaluation_refuses_codes_of_another_tokenizer(tiny_run: TinyRun) -> None:
    from storage.code_table import check_tokenizer, read_info
    from storage.errors import TokenizerMismatch

    table = tiny_run.results["tokenize"].manifest
    info = read_info(tiny_run.store.fetch(table.files_under("codes")[0]))
    check_tokenizer(info, tiny_run.results["train_tokenizer"].digest)
    with pytest.raises(TokenizerMismatch, match=info.tokenizer_digest[:12]):
        check_tokenizer(info, "0" * 64)


@pytest.mark.processes
def test_exported_model_gives_the_same_logits_without_our_code(tiny_run: TinyRun, tmp_path: Path) -> None:
    import torch

    from stages.language.training import load_vlm

    manifest = tiny_run.results["sft"].manifest
    vlm, builder = load_vlm(tiny_run.store, manifest)
    text = "What is in the picture?<|soi|><|code_0|><|code_63|><|eoi|>"
    token_ids = builder.tokenizer.encode(text, add_special_tokens=False)
    assert token_ids[-3:-1] == [builder.vocabulary.first_code, builder.vocabulary.first_code + 63]
    with torch.no_grad():
        expected = vlm.llm(torch.tensor([token_ids])).logits
    torch.save(expected, tmp_path / "expected.pt")
    tiny_run.store.materialise(manifest, tmp_path, "model")
    script = f"""
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32).eval()
ids = AutoTokenizer.from_pretrained("model")({text!r}, add_special_tokens=False, return_tensors="pt").input_ids
with torch.no_grad():
    found = model(ids).logits
assert torch.equal(found, torch.load("expected.pt", weights_only=True))
assert not any(name.split(".")[0] in ("stages", "models", "storage") for name in sys.modules)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_measured_rows_carry_what_is_needed_to_compare(tiny_run: TinyRun) -> None:
    from storage.tables import read_metrics

    found = read_metrics(tiny_run.store.fetch(tiny_run.results["evaluate"].manifest.file("metrics.parquet")))
    rows = {(row["role"], row["metric"], row["qualifier"]): row for row in found}
    assert {"psnr", "ssim", "ssim_llamagen", "codebook_usage", "accuracy", "recognition"} <= {
        metric for _, metric, _ in rows
    }
    assert {(role, row["model"]) for (role, *_), row in rows.items()} == {
        ("ours", "sde"),
        ("baseline", "raw-pixel prototypes"),
        ("ceiling", "teacher"),
        ("ceiling", "real images"),
    }
    ssim = rows["ours", "ssim", ""]["settings"]
    assert (ssim["window"], ssim["data_range"]) == ("11x11 Gaussian, sigma 1.5", 1.0)
    drawing = rows["ours", "recognition", ""]["settings"]
    assert drawing["guidance_convention"] == "u + s(c - u)"
    assert drawing["sampling"]["guidance"] == 2.0
    accuracy = rows["ours", "accuracy", "same_category"]
    assert accuracy["ci_low"] <= accuracy["value"] <= accuracy["ci_high"]
    assert accuracy["num_samples"] == 22


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.device=cuda", "sft.device=cuda needs a GPU, and PyTorch finds none on this machine; set sft.device"),
        ("teacher.device=cuda", "teacher.device=cuda needs a GPU"),
        ("evaluate.device=cuda", "evaluate.device=cuda needs a GPU"),
        ("tokenize.gpus_per_worker=0.5", "tokenize.gpus_per_worker=0.5 needs a GPU"),
        ("tokenizer.weights=/nonexistent", "tokenizer.weights='/nonexistent' does not exist"),
        ("evaluate.inception_weights=/nonexistent", "/nonexistent"),
    ],
)
def test_what_a_stage_lacks_is_said_before_any_work(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    store = Store(str(tmp_path))
    check_ready(load_recipe("tiny"), store, LocalExecutor())
    with pytest.raises(ValueError, match=re.escape(message)):
        check_ready(load_recipe("tiny", [override]), store, LocalExecutor())


def test_a_gpu_of_the_cluster_is_not_looked_for_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    recipe = load_recipe("tiny", ["evaluate.device=cuda", "tokenize.gpus_per_worker=1"])
    check_ready(recipe, Store(str(tmp_path)), RayExecutor())
    with pytest.raises(ValueError, match="sft.device=cuda needs a GPU"):  # which trains in this process
        check_ready(load_recipe("tiny", ["sft.device=cuda"]), Store(str(tmp_path)), RayExecutor())


def test_a_finished_stage_needs_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = load_recipe("tiny", ["sft.device=cuda"])
    made = {name: Manifest("stub", 1, name, {}, {}, (), {}, {}) for name in STAGES}
    monkeypatch.setattr(execution, "find_artifacts", lambda *_: made)
    check_ready(recipe, Store(str(tmp_path)), LocalExecutor())
