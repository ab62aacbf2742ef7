"""Published models that cannot be read: each is refused in one line that names the field and what to do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.language.vlm import LlmConfig, build_small_llm, load_base_llm
from models.language.vocabulary import extend_tokenizer, train_bpe
from models.published import reading_published
from models.teachers.teacher import (
    OpenClipTeacher,
    OpenClipTeacherConfig,
    TransformersTeacher,
    TransformersTeacherConfig,
)
from tests.helpers.word_tokenizer import save_word_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks a hub fails at once, whether or not this machine has one."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SigLIP as transformers writes it."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    folder = tmp_path_factory.mktemp("siglip")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 6, "max_position_embeddings": 10, "pad_token_id": 0, "eos_token_id": 5}
    SiglipModel(
        SiglipConfig(vision_config=sizes | {"image_size": 32, "patch_size": 8}, text_config=text)
    ).save_pretrained(folder)
    SiglipImageProcessor().save_pretrained(folder)
    save_word_tokenizer(folder, 10)
    return folder


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random language model as transformers writes it."""
    folder = tmp_path_factory.mktemp("lm")
    tokenizer = train_bpe(["a fox"], 300)
    vocabulary = extend_tokenizer(tokenizer, (4,), (1, 1, 2, 2))
    config = LlmConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32)
    build_small_llm(config, vocabulary).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:2000])


def changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, {"format": "pt"})

    return apply


def without(state: dict[str, torch.Tensor]) -> None:
    del state[max(state)]


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pointer": (
        lambda folder: (folder / WEIGHTS).write_text(POINTER),
        f"{WEIGHTS} is a git-LFS pointer .*git lfs pull",
    ),
    "cut": (cut, r"cannot be read \(.+\); fetch its files again"),
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        r"cannot be read \(.*model.safetensors.*; fetch its files",
    ),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), r"cannot be read \(.+\); fetch its files"),
    "lacks a tensor": (changed(without), r"cannot be read \(its weights lack 1 tensors .*\); fetch its files again"),
}


def damaged(good: Path, how: str, folder: Path) -> tuple[Path, str]:
    damage, message = DAMAGE[how]
    shutil.copytree(good, folder)
    damage(folder)
    return folder, message


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_teacher_is_refused_by_field_and_with_a_remedy(siglip: Path, tmp_path: Path, how: str) -> None:
    folder, message = damaged(siglip, how, tmp_path / "teacher")
    with pytest.raises(ValueError, match=rf"^teacher\.model\.path='{folder}'.*{message}"):
        TransformersTeacher(TransformersTeacherConfig(path=str(folder)))


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_language_model_is_refused_by_field_and_with_a_remedy(
    language_model: Path, tmp_path: Path, how: str
) -> None:
    folder, message = damaged(language_model, how, tmp_path / "lm")
    with pytest.raises(ValueError, match=rf"^pretrain\.llm\.base='{folder}'.*{message}"):
        load_base_llm(LlmConfig(base=str(folder)))


def test_a_language_model_with_weights_that_are_no_numbers_is_refused(language_model: Path, tmp_path: Path) -> None:
    shutil.copytree(language_model, tmp_path / "lm")
    changed(lambda state: state["model.norm.weight"].fill_(torch.nan))(tmp_path / "lm")
    with pytest.raises(ValueError, match=r"pretrain\.llm\.base=.*holds NaN or infinite values.*model\.norm\.weight"):
        load_base_llm(LlmConfig(base=str(tmp_path / "lm")))


def test_a_model_without_an_image_tower_is_no_teacher(language_model: Path) -> None:
    with pytest.raises(ValueError, match="it has no image tower; a teacher is a SigLIP"):
        TransformersTeacher(TransformersTeacherConfig(path=str(language_model)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "ViT-B-16-SigLIP3"},
            r"name='ViT-B-16-SigLIP3' is no model of open_clip; did you mean 'ViT-B-16-SigLIP",
        ),
        (
            {"name": "SigLIP"},
            r"`open_clip\.list_models\(\)` has the names, and one of a hub is written hf-hub:OWNER/NAME",
        ),
        ({"name": "ViT-B-16-SigLIP2", "pretrained": "webly"}, r"pretrained='webly' is neither a file nor .*has webli"),
        ({"name": "ViT-B-32", "pretrained": "openai"}, r"name='ViT-B-32' cannot be read .*that the hub can be reached"),
        (
            {"name": "hf-hub:someone/something"},
            r"name='hf-hub:.*' cannot be read .*check its spelling.*local-dir:FOLDER",
        ),
        ({"name": "local-dir:/nowhere"}, r"name='local-dir:/nowhere' cannot be read .*\(Directory .* not found"),
    ],
)
def test_an_open_clip_model_that_is_not_there_is_refused_with_a_remedy(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenClipTeacher(OpenClipTeacherConfig(**fields))


@pytest.mark.parametrize(
    ("content", "message"), [(POINTER, "git lfs pull"), ("hello", "cannot be read .*fetch its files")]
)
def test_an_open_clip_weights_file_that_is_none_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "weights.pt"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"teacher\.model\.pretrained='{path}'.*{message}") as refused:
        OpenClipTeacher(OpenClipTeacherConfig(name="ViT-S-32-alt", pretrained=str(path)))
    assert "weights_only" not in str(refused.value)


def test_what_a_library_says_is_one_line_without_unsafe_advice() -> None:
    said = r"^a\.b='c' cannot be read \([^\n]+\); check its spelling"
    for text in ("two\nlines", "Re-running `torch.load` with `weights_only` set to `False` will likely succeed"):
        with pytest.raises(ValueError, match=said) as refused, reading_published("a.b", "c"):
            raise RuntimeError(text)
        assert not re.search("weights_only|\n", str(refused.value))


def test_running_out_of_memory_is_not_called_damage() -> None:
    with pytest.raises(MemoryError), reading_published("a.b", "c"):
        raise MemoryError
