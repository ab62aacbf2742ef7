"""Supervised fine-tuning on a mixture of understanding and generation (MUSE-VL, section 3.2, stage 2)."""

from __future__ import annotations

from functools import partial

import torch
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor

from models.config import Config, Fraction
from models.language.vlm import LossAverage
from models.ranks import is_first_rank
from stages.artifacts.codes import CodedRows, load_rows
from stages.artifacts.rows import TRAIN
from stages.artifacts.templates import Template, fill_row
from stages.language.sequences import Sequence, SequenceBuilder
from stages.language.training import (
    SequenceMaker,
    VlmLoopConfig,
    VlmTraining,
    load_vlm,
    longest_sequence,
    put_vlm,
    vlm_outcome,
)
from stages.protocol import Outcome, Stage, StageContext
from stages.training.loop import train
from stages.training.shared import run_shared


class QuestionTemplate(Config):
    """A question about an image and its answer; `{name}` is a column of the code table, `{caption}` is its `text`."""

    question: Template
    """Template of the question, for example `What is in the picture?`."""
    answer: Template
    """Template of the answer, for example `{caption}`."""
    weight: NonNegativeFloat = 1.0
    """Frequency relative to the other questions."""


class SftConfig(VlmLoopConfig):
    """The mixture of tasks and its training."""

    understanding_weight: NonNegativeFloat = 1.0
    """Frequency of questions about images in the mixture, relative to `generation_weight`."""
    generation_weight: NonNegativeFloat = 1.0
    """Frequency of image generation in the mixture, relative to `understanding_weight`."""
    questions: tuple[QuestionTemplate, ...] = (
        QuestionTemplate(question="What is in the picture?", answer="{caption}"),
    )
    """Questions for understanding: the image is in the prompt, and the loss is on the answer."""
    prompts: tuple[Template, ...] = ("Draw {caption}.",)
    """Prompts for generation, of which one is chosen at random: the text is in the prompt, and the loss is on the
    image."""
    caption_dropout: Fraction = 0.1
    """Fraction of the generation prompts whose text is dropped, which enables classifier-free guidance."""
    understanding_code_dropout: Fraction = 0.0
    """Fraction of an image's codes that is replaced by random codes in understanding sequences: an augmentation against
    overfitting to small data."""
    generation_code_dropout: Fraction = 0.0
    """Fraction of the input codes that is replaced by random codes in generation sequences; the targets of the loss
    stay the true ones. Without it, small data is memorised from the previous codes and the prompt hardly used. Infinity
    (arXiv:2412.04431) flips bits of the context for another reason: errors that accumulate during sampling."""
    loss_average: LossAverage = "token"
    """What the loss is averaged over: the `token`s of the batch, or its `sequence`s. A generated image has a loss on
    each of its codes, an answer on a few tokens only: with `token`, generation gets nearly all of the gradient whatever
    the weights."""
    steps: PositiveInt = 1000
    """Number of optimiser steps."""

    @model_validator(mode="after")
    def _check_mixture(self) -> SftConfig:
        """What is drawn from has something in it that can be drawn."""
        if not self.understanding_weight and not self.generation_weight:
            raise ValueError("understanding_weight and generation_weight are both 0; give at least one of them weight")
        if self.understanding_weight and not any(question.weight for question in self.questions):
            raise ValueError("questions has none with a weight above 0; give one, or set understanding_weight to 0")
        if self.generation_weight and not self.prompts:
            raise ValueError("prompts is empty; give one, or set generation_weight to 0")
        return self


def run(context: StageContext[SftConfig]) -> Outcome:
    """Make the `vlm` artifact: a Hugging Face folder, `vocabulary.json` and loss curves."""
    return run_shared(context, _train)


def _train(context: StageContext[SftConfig]) -> Outcome | None:
    config = context.config
    pretrained = context.inputs["pretrain"]
    rows = load_rows(context.store, context.inputs["tokenize"], split=TRAIN, views=True)
    vlm, builder = load_vlm(context.store, pretrained)
    limit = longest_sequence(config.max_tokens, vlm.llm, builder.tokenizer, "sft")
    builder = SequenceBuilder(builder.tokenizer, builder.vocabulary, limit)
    make, texts_of = _sequence_maker(config), partial(_texts_of, config)
    training = VlmTraining(config, context.seed, vlm, builder, rows, make, texts_of, config.loss_average)
    history = train(context, training, config)
    if not is_first_rank():
        return None
    files = [*put_vlm(context, training.vlm, builder.tokenizer), history.save(context)]
    return vlm_outcome(training, files, history)


def _texts_of(config: SftConfig, row: dict[str, str]) -> list[tuple[str, ...]]:
    texts: list[tuple[str, ...]] = []
    if config.understanding_weight:
        texts += [
            (fill_row(each.question, row), fill_row(each.answer, row)) for each in config.questions if each.weight
        ]
    if config.generation_weight:
        texts += [(fill_row(prompt, row),) for prompt in config.prompts]
    return texts


def _sequence_maker(config: SftConfig) -> SequenceMaker:
    total = config.understanding_weight + config.generation_weight
    understanding = config.understanding_weight / total
    question_weights = torch.tensor([template.weight for template in config.questions])

    def make(builder: SequenceBuilder, rows: CodedRows, index: int) -> Sequence:
        codes, row = rows.codes[index], rows.row(index)
        if torch.rand(()) < understanding:
            template = config.questions[int(torch.multinomial(question_weights, 1))]
            seen = _partly_random(codes, config.understanding_code_dropout, builder)
            return builder.understanding(seen, fill_row(template.question, row), fill_row(template.answer, row))
        codes = rows.codes[rows.originals[index]]  # augmented views are used as input only, never as targets
        prompt = fill_row(config.prompts[int(torch.randint(len(config.prompts), ()))], row)
        dropped = bool(torch.rand(()) < config.caption_dropout)
        seen = _partly_random(codes, config.generation_code_dropout, builder)
        return builder.generation("" if dropped else prompt, codes, seen)

    return make


def _partly_random(codes: Tensor, part: float, builder: SequenceBuilder) -> Tensor:
    """Replace all codes of some positions of `[N, D, h, w]` by random codes."""
    sizes = builder.vocabulary.codebook_sizes
    noise = torch.stack(
        [torch.randint(size, book.shape, dtype=book.dtype) for size, book in zip(sizes, codes, strict=True)]
    )
    return torch.where(torch.rand(codes.shape[-2:]) < part, noise, codes)


STAGE = Stage(
    name="sft",
    section="sft",
    inputs=("tokenize", "pretrain"),
    run=run,
    version=4,  # text is never markup, and no longer than the model reads
)
