"""The papers' sequence layouts and where the loss falls."""

from __future__ import annotations

import pytest
import torch

from models.vlm import IGNORED
from models.vocabulary import extend_tokenizer, train_bpe
from stages.sequences import SequenceBuilder

CODES = torch.tensor([[[[0, 1], [2, 3]]]])


@pytest.fixture(scope="module")
def builder() -> SequenceBuilder:
    tokenizer = train_bpe(["a fox in noto style", "What is it?"], 300)
    return SequenceBuilder(tokenizer, extend_tokenizer(tokenizer, (4,), (1, 1, 2, 2)))


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
