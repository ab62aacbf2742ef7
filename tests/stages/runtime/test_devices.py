"""What `precision: auto` is resolved to, where that stands, and what an explicit bf16 costs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.executors import LocalExecutor
from stages.pipeline.execution import find_artifacts, run_stage
from stages.pipeline.recipe import STAGES, load_recipe
from stages.pipeline.recipe_files import available_recipes
from stages.prepare_teacher import stage as prepare_teacher
from stages.runtime import devices
from stages.runtime.devices import acceptable_precisions, autocast, native_precision, with_precision
from storage.manifest import Manifest
from tests.helpers.tiny import TinyRun

COMPUTING = ("teacher", "tokenizer", "tokenize", "pretrain", "sft", "evaluate")


def cpu(monkeypatch: pytest.MonkeyPatch, **flags: Any) -> None:
    """A CPU with these flags in place of this machine's, and no GPU."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"} | flags)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    native_precision.cache_clear()


@pytest.fixture(autouse=True)
def _forget() -> Any:
    yield
    native_precision.cache_clear()


def manifest(stage: str, **config: Any) -> dict[str, Manifest]:
    return {stage: Manifest("tokenizer", 1, stage, config, {}, (), {}, {})}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2": True}, "fp32"),
        ({"avx2": True, "avx512_f": True, "avx512_bw": True}, "fp32"),
        ({"avx512_f": True, "avx512_bf16": True}, "bf16"),
        ({"amx_tile": True, "amx_bf16": True}, "bf16"),
        ({"amx_tile": True}, "fp32"),
    ],
)
def test_auto_on_a_cpu_is_bf16_only_where_the_processor_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], expected: str
) -> None:
    cpu(monkeypatch, **flags)
    recipe = load_recipe("tiny")
    for section in COMPUTING:
        assert getattr(recipe, section).precision == "auto"
        resolved = with_precision(getattr(recipe, section), {}).precision
        assert resolved == ("fp32" if section == "teacher" else expected), section


@pytest.mark.parametrize(("speedup", "expected"), [(0.1, "fp32"), (1.05, "fp32"), (1.7, "bf16")])
def test_where_no_flag_tells_a_measurement_does(monkeypatch: pytest.MonkeyPatch, speedup: float, expected: str) -> None:
    cpu(monkeypatch, architecture="aarch64")
    monkeypatch.setattr(devices, "bf16_speedup", lambda: speedup)
    assert native_precision("cpu") == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_gpu_is_bf16_where_it_is_not_emulated(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: str
) -> None:
    cpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    for section in COMPUTING:
        config = load_recipe("tiny", [f"{section}.gpus_per_worker=1"] if section == "tokenize" else []).section(
            next(stage for stage in STAGES.values() if stage.section == section)
        )
        assert with_precision(config, {}).precision == expected, section


def test_workers_with_a_gpu_count_as_one_where_this_process_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(monkeypatch)
    shared = ["pretrain.num_processes=2", "pretrain.gpus_per_worker=1", "evaluate.gpus_per_worker=0.5"]
    recipe = load_recipe("tiny", [*shared, "tokenize.gpus_per_worker=1"])
    for section in ("pretrain", "tokenize", "evaluate"):
        assert with_precision(getattr(recipe, section), {}).precision == "bf16"


def test_an_explicit_precision_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(monkeypatch)
    for name in ("bf16", "fp32"):
        config = load_recipe("tiny", [f"sft.precision={name}"]).sft
        assert acceptable_precisions(config, {}) == [config]


def test_no_recipe_that_ships_asks_for_bf16_where_it_may_be_emulated() -> None:
    for name in available_recipes():
        recipe = load_recipe(name)
        assert {getattr(recipe, section).precision for section in COMPUTING} == {"auto"}, name


def test_weights_taken_as_imported_are_measured_and_encoded_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(monkeypatch, avx512_bf16=True)
    imported = manifest("train_tokenizer", steps=0)
    recipe = load_recipe("tiny", ["tokenizer.kind=vqgan", "tokenizer.steps=0", "tokenizer.weights=theirs.safetensors"])
    assert [config.precision for config in acceptable_precisions(recipe.tokenizer, {})] == ["fp32"]
    for config in (recipe.tokenize, recipe.evaluate):
        assert [found.precision for found in acceptable_precisions(config, imported)] == ["fp32"]
        assert with_precision(config, manifest("train_tokenizer", steps=900)).precision == "bf16"
    told = load_recipe("tiny", ["tokenize.precision=bf16"]).tokenize
    assert with_precision(told, imported).precision == "bf16", "unless told otherwise"


def test_the_manifest_and_the_key_hold_what_auto_was_resolved_to(tiny_run: TinyRun) -> None:
    expected = native_precision("cpu")
    for name, result in tiny_run.results.items():
        if name != "download":
            assert result.manifest.config["precision"] == ("fp32" if name == "prepare_teacher" else expected)
    changes = [f"{section}.precision={expected}" for section in COMPUTING if section != "teacher"]
    explicit = load_recipe("tiny", [*changes, "teacher.precision=fp32"])
    found = find_artifacts(explicit, tiny_run.store)
    assert {name: manifest and manifest.digest for name, manifest in found.items()} == {
        name: result.digest for name, result in tiny_run.results.items()
    }


def test_what_another_machine_made_is_a_result_here_too(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    if native_precision("cpu") == "fp32":
        cpu(monkeypatch, avx512_bf16=True)
    else:
        cpu(monkeypatch)
    assert native_precision("cpu") != tiny_run.results["sft"].manifest.config["precision"]
    for name, result in tiny_run.results.items():
        again = run_stage(name, tiny_run.recipe, tiny_run.store, LocalExecutor())
        assert again.hit and again.digest == result.digest


def test_an_explicit_bf16_on_a_cpu_that_emulates_it_says_how_slow_that_is(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu(monkeypatch)
    monkeypatch.setattr(devices, "bf16_speedup", lambda: 1 / 17)
    store = tiny_run.store_before("prepare_teacher", tmp_path / "store")
    monkeypatch.setattr(prepare_teacher, "_features", _stop)
    with caplog.at_level(logging.WARNING):
        for precision, num_warnings in {"fp32": 0, "auto": 0, "bf16": 1}.items():
            recipe = load_recipe("tiny", [f"teacher.precision={precision}", "teacher.steps=1"])
            with pytest.raises(ValueError, match="the stage has begun"):
                run_stage("prepare_teacher", recipe, store, LocalExecutor())
            assert len(caplog.records) == num_warnings, precision
    said = caplog.text
    assert "teacher.precision=bf16" in said and "17 times slower" in said and "set it to auto or fp32" in said


def test_the_measured_factor_is_of_both_types_on_this_cpu() -> None:
    assert 0.001 < devices.bf16_speedup() < 20


def test_autocast_takes_no_unresolved_precision() -> None:
    with pytest.raises(AssertionError), autocast(torch.device("cpu"), "auto"):
        pass


def _stop(*arguments: Any) -> Any:
    raise ValueError("the stage has begun")
