"""Visual rows of the language model that start from the codebook."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.vlm import LlmConfig, build_small_llm, start_from_codebook
from models.vocabulary import extend_tokenizer, train_bpe


def test_rows_that_all_began_at_the_mean_get_the_spread_of_text() -> None:
    """As those of a published model do, whose table was grown."""
    torch.manual_seed(0)
    vocabulary = extend_tokenizer(train_bpe(["a fox"], 300), (16,), (1, 1, 2, 2))
    model = build_small_llm(LlmConfig(hidden_size=64, num_layers=1, num_heads=2, intermediate_size=64), vocabulary)
    table = model.get_input_embeddings().weight.detach()
    text = table[: vocabulary.first_code]
    table[vocabulary.first_code :] = text.mean(dim=0)
    start_from_codebook(model, vocabulary, F.normalize(torch.randn(16, 8), dim=1))
    assert table[vocabulary.first_code :].std().item() == pytest.approx(text.std().item(), rel=0.3)


def test_codes_that_look_alike_begin_alike_and_text_rows_stay() -> None:
    torch.manual_seed(0)
    tokenizer = train_bpe(["a fox"], 300)
    vocabulary = extend_tokenizer(tokenizer, (16,), (1, 1, 2, 2))
    config = LlmConfig(hidden_size=64, num_layers=1, num_heads=2, intermediate_size=64)
    model = build_small_llm(config, vocabulary)
    before = model.get_input_embeddings().weight.detach().clone()
    codebook = F.normalize(torch.randn(16, 8), dim=1)
    codebook[1] = F.normalize(codebook[0] + 0.05 * torch.randn(8), dim=0)

    start_from_codebook(model, vocabulary, codebook)

    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = layer.weight.detach()[vocabulary.first_code :]
        similarity = F.cosine_similarity(rows[:1], rows[1:], dim=1)
        assert similarity.argmax() == 0 and similarity[0] > 0.9
        assert rows.std().item() == pytest.approx(before.std().item(), rel=0.3)
    after = model.get_input_embeddings().weight.detach()
    assert torch.equal(after[: vocabulary.first_code], before[: vocabulary.first_code])
