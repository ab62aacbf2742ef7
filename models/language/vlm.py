"""The unified vision-language model: a causal language model that reads and writes visual codes.

Shape legend: B batch, T tokens, H channels, V visual positions, N books, D depth, K codebook size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from models.config import Config, CountsByContent, Fraction
from models.language.sampling import SamplingConfig, guided, pick
from models.language.visual_codes import VisualCodes
from models.language.vocabulary import Vocabulary
from models.published import reading_published, refuse_missing, refuse_not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

IGNORED = -100
"""Label of a position that does not enter the loss."""
LossAverage = Literal["token", "sequence"]


class LlmConfig(Config):
    """The base language model: any causal LM of transformers, or a small Qwen2 with random weights."""

    base: Annotated[str, CountsByContent()] = "small"
    """`small`, or the hub id or folder of a causal LM (Qwen/Qwen2.5-7B, 01-ai/Yi-1.5-9B, ...). The sizes and the
    dropout below apply to `small` only."""
    hidden_size: PositiveInt = 256
    """Channels of the hidden states."""
    num_layers: PositiveInt = 4
    """Number of decoder layers."""
    num_heads: PositiveInt = 4
    """Number of attention heads."""
    intermediate_size: PositiveInt = 768
    """Hidden channels of the gated MLP."""
    dropout: Fraction = 0.0
    """Dropout of attention weights."""
    bpe_vocab_size: PositiveInt = 2048
    """Largest vocabulary of the BPE that is trained on the texts of the code table."""
    max_positions: PositiveInt = 1024
    """Length of the longest sequence, in tokens."""
    visual_init: Literal["codebook", "random"] = "codebook"
    """Initial embedding and head rows of visual codes: `codebook` maps each code's vector through one random matrix, so
    that similar codes start with similar rows; `random` initialises each row independently, as is always done for codes
    of another project, whose vectors are unknown. Rows that `base` has learned already (a model of this project) are
    kept. This sets the initial weights only, not the architecture."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation that transformers uses."""

    @model_validator(mode="after")
    def _check_heads(self) -> LlmConfig:
        if self.base == "small" and self.hidden_size % (2 * self.num_heads):  # rotary embeddings turn pairs of channels
            raise ValueError(
                f"hidden_size={self.hidden_size} does not give each of num_heads={self.num_heads} the same even number "
                f"of channels; make it a multiple of {2 * self.num_heads}"
            )
        return self


def build_small_llm(config: LlmConfig, vocabulary: Vocabulary) -> PreTrainedModel:
    """Build a causal LM of the Qwen2 architecture with random weights over the extended vocabulary."""
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
    """Load a published causal LM in float32, and its tokenizer, by hub id or folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with reading_published("pretrain.llm.base", config.base):
        model, info = AutoModelForCausalLM.from_pretrained(
            config.base, dtype=torch.float32, attn_implementation=config.attention, output_loading_info=True
        )
        refuse_missing(info)
        refuse_not_finite(model.state_dict())
        return model, AutoTokenizer.from_pretrained(config.base)


def extend_llm(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Resize embedding and head of a published LM to the extended vocabulary; new rows are set to the mean of the old.

    The rows of markers stay there; `start_visual_rows` initialises those of codes.
    """
    if model.get_input_embeddings().weight.shape[0] < vocabulary.size:
        model.resize_token_embeddings(vocabulary.size, mean_resizing=True)


@torch.no_grad()
def start_visual_rows(
    model: PreTrainedModel, vocabulary: Vocabulary, codebook: Tensor | None, known_codes: int = 0
) -> None:
    """Initialise the visual rows of embedding and head with a random linear map of the codebook, or independently.

    They get the standard deviation of the rows of text, so that the rest of the model sees inputs of the usual scale.

    Args:
        model: over the extended vocabulary, changed in place.
        vocabulary: the vocabulary of the model.
        codebook: `[K, C]` vectors of the codes; None initialises each row independently.
        known_codes: number of first codes whose rows the model has learned already; they stay as they are.
    """
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is model.get_output_embeddings() and layer.weight is model.get_input_embeddings().weight:
            continue  # tied weights: one table
        rows = layer.weight[vocabulary.first_code : vocabulary.first_code + vocabulary.num_code_tokens]
        if codebook is None:
            start = torch.randn(rows.shape)
        else:
            directions = codebook / codebook.norm(dim=1).mean()
            start = directions @ torch.randn(codebook.shape[1], rows.shape[1])
        text = layer.weight[: vocabulary.first_code]
        rows[known_codes:] = text.std() * start[known_codes:]


class ImageCodes(NamedTuple):
    """Codes at the visual positions of a batch, in the order of its rows and positions."""

    shown: Tensor
    """`[V, N, D]` int64 codes that the model reads."""
    wanted: Tensor
    """`[V, N, D]` int64 codes that are the targets of the loss at these positions."""


