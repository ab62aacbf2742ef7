"""Teacher artifacts: they build the teacher again with nothing but the store."""

from __future__ import annotations

import dataclasses
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.executors import LocalExecutor
from models.teachers.backbone import BackboneTeacher, BackboneTeacherConfig
from models.teachers.teacher import OpenClipTeacher, OpenClipTeacherConfig, Teacher, TransformersTeacher
from stages.artifacts.models import load_teacher, read_json
from stages.pipeline.execution import StageResult, run_stage
from stages.pipeline.recipe import load_recipe
from stages.prepare_teacher import stage as prepare_teacher
from stages.prepare_teacher.stage import STAGE, PrepareTeacherConfig
from stages.runtime import devices
from stages.runtime.devices import with_precision
from storage.digests import canonical_json
from storage.store import Store
from tests.helpers.tiny import TinyRun
from tests.helpers.word_tokenizer import save_word_tokenizer

TEXTS = ["a cat", "dog"]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks a hub fails at once, whether or not this machine has one."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1


def prepare(store: Store, model: str) -> StageResult:
    return run_stage("prepare_teacher", load_recipe("tiny", [f"teacher.model={model}"]), store, LocalExecutor())


def write_open_clip(folder: Path, *, hf_text: bool = False, tokenizer: bool = True) -> Path:
    """A small random model in open_clip's layout, with a tokenizer of its own."""
    import open_clip

    folder.mkdir(parents=True)
    text: dict[str, Any] = {"context_length": 16, "vocab_size": 6, "width": 32, "heads": 2, "layers": 1}
    if hf_text:
        from transformers import BertConfig

        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        BertConfig(vocab_size=6, max_position_embeddings=16, **sizes).save_pretrained(folder / "bert")
        text = {
            "hf_model_name": str(folder / "bert"),
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
            "context_length": 16,
        }
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": text | {"hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"clean": "canonicalize"}},
    }
    preprocessing = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    described = {"model_cfg": config, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    if tokenizer:
        save_word_tokenizer(folder, 16)
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def check_without_path(store: Store, result: StageResult, folder: Path) -> None:
    assert str(folder).encode() not in result.manifest.to_bytes()
    for entry in result.manifest.files:
        assert str(folder).encode() not in store.read_bytes(entry), f"{entry.path} names a place of this machine"


def check_same(found: Teacher, wanted: Teacher, images: Tensor) -> None:
    assert torch.equal(found.features(images, (4, 4)), wanted.features(images, (4, 4)))
    assert torch.equal(found.embed_images(images), wanted.embed_images(images))
    assert torch.equal(found.embed_texts(TEXTS), wanted.embed_texts(TEXTS))


@torch.no_grad()
@pytest.mark.parametrize("hf_text", [False, True])
def test_an_open_clip_teacher_outlives_its_folder(
    tiny_run: TinyRun, tmp_path: Path, images: Tensor, hf_text: bool
) -> None:
    folder = write_open_clip(tmp_path / "model", hf_text=hf_text)
    wanted = OpenClipTeacher(OpenClipTeacherConfig(name=f"local-dir:{folder}")).freeze()
    assert wanted.normalisation.interpolation == "bilinear", "as its config says"
    assert isinstance(wanted, OpenClipTeacher)
    assert wanted.tokenizer(TEXTS).shape == (2, 16)
    store = tiny_run.store_before("prepare_teacher", tmp_path / "store")
    result = prepare(store, f"{{kind: open_clip, name: 'local-dir:{folder}', pretrained: null}}")
    check_without_path(store, result, folder)
    shutil.rmtree(folder)
    found = load_teacher(store, result.manifest)
    assert isinstance(found, OpenClipTeacher)
    assert found.normalisation == wanted.normalisation
    check_same(found, wanted, images)
    assert "name" not in read_json(store, result.manifest, "teacher.json")["config"]


def test_a_tokenizer_that_cannot_be_had_ends_it_early(tiny_run: TinyRun, tmp_path: Path) -> None:
    folder = write_open_clip(tmp_path / "model", tokenizer=False)
    store = tiny_run.store_before("prepare_teacher", tmp_path / "store")
    with pytest.raises(ValueError, match=r"teacher\.model\.name='local-dir:.*its text tokenizer .* cannot be fetched"):
        prepare(store, f"{{kind: open_clip, name: 'local-dir:{folder}', pretrained: null}}")


@torch.no_grad()
def test_artifacts_that_name_their_open_clip_model_still_load(
    tiny_run: TinyRun, tmp_path: Path, images: Tensor
) -> None:
    """As they were before they had a folder."""
    folder = write_open_clip(tmp_path / "model")
    store = tiny_run.store_before("prepare_teacher", tmp_path / "store")
    name = f"local-dir:{folder}"
    manifest = prepare(store, f"{{kind: open_clip, name: '{name}', pretrained: null}}").manifest
    old = {"config": {"kind": "open_clip", "name": name}, "words": []}
    files = [store.put_bytes(canonical_json(old), "teacher.json"), manifest.file("weights.safetensors")]
    found = load_teacher(store, dataclasses.replace(manifest, files=files))
    check_same(found, load_teacher(store, manifest), images)


@pytest.mark.parametrize(("resample", "interpolation"), [(2, "bilinear"), (3, "bicubic")])
def test_a_transformers_teacher_keeps_how_it_resizes(
    tiny_run: TinyRun, tmp_path: Path, resample: int, interpolation: str, images: Tensor
) -> None:
    folder = write_siglip(tmp_path / "model", resample)
    store = tiny_run.store_before("prepare_teacher", tmp_path / "store")
    result = prepare(store, f"{{kind: transformers, path: '{folder}'}}")
    check_without_path(store, result, folder)
    shutil.rmtree(folder)
    found = load_teacher(store, result.manifest)
    assert isinstance(found, TransformersTeacher) and found.normalisation.interpolation == interpolation
    # an artifact of before does not say so, and its tokenizers were trained on images resized with bicubic
    description = read_json(store, result.manifest, "teacher.json")
    assert ("interpolation" in description) == (interpolation != "bicubic")
    old = store.put_bytes(canonical_json({"config": description["config"], "words": []}), "teacher.json")
    files = [entry for entry in result.manifest.files if entry.path != "teacher.json"]
    loaded = load_teacher(store, dataclasses.replace(result.manifest, files=[*files, old]))
    assert isinstance(loaded, TransformersTeacher) and loaded.normalisation.interpolation == "bicubic"


def write_siglip(folder: Path, resample: int) -> Path:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 6, "max_position_embeddings": 10, "pad_token_id": 0, "eos_token_id": 5}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(folder)
    SiglipImageProcessor(resample=resample).save_pretrained(folder)
    save_word_tokenizer(folder, 10)
    return folder


