"""Drawing images and answering questions with a unified model: KV cache, guidance, top-k, top-p, temperature.

Shape legend: B batch, T tokens, K codebook size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor

from models.config import Config, Fraction
from models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SamplingConfig(Config):
    """How codes are drawn."""

    guidance: float = 3.0
    """Scale s of `u + s (c - u)` (LlamaGen's convention); 1 is no guidance. Show-o's `(1 + w) c - w u` is s = 1 + w."""
    temperature: NonNegativeFloat = 1.0
    """Divides the logits; 0 always takes the likeliest code."""
    top_k: NonNegativeInt = 0
    """Only the likeliest codes are drawn from; 0 means all."""
    top_p: Fraction = 1.0
    """Only the smallest set of codes with at least this probability is drawn from."""


@torch.no_grad()
def draw_codes(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    prompts: list[list[int]],
    unconditional: list[int],
    config: SamplingConfig,
    generator: torch.Generator,
) -> Tensor:
    """Draw one image a prompt, code by code; while an image is drawn only the logits of codes are computed.

    Args:
        model: causal LM, in eval mode.
        vocabulary: ids.
        prompts: token ids of each prompt, up to and with `soi`.
        unconditional: token ids of the prompt without text, up to and with `soi`.
        config: sampling settings.
        generator: source of randomness, on the CPU.

    Returns:
        `[B, h, w]` int64 codes.
    """
    guided = config.guidance != 1.0
    rows = prompts + [unconditional] * len(prompts) if guided else prompts
    token_ids, mask = _left_padded(rows, vocabulary.pad)
    device = next(model.parameters()).device
    token_ids, mask = token_ids.to(device), mask.to(device)
    head = model.get_output_embeddings().weight[
        vocabulary.first_code : vocabulary.first_code + vocabulary.codebook_size
    ]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache: Any = None
    drawn: list[Tensor] = []
    for _ in range(vocabulary.num_codes):
        output = model.base_model(
            input_ids=token_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        last = output.last_hidden_state[:, -1]
        logits = (last.to(head.dtype) @ head.T).float()  # [B or 2B, K]
        if guided:
            conditional, without = logits.chunk(2)
            logits = without + config.guidance * (conditional - without)
        codes = pick(logits, config, generator)  # [B]
        drawn.append(codes)
        step = vocabulary.code_ids(codes)
        token_ids = (torch.cat([step, step]) if guided else step)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.stack(drawn, dim=1).view(-1, vocabulary.code_rows, vocabulary.code_columns)


def pick(logits: Tensor, config: SamplingConfig, generator: torch.Generator) -> Tensor:
    """Draw an index from each row of `[B, K]` logits; `[B]` int64."""
    if config.temperature == 0:
        return logits.argmax(1)
    logits = logits / config.temperature
    if config.top_k:
        kth = logits.topk(min(config.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probabilities = logits.softmax(1)
    if config.top_p < 1:
        ordered, order = probabilities.sort(1, descending=True)
        outside = ordered.cumsum(1) - ordered >= config.top_p  # the code that crosses the limit stays in
        outside[:, 0] = False  # and the likeliest, even with top_p=0
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered.masked_fill(outside, 0.0))
    # drawn on the CPU: a seed then means the same draw on every device
    return torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(logits.device)


@torch.no_grad()
def answer_tokens(model: PreTrainedModel, vocabulary: Vocabulary, prompt: list[int], *, max_tokens: int) -> list[int]:
    """The likeliest next token again and again, up to the end of the sequence; text only, never codes or markers.

    Args:
        model: causal LM, in eval mode.
        vocabulary: ids.
        prompt: token ids up to and with `assistant`.
        max_tokens: longest answer.

    Returns:
        Token ids without the end.
    """
    device = next(model.parameters()).device
    forbidden = {vocabulary.pad, vocabulary.user, vocabulary.assistant, vocabulary.soi, vocabulary.eoi}
    forbidden.discard(vocabulary.eos)  # some published LMs pad with the end of the sequence
    token_ids, cache, answer = torch.tensor([prompt], device=device), None, list[int]()
    for _ in range(max_tokens):
        output = model(input_ids=token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logits = output.logits[0, -1].float()
        logits[vocabulary.first_code :] = float("-inf")
        logits[list(forbidden)] = float("-inf")
        token = int(logits.argmax())
        if token == vocabulary.eos:
            break
        answer.append(token)
        token_ids = torch.tensor([[token]], device=device)
    return answer


def _left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids `[B, T]` padded on the left, so that all rows end together, and their mask."""
    longest = max(len(row) for row in rows)
    token_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return token_ids, mask
