"""Pretraining on image-text pairs in both orders, next-token loss on all tokens (MUSE-VL, section 3.2, stage 1)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from pydantic import PositiveInt

from models.config import Fraction
from models.language.visual_codes import VisualCodesConfig
from models.language.vlm import LlmConfig, UnifiedVlm, build_small_llm, extend_llm, load_base_llm, start_visual_rows
from models.language.vocabulary import count_codes, extend_tokenizer, train_bpe
from models.ranks import is_first_rank
from stages.artifacts import external_codes
from stages.artifacts.codes import CodedRows, load_rows
from stages.artifacts.models import load_tokenizer
from stages.artifacts.rows import TRAIN
from stages.language.sequences import Sequence, SequenceBuilder
from stages.language.training import (
    SequenceMaker,
    VlmLoopConfig,
    VlmTraining,
    build_visual,
    longest_sequence,
    put_vlm,
    vlm_outcome,
)
from stages.protocol import Outcome, Stage, StageContext
from stages.runtime.seeds import mix_seed
from stages.training.loop import train
from stages.training.shared import run_shared
from storage.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


logger = logging.getLogger(__name__)


class PretrainConfig(VlmLoopConfig):
    """The language model and its pretraining."""

    llm: LlmConfig = LlmConfig()
    """The base language model."""
    visual: VisualCodesConfig = VisualCodesConfig()
    """Depth transformers for tokenizers with several codes per position."""
    image_first_fraction: Fraction = 0.5
    """Fraction of the pairs with the image first; the others have the text first."""
    caption_dropout: Fraction = 0.1
    """Fraction of the text-first pairs whose text is dropped, which enables classifier-free guidance."""
    extra_texts: tuple[str, ...] = ()
    """Additional training texts for the BPE of a small LLM, for example the questions of fine-tuning."""
    steps: PositiveInt = 1000
    """Number of optimiser steps."""


def run(context: StageContext[PretrainConfig]) -> Outcome:
    """Make the `vlm` artifact: a Hugging Face folder, `vocabulary.json` and loss curves."""
    return run_shared(context, _train)


def _train(context: StageContext[PretrainConfig]) -> Outcome | None:
    config = context.config
    rows = load_rows(context.store, context.inputs["tokenize"], split=TRAIN, views=True)
    torch.manual_seed(mix_seed(context.seed, "llm"))
    vlm, tokenizer = build_unified(config, context.store, rows)
    builder = SequenceBuilder(tokenizer, vlm.vocabulary, longest_sequence(config.max_tokens, vlm.llm, tokenizer))
    training = VlmTraining(config, context.seed, vlm, builder, rows, _sequence_maker(config), _texts_of)
    history = train(context, training, config)
    if not is_first_rank():
        return None
    files = [*put_vlm(context, training.vlm, tokenizer), history.save(context)]
    return vlm_outcome(training, files, history)


def build_unified(config: PretrainConfig, store: Store, rows: CodedRows) -> tuple[UnifiedVlm, PreTrainedTokenizerFast]:
    """Build the language model with a vocabulary extended by a table's codes, or with depth transformers for them."""
    info = rows.info
    known_codes = 0
    if config.llm.base == "small":
        texts = [text for values in rows.columns.values() for text in values]
        tokenizer = train_bpe([*texts, *config.extra_texts], config.llm.bpe_vocab_size)
        vocabulary = extend_tokenizer(tokenizer, info.codebook_sizes, info.code_shape)
        llm = build_small_llm(config.llm, vocabulary)
    else:
        llm, tokenizer = load_base_llm(config.llm)
        known_codes = count_codes(tokenizer)
        vocabulary = extend_tokenizer(tokenizer, info.codebook_sizes, info.code_shape)
        extend_llm(llm, vocabulary)
    if not vocabulary.one_code:
        codebooks = load_tokenizer(store, info.tokenizer_digest).codebooks
        return UnifiedVlm(llm, vocabulary, build_visual(config.visual, llm, codebooks, vocabulary)), tokenizer
    if known_codes:
        logger.info("%s knows %d codes already: their rows are kept", config.llm.base, known_codes)
    codebook = None
    if config.llm.visual_init == "codebook" and store.load(info.tokenizer_digest).kind != external_codes.KIND:
        codebook = load_tokenizer(store, info.tokenizer_digest).codebooks[0][0]
    start_visual_rows(llm, vocabulary, codebook, known_codes)
    return UnifiedVlm(llm, vocabulary), tokenizer


def _texts_of(row: dict[str, str]) -> list[tuple[str, ...]]:
    return [(row["text"],)]


def _sequence_maker(config: PretrainConfig) -> SequenceMaker:
    def make(builder: SequenceBuilder, rows: CodedRows, index: int) -> Sequence:
        image_first, dropped = torch.rand(2).tolist()
        first = image_first < config.image_first_fraction
        text = "" if not first and dropped < config.caption_dropout else rows.columns["text"][index]
        seen = index if first else rows.originals[index]  # augmented views are used as input only, never as targets
        return builder.pretraining(text, rows.codes[seen], image_first=first)

    return make


STAGE = Stage(
    name="pretrain",
    section="pretrain",
    inputs=("tokenize",),
    run=run,
    version=5,  # text is never markup, and no longer than the model reads; how rows of a published model's codes start
)
