"""Generating images and answering questions with a unified model, token by token with a KV cache.

Shape legend: B batch, T tokens, V visual positions, N books, D depth, h w code grid.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from models.language.sampling import SamplingConfig
from models.language.vlm import UnifiedVlm


@torch.no_grad()
def draw_codes(
    vlm: UnifiedVlm,
    prompts: list[list[int]],
    unconditional: list[int],
    config: SamplingConfig,
    generator: torch.Generator,
    *,
    on_position: Callable[[], object] = lambda: None,
) -> Tensor:
    """Sample the codes of one image per prompt, position by position, computing only the logits of codes.

    Args:
        vlm: the model, in eval mode.
        prompts: token ids of each prompt, up to and including `soi`.
        unconditional: token ids of the prompt without text, up to and including `soi`.
        config: sampling settings.
        generator: random generator on the CPU.
        on_position: called after each of the `vlm.vocabulary.num_positions` positions.

    Returns:
        `[B, N, D, h, w]` int64 codes.
    """
    copies = 1 if config.guidance == 1.0 else 2
    rows = prompts + [unconditional] * len(prompts) * (copies - 1)
    token_ids, mask = _left_padded(rows, vlm.vocabulary.pad)
    token_ids, mask = token_ids.to(vlm.device), mask.to(vlm.device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    inputs, cache = vlm.embed(token_ids), None
    drawn: list[Tensor] = []
    for _ in range(vlm.vocabulary.num_positions):
        output: Any = vlm.llm.base_model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        codes = vlm.draw(output.last_hidden_state[:, -1], config, generator)  # [B, N, D]
        drawn.append(codes)
        inputs = vlm.embed_codes(codes.repeat(copies, 1, 1))[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
        on_position()
    return torch.stack(drawn, dim=-1).unflatten(-1, vlm.vocabulary.code_shape[2:])


@torch.no_grad()
def answer_tokens(
    vlm: UnifiedVlm, prompt: list[int], codes: Tensor | None, *, max_tokens: int, control_ids: Collection[int] = ()
) -> list[int]:
    """Decode an answer greedily up to the end of the sequence; it is text only, never codes or markers.

    Args:
        vlm: the model, in eval mode.
        prompt: token ids up to and including `assistant`.
        codes: `[V, N, D]` codes of the prompt's visual positions, if a position has several codes.
        max_tokens: largest number of tokens of the answer.
        control_ids: control tokens that a published tokenizer has besides our markers (`PlainText.control_ids`).

    Returns:
        Token ids, without the end-of-sequence token.
    """
    vocabulary = vlm.vocabulary
    forbidden = {vocabulary.pad, vocabulary.user, vocabulary.assistant, vocabulary.soi, vocabulary.eoi}
    forbidden |= {index for index in control_ids if index < vocabulary.first_code}
    forbidden.discard(vocabulary.eos)  # some published LMs pad with the end-of-sequence token
    shown = codes if codes is None else codes.to(vlm.device)
    inputs = vlm.embed(torch.tensor([prompt], device=vlm.device), shown)
    cache, answer = None, list[int]()
    for _ in range(max_tokens):
        output: Any = vlm.llm(inputs_embeds=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logits = output.logits[0, -1].float()
        logits[vocabulary.first_code :] = float("-inf")
        logits[list(forbidden)] = float("-inf")
        token = int(logits.argmax())
        if token == vocabulary.eos:
            break
        answer.append(token)
        inputs = vlm.embed(torch.tensor([[token]], device=vlm.device))
    return answer


def _left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad token ids on the left to `[B, T]`, so that all rows end together; return them and their attention mask."""
    longest = max(len(row) for row in rows)
    token_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return token_ids, mask
