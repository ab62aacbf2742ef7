from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.language.vlm import (
    IGNORED,
    LlmConfig,
    UnifiedVlm,
    build_small_llm,
    extend_llm,
    load_base_llm,
    mean_log_likelihood,
    next_token_loss,
)
from models.language.vocabulary import Vocabulary, extend_tokenizer, train_bpe

CONFIG = LlmConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, max_positions=64)
TEXTS = ["a red cat", "a blue dog", "What is shown here?", "it 's 1234 , and 漢字 !"]


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, Vocabulary]:
    """A small model, its tokenizer and their vocabulary."""
    tokenizer = train_bpe(TEXTS, 300)
    vocabulary = extend_tokenizer(tokenizer, (10,), (1, 1, 2, 2))
    torch.manual_seed(0)
    return build_small_llm(CONFIG, vocabulary).eval(), tokenizer, vocabulary


@pytest.fixture
def batch(parts: tuple[Any, Any, Vocabulary]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels and mask of three sequences of different length, padded on the right."""
    vocabulary = parts[2]
    token_ids = torch.randint(0, vocabulary.size, (3, 9), generator=torch.Generator().manual_seed(0))
    labels, mask = token_ids.clone(), torch.ones_like(token_ids)
    labels[0, :4] = IGNORED
    for row, length in ((1, 6), (2, 3)):
        token_ids[row, length:], labels[row, length:], mask[row, length:] = vocabulary.pad, IGNORED, 0
    return token_ids, labels, mask


def test_loss_equals_transformers_own(parts: tuple[Any, Any, Vocabulary], batch: tuple[Tensor, ...]) -> None:
    model, (token_ids, labels, mask) = parts[0], batch
    expected = model(input_ids=token_ids, attention_mask=mask, labels=labels).loss
    loss = next_token_loss(UnifiedVlm(model, parts[2]), token_ids, labels, mask)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value, list(model.parameters())) for value in (loss, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_loss_by_sequence_weighs_each_sequence_alike(
    parts: tuple[Any, Any, Vocabulary], batch: tuple[Tensor, ...]
) -> None:
    model, (token_ids, labels, mask) = parts[0], batch
    rows = [
        model(input_ids=i[None], attention_mask=m[None], labels=t[None]).loss for i, t, m in zip(*batch, strict=True)
    ]
    loss = next_token_loss(UnifiedVlm(model, parts[2]), token_ids, labels, mask, average="sequence")
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    assert not torch.isclose(loss, next_token_loss(UnifiedVlm(model, parts[2]), token_ids, labels, mask)), (
        "the rows differ in length"
    )


def test_mean_log_likelihood_equals_brute_force(parts: tuple[Any, Any, Vocabulary], batch: tuple[Tensor, ...]) -> None:
    model, (token_ids, labels, mask) = parts[0], batch
    expected = []
    for row in range(3):
        length = int(mask[row].sum())
        with torch.no_grad():
            logits = model(input_ids=token_ids[row : row + 1, :length]).logits[0].double().log_softmax(-1)
        positions = [at for at in range(1, length) if labels[row, at] != IGNORED]
        expected.append(sum(float(logits[at - 1, token_ids[row, at]]) for at in positions) / len(positions))
    measured = mean_log_likelihood(UnifiedVlm(model, parts[2]), token_ids, labels, mask)
    torch.testing.assert_close(measured, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_padding_does_not_change_the_likelihood(parts: tuple[Any, Any, Vocabulary], batch: tuple[Tensor, ...]) -> None:
    model, (token_ids, labels, mask) = parts[0], batch
    alone = mean_log_likelihood(UnifiedVlm(model, parts[2]), token_ids[2:, :3], labels[2:, :3], mask[2:, :3])
    torch.testing.assert_close(mean_log_likelihood(UnifiedVlm(model, parts[2]), token_ids, labels, mask)[2:], alone)


def test_extending_keeps_old_rows_and_starts_new_ones_at_their_mean(parts: tuple[Any, Any, Vocabulary]) -> None:
    tokenizer = train_bpe(TEXTS, 290)
    before = extend_tokenizer(train_bpe(TEXTS, 290), (4,), (1, 1, 2, 2))
    model = build_small_llm(CONFIG, before).eval()
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    old = [table.detach().clone() for table in tables]
    vocabulary = extend_tokenizer(tokenizer, (500,), (1, 1, 2, 2))
    extend_llm(model, vocabulary)
    for table, was in zip(
        [model.get_input_embeddings().weight, model.get_output_embeddings().weight], old, strict=True
    ):
        assert table.shape[0] == vocabulary.size
        assert torch.equal(table[: len(was)], was)
        new = table[len(was) :].detach()
        torch.testing.assert_close(new, was.mean(0).expand_as(new), atol=1e-3, rtol=0)
    assert model.config.vocab_size == vocabulary.size
    extend_llm(model, before)
    assert model.get_input_embeddings().weight.shape[0] == vocabulary.size, "a table is never cut"


def test_exported_folder_works_with_transformers_alone(
    parts: tuple[Any, Any, Vocabulary], batch: tuple[Tensor, ...], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer, vocabulary = parts
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, words = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch[0]).logits, model(batch[0]).logits, atol=0, rtol=0)
    assert words.encode("<|code_5|>", add_special_tokens=False) == [vocabulary.first_code + 5]
    for text in [*TEXTS, "It's UNSEEN: 2024 , 漢字  🦄\n"]:
        assert words.encode(text) == tokenizer.encode(text), "the model's type must not change the text tokenizer"
        assert words.decode(words.encode(text)) == text


def test_published_model_is_extended_and_still_reads_text_alike(
    parts: tuple[Any, Any, Vocabulary], tmp_path: Path
) -> None:
    model, tokenizer, vocabulary = parts
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base, words = load_base_llm(LlmConfig(base=str(tmp_path)))
    token_ids = torch.tensor([words.encode("a red cat")])
    with torch.no_grad():
        before = base.eval()(token_ids).logits
        larger = extend_tokenizer(words, (30,), (1, 1, 2, 2))
        extend_llm(base, larger)
        after = base(token_ids).logits
    assert base.dtype == torch.float32
    assert larger.first_code == vocabulary.first_code
    assert after.shape[-1] == larger.size
    torch.testing.assert_close(after[..., : before.shape[-1]], before)