def prepared(model: str, folder: Path) -> None:
    """Run the stage for a published teacher, which needs no image."""
    config = load_recipe("tiny", [f"teacher.model={model}"]).teacher
    context: Any = SimpleNamespace(config=config, scratch=folder / "scratch", store=Store(str(folder / "store")))
    prepare_teacher.run(context)


def test_weights_that_are_no_numbers_do_not_become_a_teacher(tmp_path: Path) -> None:
    siglip, clip = write_siglip(tmp_path / "siglip", 2), write_open_clip(tmp_path / "clip")
    for path in (siglip / "model.safetensors", clip / "open_clip_model.safetensors"):
        state = load_file(path)
        name = min(name for name, value in state.items() if value.is_floating_point())
        save_file(state | {name: torch.full_like(state[name], torch.inf)}, path, {"format": "pt"})
    for model in (
        f"{{kind: transformers, path: '{siglip}'}}",
        f"{{kind: open_clip, name: 'local-dir:{clip}'}}",
    ):
        with pytest.raises(
            ValueError, match=r"the teacher '.*' holds NaN or infinite values in 1 of .*take other weights"
        ):
            prepared(model, tmp_path)


def test_a_folder_of_open_clip_without_weights_is_no_random_teacher(tmp_path: Path) -> None:
    folder = write_open_clip(tmp_path / "clip")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"teacher\.model\.name='local-dir:.*cannot be read .*weights.*fetch its files"
    ):
        prepared(f"{{kind: open_clip, name: 'local-dir:{folder}'}}", tmp_path)


