"""Visual rows of the language model that start from the codebook."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.language.vlm import LlmConfig, build_small_llm, extend_llm, start_visual_rows
from models.language.vocabulary import count_codes, extend_tokenizer, train_bpe

CONFIG = LlmConfig(hidden_size=64, num_layers=1, num_heads=2, intermediate_size=64)


def test_rows_that_all_began_at_the_mean_get_the_spread_of_text() -> None:
    """As those of a published model do, whose table was grown."""
    torch.manual_seed(0)
    vocabulary = extend_tokenizer(train_bpe(["a fox"], 300), (16,), (1, 1, 2, 2))
    model = build_small_llm(LlmConfig(hidden_size=64, num_layers=1, num_heads=2, intermediate_size=64), vocabulary)
    table = model.get_input_embeddings().weight.detach()
    text = table[: vocabulary.first_code]
    table[vocabulary.first_code :] = text.mean(dim=0)
    start_visual_rows(model, vocabulary, F.normalize(torch.randn(16, 8), dim=1))
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

    start_visual_rows(model, vocabulary, codebook)

    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = layer.weight.detach()[vocabulary.first_code :]
        similarity = F.cosine_similarity(rows[:1], rows[1:], dim=1)
        assert similarity.argmax() == 0 and similarity[0] > 0.9
        assert rows.std().item() == pytest.approx(before.std().item(), rel=0.3)
    after = model.get_input_embeddings().weight.detach()
    assert torch.equal(after[: vocabulary.first_code], before[: vocabulary.first_code])


@pytest.mark.parametrize("tied", [False, True])
def test_random_rows_of_a_published_model_start_each_on_its_own(tied: bool) -> None:
    """Its table is grown by copies of the mean; they get the spread of text, in every channel and between rows."""
    torch.manual_seed(0)
    text_only = extend_tokenizer(train_bpe(["a fox"], 300), (1,), (1, 1, 2, 2))
    model = build_small_llm(CONFIG, text_only)
    if tied:
        model.set_output_embeddings(torch.nn.Linear(64, text_only.size, bias=False))
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
        model.config.tie_word_embeddings = True
    vocabulary = extend_tokenizer(train_bpe(["a fox"], 300), (64,), (1, 1, 2, 2))
    extend_llm(model, vocabulary)
    start_visual_rows(model, vocabulary, None)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        text, rows = layer.weight[: vocabulary.first_code].detach(), layer.weight[vocabulary.first_code :].detach()
        assert len(rows) == 64
        assert rows.std(dim=0).mean().item() == pytest.approx(text.std().item(), rel=0.2)
        distances = torch.pdist(rows)
        assert distances.min() > 0.5 * distances.mean()


@pytest.mark.parametrize("codebook", [True, False])
def test_rows_that_a_model_has_learned_are_kept_and_new_codes_start_anew(codebook: bool) -> None:
    """As where `pretrain.llm.base` names an export of this project."""
    torch.manual_seed(0)
    tokenizer = train_bpe(["a fox"], 300)
    assert count_codes(tokenizer) == 0
    before = extend_tokenizer(tokenizer, (16,), (1, 1, 2, 2))
    model = build_small_llm(CONFIG, before)
    learned = model.get_input_embeddings().weight.detach()[before.first_code :].clone()
    known = count_codes(tokenizer)
    assert known == 16
    vocabulary = extend_tokenizer(tokenizer, (24,), (1, 1, 2, 2))
    assert vocabulary.first_code == before.first_code
    extend_llm(model, vocabulary)
    start_visual_rows(model, vocabulary, torch.randn(24, 8) if codebook else None, known)
    rows = model.get_input_embeddings().weight.detach()[vocabulary.first_code :]
    assert torch.equal(rows[:16], learned)
    assert rows[16:].std().item() == pytest.approx(learned.std().item(), rel=0.3)


def test_codes_that_would_not_follow_each_other_are_refused() -> None:
    tokenizer = train_bpe(["a fox"], 300)
    extend_tokenizer(tokenizer, (16,), (1, 1, 2, 2))
    tokenizer.add_tokens(["<another>"])
    assert extend_tokenizer(tokenizer, (16,), (1, 1, 2, 2)).num_code_tokens == 16
    with pytest.raises(ValueError, match=r"<\|code_23\|> cannot get its id; start from a model without"):
        extend_tokenizer(tokenizer, (24,), (1, 1, 2, 2))
