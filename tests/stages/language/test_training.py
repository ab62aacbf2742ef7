"""Texts that cannot stand in a sequence, and texts that look like our markers, on their way through a training."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.language.visual_codes import VisualCodes, VisualCodesConfig
from models.language.vlm import LlmConfig, UnifiedVlm, build_small_llm
from models.language.vocabulary import extend_tokenizer, train_bpe
from stages.artifacts.codes import CodedRows
from stages.language.sequences import SequenceBuilder
from stages.language.training import VlmTraining, fitting_rows, longest_sequence
from stages.pipeline.assistant import Assistant
from stages.pretrain.stage import PretrainConfig, _sequence_maker, _texts_of
from stages.sft.stage import QuestionTemplate, SftConfig
from stages.sft.stage import _sequence_maker as sft_sequences
from stages.sft.stage import _texts_of as sft_texts
from storage.code_table import CodeTableInfo

MARKUP = "a screenshot of <|codes|> and <|soi|><|code_1|><|eoi|><|user|> hi <|assistant|><|eos|><|pad|>"
LONG = "a page of words " * 40


def rows_of(captions: list[str], num_books: int = 1) -> CodedRows:
    shape = (num_books, 1, 2, 2)
    info = CodeTableInfo(shape, ("one", "two")[:num_books], (8,) * num_books, "digest", {})
    columns = {"text": captions, "view": ["original"] * len(captions)}
    codes = torch.randint(8, (len(captions), *shape), generator=torch.Generator().manual_seed(0))
    return CodedRows(info, [str(number) for number in range(len(captions))], columns, codes)


def training_of(rows: CodedRows, config: Any, max_tokens: int = 200) -> VlmTraining:
    shape = rows.info.code_shape
    tokenizer = train_bpe(["a screenshot", "a page of words"], 300)
    vocabulary = extend_tokenizer(tokenizer, rows.info.codebook_sizes, shape)
    torch.manual_seed(0)
    small = LlmConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, max_positions=256)
    visual = None
    if shape[0] > 1:
        codebooks = [torch.randn(1, 8, 4) for _ in range(shape[0])]
        visual = VisualCodes(VisualCodesConfig(width=8, layers=1, heads=2), 16, codebooks, shape[1])
    vlm = UnifiedVlm(build_small_llm(small, vocabulary), vocabulary, visual)
    builder = SequenceBuilder(tokenizer, vocabulary, max_tokens)
    if isinstance(config, SftConfig):
        return VlmTraining(config, 0, vlm, builder, rows, sft_sequences(config), lambda row: sft_texts(config, row))
    return VlmTraining(config, 0, vlm, builder, rows, _sequence_maker(config), _texts_of)


@pytest.mark.parametrize("num_books", [1, 2], ids=["one-code", "several-codes"])
@pytest.mark.parametrize("config_class", [PretrainConfig, SftConfig])
def test_captions_that_hold_our_markers_are_trained_on_like_any_other(config_class: Any, num_books: int) -> None:
    config = config_class(batch_size=4, device="cpu", precision="fp32", steps=2)
    training = training_of(rows_of([MARKUP, "a page"] * 2, num_books), config)
    for step in range(2):
        torch.manual_seed(step)
        assert torch.isfinite(training.step(step)["loss"])


def test_long_texts_are_cut_and_counted() -> None:
    training = training_of(rows_of([LONG, "a page"]), PretrainConfig(batch_size=2, device="cpu"), 40)
    assert training.fitting.positions == [0, 1]
    assert training.fitting.metrics == {"num_rows": 2, "num_cut": 1, "num_left_out": 0}


def test_rows_with_long_texts_are_left_out_where_that_is_asked_for() -> None:
    config = PretrainConfig(batch_size=2, device="cpu", long_text="leave_out")
    training = training_of(rows_of(["a page", LONG, "a screenshot"]), config, 40)
    assert training.fitting.metrics == {"num_rows": 3, "num_cut": 0, "num_left_out": 1}
    assert {key for step in range(5) for key in training.batch_keys(step)} == {"0", "2"}
    with pytest.raises(ValueError, match="all 2 rows have text longer than the .* set long_text=cut"):
        training_of(rows_of([LONG, LONG]), config, 40)


def test_a_row_is_long_where_any_of_its_sequences_is() -> None:
    rows = rows_of(["a page", "a page of words and more"])
    template = QuestionTemplate(question="What is it?", answer="{caption}, " * 2)
    for weights, expected in (((1, 0), 1), ((0, 1), 0)):
        config = SftConfig(
            questions=(template,), prompts=("{caption}",), understanding_weight=weights[0], generation_weight=weights[1]
        )
        builder = training_of(rows, config, 36).builder
        assert (
            fitting_rows(builder, rows, lambda row, config=config: sft_texts(config, row), config).metrics["num_cut"]
            == expected
        )


@pytest.mark.parametrize("ask", [lambda one: one.ask(None, LONG), lambda one: one.draw(LONG)], ids=["ask", "draw"])
def test_a_person_is_told_that_a_question_is_too_long(ask: Callable[[Assistant], Any]) -> None:
    assistant = Assistant.__new__(Assistant)
    assistant.builder = training_of(rows_of(["a page"]), PretrainConfig(batch_size=1, device="cpu"), 40).builder
    with pytest.raises(ValueError, match=r"has more than the 31 tokens that the model reads beside an image.*shorten"):
        ask(assistant)


def model_of(positions: int | None) -> Any:
    inner = SimpleNamespace(max_position_embeddings=positions)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: inner))


@pytest.mark.parametrize(
    ("positions", "tokenizer_says", "asked", "expected"),
    [
        (1024, int(1e30), None, 1024),
        (2048, 512, None, 512),
        (131_072, int(1e30), None, 4096),
        (None, int(1e30), None, 4096),
        (131_072, 2048, 8192, 8192),
    ],
)
def test_the_longest_sequence_is_the_models_unless_that_is_absurd(
    positions: int | None, tokenizer_says: int, asked: int | None, expected: int
) -> None:
    tokenizer: Any = SimpleNamespace(model_max_length=tokenizer_says)
    assert longest_sequence(asked, model_of(positions), tokenizer) == expected


def test_more_tokens_than_the_model_has_positions_are_refused() -> None:
    tokenizer: Any = SimpleNamespace(model_max_length=int(1e30))
    with pytest.raises(ValueError, match=r"sft.max_tokens=2000 is more than the 1024 positions.*lower it"):
        longest_sequence(2000, model_of(1024), tokenizer, "sft")
