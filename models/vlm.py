"""The unified vision-language model: an unmodified causal language model with a longer vocabulary.

Shape legend: B batch, T tokens, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from models.config import Config, Fraction
from models.torchvision_compat import make_torchvision_importable
from models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

IGNORED = -100
"""Label of a position that has no loss."""
LossAverage = Literal["token", "sequence"]


class LlmConfig(Config):
    """The base language model: any causal LM of transformers, or a small Qwen2 with random weights."""

    base: str = "small"
    """`small`, or the hub id or folder of a causal LM (Qwen/Qwen2.5-7B, 01-ai/Yi-1.5-9B, ...); only `small` reads the
    fields below."""
    hidden_size: PositiveInt = 256
    """Channels."""
    num_layers: PositiveInt = 4
    """Decoder layers."""
    num_heads: PositiveInt = 4
    """Attention heads."""
    intermediate_size: PositiveInt = 768
    """Channels of the gated MLP."""
    dropout: Fraction = 0.0
    """Dropout of attention weights."""
    bpe_vocab_size: PositiveInt = 2048
    """Most tokens of the BPE that is trained on the texts of the code table."""
    max_positions: PositiveInt = 1024
    """Longest sequence, tokens."""
    visual_init: Literal["codebook", "random"] = "codebook"
    """Where the rows of visual codes start: `codebook` maps each code's vector through one random matrix, so that
    codes that look alike begin alike; `random` starts each row on its own. It changes a beginning, not the model."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""


def build_small_llm(config: LlmConfig, vocabulary: Vocabulary) -> PreTrainedModel:
    """A Qwen2-architecture causal LM with random weights over the extended vocabulary."""
    make_torchvision_importable()
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary.size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=config.max_positions,
            attention_dropout=config.dropout,
            tie_word_embeddings=False,
            pad_token_id=vocabulary.pad,
            bos_token_id=None,
            eos_token_id=vocabulary.eos,
            attn_implementation=config.attention,
        )
    )


def load_base_llm(config: LlmConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A published causal LM and its tokenizer, by hub id or folder, in float32."""
    make_torchvision_importable()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32, attn_implementation=config.attention)
    return model, AutoTokenizer.from_pretrained(config.base)


def extend_llm(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Grow embedding and head of a published LM to the extended vocabulary; new rows start at the mean of the old."""
    if model.get_input_embeddings().weight.shape[0] < vocabulary.size:
        model.resize_token_embeddings(vocabulary.size, mean_resizing=True)


@torch.no_grad()
def start_from_codebook(model: PreTrainedModel, vocabulary: Vocabulary, codebook: Tensor) -> None:
    """Set the visual rows of embedding and head to a random linear image of the codebook.

    The rows get the spread of the rows that are there, so the rest of the model sees what it would see otherwise.

    Args:
        model: over the extended vocabulary, changed in place.
        vocabulary: ids.
        codebook: `[K, C]` vectors of the codes.
    """
    directions = codebook / codebook.norm(dim=1).mean()
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is model.get_output_embeddings() and layer.weight is model.get_input_embeddings().weight:
            continue  # tied: one table
        rows = layer.weight[vocabulary.first_code : vocabulary.first_code + vocabulary.codebook_size]
        rows.copy_(rows.std() * directions @ torch.randn(codebook.shape[1], rows.shape[1]))


def next_token_loss(
    model: PreTrainedModel,
    token_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor,
    *,
    average: LossAverage = "token",
) -> Tensor:
    """Mean cross-entropy of the next token over the positions that have a label.

    Args:
        model: any causal LM of transformers.
        token_ids: `[B, T]` int64.
        labels: `[B, T]`, `IGNORED` where there is no loss; not shifted. Each row has a label.
        attention_mask: `[B, T]`, 0 at padding.
        average: over the `token`s of the batch, or over its sequences, each the mean over its own tokens.

    Returns:
        Scalar, nats.
    """
    losses, rows = _labelled_losses(model, token_ids, labels, attention_mask)
    return losses.mean() if average == "token" else _row_means(losses, rows, len(token_ids)).mean()


@torch.no_grad()
def mean_log_likelihood(model: PreTrainedModel, token_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean log-likelihood, in nats a token, of the labelled part of each sequence; arguments as `next_token_loss`.

    Returns:
        `[B]` float32.
    """
    losses, rows = _labelled_losses(model, token_ids, labels, attention_mask)
    return -_row_means(losses, rows, len(token_ids))


def _labelled_losses(
    model: PreTrainedModel, token_ids: Tensor, labels: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each labelled position, `[L]`, and the sequence that each belongs to, `[L]`.

    Only those positions meet the head: the vocabulary is long, and most of an understanding sequence has no loss.
    """
    hidden = model.base_model(input_ids=token_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    logits = model.get_output_embeddings()(hidden[:, :-1][chosen])
    return F.cross_entropy(logits.float(), targets[chosen], reduction="none"), chosen.nonzero()[:, 0]


def _row_means(values: Tensor, rows: Tensor, count: int) -> Tensor:
    sums = torch.zeros(count, device=values.device).index_add_(0, rows, values)
    return sums / torch.bincount(rows, minlength=count)
