"""Drawing images and answering questions with a unified model, token by token with a KV cache.

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
    """Draw one image a prompt, position by position; while an image is drawn only the logits of codes are computed.

    Args:
        vlm: in eval mode.
        prompts: token ids of each prompt, up to and with `soi`.
        unconditional: token ids of the prompt without text, up to and with `soi`.
        config: sampling settings.
        generator: source of randomness, on the CPU.
        on_position: called after each position, of which there are `vlm.vocabulary.num_positions`.

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
    """The likeliest next token again and again, up to the end of the sequence; text only, never codes or markers.

    Args:
        vlm: in eval mode.
        prompt: token ids up to and with `assistant`.
        codes: `[V, N, D]` of its visual positions, where they have several codes.
        max_tokens: longest answer.
        control_ids: what a published tokenizer has beside our markers that is no text (`PlainText.control_ids`).

    Returns:
        Token ids without the end.
    """
    vocabulary = vlm.vocabulary
    forbidden = {vocabulary.pad, vocabulary.user, vocabulary.assistant, vocabulary.soi, vocabulary.eoi}
    forbidden |= {index for index in control_ids if index < vocabulary.first_code}
    forbidden.discard(vocabulary.eos)  # some published LMs pad with the end of the sequence
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
    """Token ids `[B, T]` padded on the left, so that all rows end together, and their mask."""
    longest = max(len(row) for row in rows)
    token_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return token_ids, mask
