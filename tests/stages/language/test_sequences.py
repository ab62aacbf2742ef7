"""The papers' sequence layouts and where the loss falls."""

from __future__ import annotations

import pytest
import torch

from models.language.vlm import IGNORED
from models.language.vocabulary import extend_tokenizer, train_bpe
from stages.language.sequences import SequenceBuilder

MAX_TOKENS = 64
CODES = torch.tensor([[[[0, 1], [2, 3]]]])


@pytest.fixture(scope="module")
def builder() -> SequenceBuilder:
    tokenizer = train_bpe(["a fox in noto style", "What is it?"], 300)
    return SequenceBuilder(tokenizer, extend_tokenizer(tokenizer, (4,), (1, 1, 2, 2)), MAX_TOKENS)


def with_loss(builder: SequenceBuilder, sequence: tuple[list[int], list[int]]) -> str:
    return builder.tokenizer.decode([label for label in sequence[1] if label != IGNORED])


def test_pretraining_has_loss_on_every_token_in_both_orders(builder: SequenceBuilder) -> None:
    image = "<|soi|><|code_0|><|code_1|><|code_2|><|code_3|><|eoi|>"
    first = builder.pretraining("a fox", CODES, image_first=True)
    last = builder.pretraining("a fox", CODES, image_first=False)
    assert first.labels == first.token_ids and last.labels == last.token_ids
    assert builder.tokenizer.decode(first.token_ids) == f"{image}a fox<|eos|>"
    assert builder.tokenizer.decode(last.token_ids) == f"a fox{image}<|eos|>"


def test_understanding_has_loss_on_the_answer_and_the_end_only(builder: SequenceBuilder) -> None:
    sequence = builder.understanding(CODES, "What is it?", "a fox")
    assert with_loss(builder, sequence) == "a fox<|eos|>"
    assert builder.tokenizer.decode(sequence.token_ids).startswith("<|user|><|soi|><|code_0|>")


def test_generation_has_loss_on_the_image_only(builder: SequenceBuilder) -> None:
    sequence = builder.generation("a fox", CODES)
    assert with_loss(builder, sequence) == "<|soi|><|code_0|><|code_1|><|code_2|><|code_3|><|eoi|>"


def test_drawing_prompt_is_what_generation_was_trained_on(builder: SequenceBuilder) -> None:
    prompt = builder.drawing_prompt("a fox")
    assert builder.generation("a fox", CODES).token_ids[: len(prompt)] == prompt


def test_batch_pads_on_the_right_without_loss(builder: SequenceBuilder) -> None:
    short = builder.pretraining("", CODES, image_first=False)
    long = builder.pretraining("a fox", CODES, image_first=True)
    batch = builder.batch([short, long])
    assert batch.token_ids.shape == batch.labels.shape == batch.attention_mask.shape == (2, len(long.token_ids))
    padding = batch.attention_mask[0] == 0
    assert int(padding.sum()) == len(long.token_ids) - len(short.token_ids)
    assert bool((batch.labels[0][padding] == IGNORED).all())
    assert bool((batch.token_ids[0][padding] == builder.vocabulary.pad).all())


def test_codes_outside_the_codebook_are_refused(builder: SequenceBuilder) -> None:
    with pytest.raises(ValueError, match="codebook has 4"):
        builder.image(torch.tensor([[[[0, 4]]]]))


MARKUP = "<|codes|> <|soi|><|code_3|><|eoi|> <|user|> hi <|assistant|> <|eos|><|pad|>"
LAYOUTS = {
    "image first": (lambda b, text: b.pretraining(text, b.codes, image_first=True), {"soi", "eoi", "eos"}),
    "text first": (lambda b, text: b.pretraining(text, b.codes, image_first=False), {"soi", "eoi", "eos"}),
    "understanding": (lambda b, text: b.understanding(b.codes, text, text), {"user", "soi", "eoi", "assistant", "eos"}),
    "generation": (lambda b, text: b.generation(text, b.codes), {"user", "assistant", "soi", "eoi", "eos"}),
}


