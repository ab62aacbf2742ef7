"""Which weights pretraining starts from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.language.vlm import LlmConfig, build_small_llm
from models.language.vocabulary import extend_tokenizer, train_bpe
from stages.artifacts import external_codes
from stages.artifacts.codes import CodedRows
from stages.pretrain.stage import PretrainConfig, build_unified
from storage.code_table import CodeTableInfo

SIZE = 12
BASE = LlmConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32)


def coded_rows(size: int) -> CodedRows:
    info = CodeTableInfo((1, 1, 2, 2), ("theirs",), (size,), "digest", {})
    return CodedRows(info, [], {}, torch.zeros(0, 1, 1, 2, 2, dtype=torch.int32))


@pytest.mark.parametrize("visual_init", ["codebook", "random"])
def test_an_export_of_this_project_keeps_the_rows_of_its_codes(tmp_path: Path, visual_init: str) -> None:
    store: Any = SimpleNamespace(load=lambda digest: SimpleNamespace(kind=external_codes.KIND))
    tokenizer = train_bpe(["a fox"], 300)
    vocabulary = extend_tokenizer(tokenizer, (SIZE,), (1, 1, 2, 2))
    trained = build_small_llm(BASE, vocabulary)
    trained.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = PretrainConfig(llm=LlmConfig(base=str(tmp_path), visual_init=visual_init))
    for size in (SIZE, SIZE + 5):  # with a longer codebook the others are new
        vlm, _ = build_unified(config, store, coded_rows(size))
        assert vlm.vocabulary.first_code == vocabulary.first_code and vlm.vocabulary.num_code_tokens == size
        for found, was in (
            (vlm.llm.get_input_embeddings(), trained.get_input_embeddings()),
            (vlm.llm.get_output_embeddings(), trained.get_output_embeddings()),
        ):
            assert torch.equal(found.weight[: vocabulary.size], was.weight)
            assert found.weight[vocabulary.size : vlm.vocabulary.size].detach().unique(dim=0).shape[0] == size - SIZE