def test_only_published_teachers_have_a_version_of_their_own() -> None:
    """Keys of backbones are those of artifacts that exist."""
    external = STAGE.external_inputs
    assert external is not None
    assert set(external(PrepareTeacherConfig())) == {"backbone_weights"}
    assert set(external(PrepareTeacherConfig(model=OpenClipTeacherConfig()))) == {"layout"}


class Pictures:
    """Images of an `ImageSource`."""

    def __init__(self, count: int) -> None:
        self.all = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def pixels(self, rows: list[int]) -> Tensor:
        return self.all[rows]


def features(device: str, precision: str, count: int = 20) -> Tensor:
    torch.manual_seed(0)
    config = BackboneTeacherConfig(input_size=32, head=None)
    teacher = BackboneTeacher(config, None, None).freeze()
    assert isinstance(teacher, BackboneTeacher)
    source: Any = Pictures(count)
    return prepare_teacher._features(teacher, source, count, torch.device(device), precision)


def test_on_a_cpu_the_backbone_computes_in_float32_unless_bf16_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "native_precision", lambda device: "bf16")
    assert with_precision(load_recipe("tiny").teacher, {}).precision == "fp32"
    found = features("cpu", "fp32", 1)  # more would take long where bf16 is emulated
    assert found.dtype == torch.bfloat16 and found.shape[:2] == (2, 1)
    assert not torch.equal(found, features("cpu", "bf16", 1))


def test_on_a_gpu_the_backbone_computes_there_in_the_precision_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`meta` has neither values nor the CPU's type, so it stands for a GPU; a real one comes after."""
    asked: list[tuple[str, str]] = []
    seen: list[str] = []

    def stand_in(device: torch.device, precision: str) -> Any:
        asked.append((device.type, precision))
        return nullcontext()

    def raw(self: BackboneTeacher, images: Tensor, grid: tuple[int, int]) -> Tensor:
        seen.extend([images.device.type, next(self.backbone.parameters()).device.type])
        return torch.zeros(len(images), *grid, 4)

    class Teacher:
        backbone = torch.nn.Linear(1, 1)
        native_grid = (2, 2)
        raw_features = raw

    monkeypatch.setattr(Teacher.backbone, "cpu", lambda: seen.append("back"))  # what is on `meta` has no way back
    monkeypatch.setattr(prepare_teacher, "autocast", stand_in)
    source: Any = Pictures(3)
    teacher: Any = Teacher()
    prepare_teacher._features(teacher, source, 3, torch.device("meta"), "bf16")
    assert "features of training images: 100%" in capsys.readouterr().err, "it says how far it is"
    assert asked == [("meta", "bf16")] * 2
    assert seen == ["meta"] * 4 + ["back"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("precision", "largest"), [("fp32", 0.05), ("bf16", 0.5)])
def test_a_gpus_features_are_a_cpus(precision: str, largest: float) -> None:
    found = features("cuda", precision)
    assert found.device.type == "cpu"
    assert float((found.float() - features("cpu", "fp32").float()).abs().max()) < largest
    assert precision != "bf16" or not torch.equal(found, features("cuda", "fp32"))


def test_the_recipes_device_and_precision_arrive(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[torch.device, str]] = []

    def stop(teacher: Any, source: Any, count: int, device: torch.device, precision: str) -> Tensor:
        given.append((device, precision))
        raise ValueError("seen")

    monkeypatch.setattr(prepare_teacher, "_features", stop)
    monkeypatch.setattr(prepare_teacher, "resolve_device", lambda name: torch.device(f"{name}:3"))
    store = tiny_run.store_before("prepare_teacher", tmp_path / "store")
    recipe = load_recipe("tiny", ["teacher.device=cuda", "teacher.precision=fp32"])
    with pytest.raises(ValueError, match="seen"):
        run_stage("prepare_teacher", recipe, store, LocalExecutor())
    assert given == [(torch.device("cuda:3"), "fp32")]
