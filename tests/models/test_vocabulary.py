from pathlib import Path

import pytest
import torch

from models.vocabulary import EOS, PAD, Vocabulary, extend_tokenizer, train_bpe

TEXTS = ["a red cat", "a blue dog", "What is shown here?", "a cat and a dog"]
UNKNOWN = [
    "Ünïcödé 漢字 🦄‍🔥",
    "  spaces   and\ttabs\nand lines ",
    "punctuation , kept . as 's it 'm is !",
    "\u0000\u200b",
    "",
]


@pytest.fixture
def extended() -> tuple:
    tokenizer = train_bpe(TEXTS, 300)
    return tokenizer, extend_tokenizer(tokenizer, (20,), (1, 1, 3, 4))


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_text_round_trips(text: str, extended: tuple) -> None:
    tokenizer, _ = extended
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_bpe_is_the_same_whatever_the_order_of_texts() -> None:
    first, second = train_bpe(TEXTS, 300), train_bpe(TEXTS[::-1] * 2, 300)
    assert first.get_vocab() == second.get_vocab()
    assert len(first) <= 300
    assert first.convert_ids_to_tokens([0, 1]) == [PAD, EOS]


def test_seen_text_is_shorter_than_its_bytes() -> None:
    tokenizer = train_bpe(TEXTS, 300)
    assert len(tokenizer.encode("a red cat")) < len("a red cat")


def test_ids_are_distinct_and_codes_contiguous(extended: tuple) -> None:
    tokenizer, vocabulary = extended
    names = [f"<|code_{code}|>" for code in range(20)]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(vocabulary.first_code, vocabulary.size))
    markers = [vocabulary.pad, vocabulary.eos, vocabulary.user, vocabulary.assistant, vocabulary.soi, vocabulary.eoi]
    assert len(set(markers)) == 6
    assert max(markers) < vocabulary.first_code
    assert vocabulary.size == len(tokenizer)
    assert vocabulary.num_positions == 12


def test_codes_round_trip_and_others_are_refused(extended: tuple) -> None:
    _, vocabulary = extended
    codes = torch.arange(20).view(4, 5)
    assert torch.equal(vocabulary.codes(vocabulary.code_ids(codes)), codes)
    assert vocabulary.code_ids(codes[:0]).shape == (0, 5)
    for wrong in (-1, 20):
        with pytest.raises(ValueError, match="the codebook has 20"):
            vocabulary.code_ids(torch.tensor([3, wrong]))


def test_vocabulary_round_trips_through_json(extended: tuple) -> None:
    _, vocabulary = extended
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary


def test_saved_tokenizer_reads_a_code_as_one_id(extended: tuple, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, vocabulary = extended
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode("<|code_5|>", add_special_tokens=False) == [vocabulary.first_code + 5]
    assert loaded.encode("cat<|soi|><|code_19|><|eoi|>", add_special_tokens=False)[-3:] == [
        vocabulary.soi, vocabulary.first_code + 19, vocabulary.eoi
    ]  # fmt: skip
    for text in TEXTS + UNKNOWN:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (vocabulary.pad, vocabulary.eos)


def test_a_tokenizer_without_padding_gets_it() -> None:
    tokenizer = train_bpe(TEXTS, 300)
    tokenizer.pad_token = None
    vocabulary = extend_tokenizer(tokenizer, (4,), (1, 1, 2, 2))
    assert tokenizer.pad_token_id == vocabulary.pad is not None
