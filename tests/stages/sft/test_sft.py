"""The mixture of fine-tuning: which codes are shown, and which are asked for."""

from __future__ import annotations

import pytest
import torch

from models.language.vlm import IGNORED
from models.language.vocabulary import extend_tokenizer, train_bpe
from stages.artifacts.codes import CodedRows
from stages.language.sequences import SequenceBuilder
from stages.sft.stage import QuestionTemplate, SftConfig, _sequence_maker
from storage.code_table import CodeTableInfo

CODES = torch.arange(64).view(1, 1, 1, 8, 8)
QUESTION = QuestionTemplate(question="What is it?", answer="{caption}")


@pytest.fixture(scope="module")
def builder() -> SequenceBuilder:
    tokenizer = train_bpe(["a fox", "What is it?", "Draw a fox."], 300)
    return SequenceBuilder(tokenizer, extend_tokenizer(tokenizer, (1000,), (1, 1, 8, 8)), 128)


@pytest.fixture(scope="module")
def rows() -> CodedRows:
    """An image and a view of it whose codes are all 900."""
    info = CodeTableInfo((1, 1, 8, 8), ("main",), (1000,), "digest", {})
    columns = {"text": ["a fox", "a fox"], "view": ["original", "view_1"]}
    return CodedRows(info, ["0", "0_view_1"], columns, torch.cat([CODES, torch.full_like(CODES, 900)]))


def shown_codes(builder: SequenceBuilder, token_ids: list[int]) -> torch.Tensor:
    first, size = builder.vocabulary.first_code, builder.vocabulary.num_code_tokens
    return torch.tensor([token - first for token in token_ids if 0 <= token - first < size])


def test_drawing_shows_random_codes_and_asks_for_the_true_ones(builder: SequenceBuilder, rows: CodedRows) -> None:
    config = SftConfig(questions=(QUESTION,), understanding_weight=0, caption_dropout=0, generation_code_dropout=0.5)
    torch.manual_seed(0)
    made = [_sequence_maker(config)(builder, rows, 0) for _ in range(40)]
    assert all(torch.equal(shown_codes(builder, sequence.labels), CODES.flatten()) for sequence in made)
    replaced = torch.stack([shown_codes(builder, sequence.token_ids) != CODES.flatten() for sequence in made])
    assert 0.4 < float(replaced.float().mean()) < 0.6


def test_a_view_is_read_and_its_image_is_drawn(builder: SequenceBuilder, rows: CodedRows) -> None:
    for weights, expected in (((1, 0), torch.full((64,), 900)), ((0, 1), CODES.flatten())):
        config = SftConfig(questions=(QUESTION,), understanding_weight=weights[0], generation_weight=weights[1])
        sequence = _sequence_maker(config)(builder, rows, 1)
        assert torch.equal(shown_codes(builder, sequence.token_ids), expected)


def test_the_answer_keeps_its_loss_under_code_dropout(builder: SequenceBuilder, rows: CodedRows) -> None:
    config = SftConfig(questions=(QUESTION,), generation_weight=0, understanding_code_dropout=1.0)
    torch.manual_seed(0)
    sequence = _sequence_maker(config)(builder, rows, 0)
    answer = [label for label in sequence.labels if label != IGNORED]
    assert builder.tokenizer.decode(answer) == "a fox<|eos|>"
    assert int((shown_codes(builder, sequence.token_ids) == CODES.flatten()).sum()) < 4


def test_a_mixture_without_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="give at least one of them weight"):
        _sequence_maker(SftConfig(understanding_weight=0, generation_weight=0))