class UnifiedVlm(nn.Module):
    """A causal language model that reads and writes text and images.

    With one code per position it is the language model itself with a longer vocabulary. With several, the visual
    positions have their own input projections and output heads (`VisualCodes`).
    """

    def __init__(self, llm: PreTrainedModel, vocabulary: Vocabulary, visual: VisualCodes | None = None) -> None:
        """
        Args:
            llm: any causal LM of transformers over the vocabulary.
            vocabulary: the ids of markers and codes.
            visual: projections and heads, needed if the vocabulary has several codes per position.

        Raises:
            ValueError: `visual` is missing, or is given although each code has its own token.
        """
        super().__init__()
        if vocabulary.one_code != (visual is None):
            raise ValueError(
                f"codes of shape {vocabulary.code_shape} with visual={visual is not None}: `visual` is needed exactly "
                f"where a position has several codes"
            )
        self.llm, self.vocabulary, self.visual = llm, vocabulary, visual

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def embed(self, token_ids: Tensor, codes: Tensor | None = None) -> Tensor:
        """Embed token ids `[B, T]`, and codes `[V, N, D]` of their visual positions, as inputs `[B, T, H]`.

        Codes are needed if a position has several of them, and ignored otherwise.
        """
        inputs: Tensor = self.llm.get_input_embeddings()(token_ids)
        if self.visual is None or codes is None:
            return inputs
        # autocast returns half precision, but the residual stream that starts here has to keep the model's precision
        visual = self.visual.embed(codes).to(inputs.dtype)
        return inputs.masked_scatter(self._is_visual(token_ids)[..., None], visual)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Embed codes `[V, N, D]` as inputs `[V, H]`."""
        if self.visual is not None:
            return self.visual.embed(codes).to(self.llm.get_input_embeddings().weight.dtype)
        inputs: Tensor = self.llm.get_input_embeddings()(self.vocabulary.code_ids(codes[:, 0, 0]))
        return inputs

    def draw(self, hidden: Tensor, config: SamplingConfig, generator: torch.Generator) -> Tensor:
        """Sample the codes of the next visual position.

        Args:
            hidden: `[B, H]` hidden states; with guidance `[2B, H]`, the conditional ones before the unconditional ones.
            config: sampling settings.
            generator: random generator on the CPU.

        Returns:
            `[B, N, D]` int64.
        """
        if self.visual is not None:
            return self.visual.draw(hidden, config, generator)
        first, count = self.vocabulary.first_code, self.vocabulary.num_code_tokens
        head = self.llm.get_output_embeddings().weight[first : first + count]
        logits = (hidden.to(head.dtype) @ head.T).float()  # [B or 2B, K]
        return pick(guided(logits, config), config, generator)[:, None, None]

    def losses(
        self, token_ids: Tensor, labels: Tensor, attention_mask: Tensor, codes: ImageCodes | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the cross-entropy of each labelled position, `[L]` nats, and the row it belongs to, `[L]`.

        Only labelled positions pass through a head, since the vocabulary is large and most positions of an
        understanding sequence have no loss. A visual position with several codes counts as one, with the sum of their
        losses.

        Args:
            token_ids: `[B, T]` int64.
            labels: `[B, T]`, `IGNORED` at positions without a loss; not shifted.
            attention_mask: `[B, T]`, 0 at padding.
            codes: codes at the visual positions, if a position has several codes.
        """
        inputs = self.embed(token_ids, codes.shown if codes is not None else None)
        hidden = self.llm.base_model(
            inputs_embeds=inputs, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        before, targets = hidden[:, :-1], labels[:, 1:]
        chosen = targets != IGNORED
        text = chosen if self.visual is None else chosen & ~self._is_visual(targets)
        logits = self.llm.get_output_embeddings()(before[text])
        losses = F.cross_entropy(logits.float(), targets[text], reduction="none")
        rows = text.nonzero()[:, 0]
        if self.visual is None or codes is None:
            return losses, rows
        visual = chosen & self._is_visual(targets)
        wanted = codes.wanted[visual[self._is_visual(token_ids)[:, 1:]]]  # an image is never the first token
        drawn = self.visual.losses(before[visual], wanted)
        return torch.cat([losses, drawn]), torch.cat([rows, visual.nonzero()[:, 0]])

    def _is_visual(self, token_ids: Tensor) -> Tensor:
        return token_ids == self.vocabulary.first_code


def next_token_loss(
    vlm: UnifiedVlm,
    token_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor,
    codes: ImageCodes | None = None,
    *,
    average: LossAverage = "token",
) -> Tensor:
    """Return the mean cross-entropy of the next token over the positions that have a label.

    Args:
        vlm: the model.
        token_ids: `[B, T]` int64.
        labels: `[B, T]`, `IGNORED` at positions without a loss; not shifted. Each row needs at least one label.
        attention_mask: `[B, T]`, 0 at padding.
        codes: codes at the visual positions, if a position has several codes.
        average: `token` averages over the labelled tokens of the batch; `sequence` averages the means of its sequences.

    Returns:
        Scalar, nats.
    """
    losses, rows = vlm.losses(token_ids, labels, attention_mask, codes)
    return losses.mean() if average == "token" else _row_means(losses, rows, len(token_ids)).mean()


@torch.no_grad()
def mean_log_likelihood(
    vlm: UnifiedVlm, token_ids: Tensor, labels: Tensor, attention_mask: Tensor, codes: ImageCodes | None = None
) -> Tensor:
    """Return the mean log-likelihood of the labelled part of each sequence; arguments as for `next_token_loss`.

    Returns:
        `[B]` float32, nats per token.
    """
    losses, rows = vlm.losses(token_ids, labels, attention_mask, codes)
    return -_row_means(losses, rows, len(token_ids))


def _row_means(values: Tensor, rows: Tensor, count: int) -> Tensor:
    sums = torch.zeros(count, device=values.device).index_add_(0, rows, values)
    return sums / torch.bincount(rows, minlength=count)