def builder_of(num_books: int, max_tokens: int) -> SequenceBuilder:
    """Over 2 x 2 positions with one code each, or with as many as there are books."""
    shape = (num_books, 1, 2, 2)
    tokenizer = train_bpe(["a fox in noto style", "What is it?"], 300)
    made = SequenceBuilder(tokenizer, extend_tokenizer(tokenizer, (4,) * num_books, shape), max_tokens)
    made.codes = torch.arange(4 * num_books).view(shape) % 4
    return made


@pytest.mark.parametrize("num_books", [1, 2], ids=["one-code", "several-codes"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_only_our_own_code_writes_control_tokens(layout: str, num_books: int) -> None:
    builder = builder_of(num_books, 500)
    make, markers = LAYOUTS[layout]
    sequence = make(builder, MARKUP)
    controls = [token for token in sequence.token_ids if token in builder.plain.control_ids]
    vocabulary = builder.vocabulary
    visual = vocabulary.code_ids(builder.codes.flatten()).tolist() if num_books == 1 else [vocabulary.first_code] * 4
    assert sorted(controls) == sorted([*(getattr(vocabulary, name) for name in markers), *visual])
    assert MARKUP in builder.tokenizer.decode(sequence.token_ids)


@pytest.mark.parametrize("num_books", [1, 2], ids=["one-code", "several-codes"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_long_text_is_cut_and_an_image_never(layout: str, num_books: int) -> None:
    builder = builder_of(num_books, 24)
    sequence = LAYOUTS[layout][0](builder, "a fox in noto style " * 5000)
    assert len(sequence.token_ids) == len(sequence.labels) <= 24
    image = builder.image(builder.codes)
    starts = [at for at, token in enumerate(sequence.token_ids) if token == builder.vocabulary.soi]
    assert [sequence.token_ids[at : at + len(image)] for at in starts] == [image]
    assert sequence.token_ids[-1] == builder.vocabulary.eos


def test_a_cut_text_does_not_end_where_it_was_cut() -> None:
    builder, long = builder_of(1, 24), "a fox in noto style " * 9
    for text, last in (("a fox", builder.vocabulary.eos), (long, IGNORED)):
        assert builder.pretraining(text, builder.codes, image_first=True).labels[-1] == last
        assert builder.understanding(builder.codes, "What is it?", text).labels[-1] == last
        assert builder.pretraining(text, builder.codes, image_first=False).labels[-1] == builder.vocabulary.eos


def test_a_long_question_leaves_a_short_answer_whole_and_a_long_answer_a_short_question() -> None:
    builder, long = builder_of(1, 24), "a fox in noto style " * 9
    answered = builder.understanding(builder.codes, long, "a fox")
    assert with_loss(builder, answered) == "a fox<|eos|>"
    asked = builder.understanding(builder.codes, "a fox", long)
    assert "<|eoi|>a fox<|assistant|>a fox in" in builder.tokenizer.decode(asked.token_ids)
    both = builder.understanding(builder.codes, long, long)
    shown = [builder.tokenizer.decode(part) for part in (answered.token_ids, asked.token_ids, both.token_ids)]
    assert all(len(part.token_ids) == 24 for part in (answered, asked, both)), shown


@pytest.mark.parametrize(
    ("text", "fits"), [("", True), ("a fox", True), ("a fox in noto style " * 3, False), ("\ufdfa" * 12, False)]
)
def test_what_fits_is_what_is_not_cut(text: str, fits: bool) -> None:
    builder = builder_of(1, 24)
    assert builder.fits(text) == fits == (len(builder.plain.ids(text)) <= builder.room)


def test_a_limit_that_holds_no_image_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"max_tokens=9 leaves no space for text next to an image of 4 codes.*longer"):
        builder_of(1, 9)
