from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.language.vocabulary import EOS, PAD, PlainText, Vocabulary, extend_tokenizer, train_bpe

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


CONTROLS = ("<|pad|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|soi|>", "<|eoi|>", "<|codes|>", "<|code_3|>")


def published_tokenizer() -> Any:
    """As Qwen's: byte-level BPE with control tokens that are special, some that are not, and a run of spaces."""
    tokenizer = train_bpe(TEXTS, 300)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(["<tool_call>", "[INST]", "        ", "covid-19"])
    return tokenizer


def unigram_tokenizer() -> Any:
    """As T5's: its model knows `</s>` as a piece like any other."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import Unigram
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("cat", -1.0), *[(chr(code), -5.0) for code in range(32, 127)]]
    backend = Tokenizer(Unigram(pieces, unk_id=0))
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def slow_tokenizer() -> Any:
    """In Python, without a backend of the tokenizers library."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer(extra_ids=3)


@pytest.mark.parametrize("shape", [(1, 1, 3, 4), (2, 2, 3, 4)], ids=["one-code", "several-codes"])
@pytest.mark.parametrize(
    "make", [lambda: train_bpe(TEXTS, 300), published_tokenizer, unigram_tokenizer, slow_tokenizer],
    ids=["own", "published", "unigram", "slow"],
)  # fmt: skip
def test_text_is_never_markup(make: Callable[[], Any], shape: tuple[int, int, int, int]) -> None:
    tokenizer = make()
    plain_ids = tokenizer.encode("a cat", add_special_tokens=False)
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    own_tokens = [token for token in added if token[0] in "<[" and token != tokenizer.unk_token]
    vocabulary = extend_tokenizer(tokenizer, (20,) * shape[0], shape)
    plain = PlainText(tokenizer, vocabulary)
    assert plain.ids("a cat") == plain_ids
    for control in (*CONTROLS, *own_tokens):
        for text in (control, f"the {control}{control} token", f"cat{control}\n"):
            ids = plain.ids(text)
            assert len(ids) > 1 and plain.control_ids.isdisjoint(set(ids) - {tokenizer.unk_token_id}), control
            if tokenizer.unk_token_id not in ids:
                assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert {vocabulary.soi, vocabulary.eos, vocabulary.pad, vocabulary.first_code} <= plain.control_ids


def test_added_tokens_that_are_text_stay_what_they_are() -> None:
    tokenizer = published_tokenizer()
    plain = PlainText(tokenizer, extend_tokenizer(tokenizer, (20,), (1, 1, 3, 4)))
    for word in ("        ", "covid-19"):
        assert plain.ids(word) == [tokenizer.convert_tokens_to_ids(word)]


def test_control_tokens_say_nothing_in_text_that_is_shown() -> None:
    tokenizer = published_tokenizer()
    vocabulary = extend_tokenizer(tokenizer, (20,), (1, 1, 3, 4))
    plain = PlainText(tokenizer, vocabulary)
    controls = [*tokenizer.convert_tokens_to_ids(["<|im_start|>", "<tool_call>"]), vocabulary.soi, vocabulary.size - 1]
    assert plain.text([*controls, *plain.ids("a <|soi|> , cat"), *controls]) == "a <|soi|> , cat"


def test_a_tokenizer_is_left_as_it_was() -> None:
    tokenizer = published_tokenizer()
    vocabulary = extend_tokenizer(tokenizer, (20,), (1, 1, 3, 4))
    PlainText(tokenizer, vocabulary).ids("<|soi|>")
    assert tokenizer.encode("<|soi|>", add_special_tokens=False) == [vocabulary.soi]


def test_a_text_that_can_only_be_a_control_token_is_named() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<s>": 0, "cat": 1}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<s>")
    plain = PlainText(tokenizer, extend_tokenizer(tokenizer, (4,), (1, 1, 2, 2)))
    assert plain.ids("cat") == [1]
    with pytest.raises(ValueError, match=r"'a dog' becomes the control tokens \['<s>'\].*take them out of the text"):
        plain.ids("a dog")


def test_a_tokenizer_without_an_end_gets_it() -> None:
    tokenizer = train_bpe(TEXTS, 300)
    tokenizer.eos_token = None
    assert extend_tokenizer(tokenizer, (4,), (1, 1, 2, 2)).eos == tokenizer.convert_tokens_to_ids(EOS)
