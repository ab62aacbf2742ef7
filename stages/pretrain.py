"""Pretraining: image-text pairs in both orders, next-token loss on every token (MUSE-VL, section 3.2, stage 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import PositiveInt

from models.config import Fraction
from models.vlm import LlmConfig, build_small_llm, extend_llm, load_base_llm, start_from_codebook
from models.vocabulary import Vocabulary, extend_tokenizer, train_bpe
from stages.loading import load_tokenizer
from stages.sequences import Sequence, SequenceBuilder
from stages.stage import Outcome, Stage, StageContext
from stages.standalone import run_standalone
from stages.training import LoopConfig, mix_seed, train
from stages.vlm_training import CodedRows, SequenceMaker, VlmTraining, load_rows, put_vlm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class PretrainConfig(LoopConfig):
    """The language model and its pretraining."""

    llm: LlmConfig = LlmConfig()
    """The base language model."""
    image_first_fraction: Fraction = 0.5
    """Part of the pairs that are written image first; the others text first."""
    caption_dropout: Fraction = 0.1
    """Part of the text-first pairs whose text is left out, which makes guidance possible."""
    extra_texts: tuple[str, ...] = ()
    """Texts that the BPE of a small LLM also sees, for example the questions of fine-tuning."""
    steps: PositiveInt = 1000
    """Optimiser steps."""


def run(context: StageContext[PretrainConfig]) -> Outcome:
    """Make the `vlm` artifact: a plain Hugging Face folder, `vocabulary.json` and loss curves."""
    config = context.config
    rows = load_rows(context.store, context.inputs["tokenize"], split="train", views=True)
    torch.manual_seed(mix_seed(context.seed, "llm"))
    model, tokenizer, vocabulary = build_unified(config, rows)
    if config.llm.visual_init == "codebook":
        image_tokenizer = load_tokenizer(context.store, rows.info.tokenizer_digest)
        start_from_codebook(model, vocabulary, image_tokenizer.codebook)
    training = VlmTraining(
        config, context.seed, model, SequenceBuilder(tokenizer, vocabulary), rows, _sequence_maker(config)
    )
    history = train(context, training, config)
    files = [*put_vlm(context, training.model, tokenizer, vocabulary), history.save(context)]
    metadata = {"tokenizer": rows.info.tokenizer_digest, "vocabulary_size": vocabulary.size}
    return Outcome("vlm", files, metrics={"loss": history.points[-1][2]}, metadata=metadata)


def build_unified(
    config: PretrainConfig, rows: CodedRows
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Vocabulary]:
    """The language model with its vocabulary grown by the codes of a table.

    Raises:
        ValueError: the table has several codes a position, which one vocabulary cannot hold.
    """
    books, depth, height, width = rows.info.code_shape
    if books * depth != 1:
        raise ValueError(
            f"the code table has {books} books of depth {depth}; an LLM with one longer vocabulary takes one code a "
            f"position: use a tokenizer with one codebook"
        )
    if config.llm.base == "small":
        texts = [text for values in rows.columns.values() for text in values]
        tokenizer = train_bpe([*texts, *config.extra_texts], config.llm.bpe_vocab_size)
        vocabulary = extend_tokenizer(tokenizer, rows.info.codebook_sizes[0], (height, width))
        return build_small_llm(config.llm, vocabulary), tokenizer, vocabulary
    model, tokenizer = load_base_llm(config.llm)
    vocabulary = extend_tokenizer(tokenizer, rows.info.codebook_sizes[0], (height, width))
    extend_llm(model, vocabulary)
    return model, tokenizer, vocabulary


def _sequence_maker(config: PretrainConfig) -> SequenceMaker:
    def make(builder: SequenceBuilder, rows: CodedRows, index: int) -> Sequence:
        image_first, dropped = torch.rand(2).tolist()
        first = image_first < config.image_first_fraction
        text = "" if not first and dropped < config.caption_dropout else rows.columns["text"][index]
        seen = index if first else rows.originals[index]  # a turned or moved picture is read, but not what to draw
        return builder.pretraining(text, rows.codes[seen, 0, 0], image_first=first)

    return make


STAGE = Stage(name="pretrain", section="pretrain", config_class=PretrainConfig, inputs=("tokenize",), run=run)

if __name__ == "__main__":
    raise SystemExit(run_standalone(STAGE.name))
