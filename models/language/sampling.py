"""Sampling of codes from logits: guidance, temperature, top-k, top-p. Shape legend: B batch, K codebook size."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, field_validator
from torch import Tensor

from models.config import Config, Fraction


class SamplingConfig(Config):
    """How codes are sampled from the language model's logits."""

    guidance: Annotated[float, Field(ge=0, le=1000)] = 3.0
    """Scale s of classifier-free guidance, `u + s (c - u)` (LlamaGen's convention); 1 is no guidance. Show-o's
    `(1 + w) c - w u` is s = 1 + w."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Divisor of the logits; 0 always takes the likeliest code."""
    top_k: NonNegativeInt = 0
    """Number of likeliest codes that are sampled from; 0 means all."""
    top_p: Fraction = 1.0
    """Nucleus sampling: only the smallest set of codes with at least this total probability is sampled from."""

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, temperature: float) -> float:
        if 0 < temperature < 0.001:
            raise ValueError("input should be 0, or at least 0.001: logits over a smaller number are infinite")
        return temperature


def guided(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Apply guidance to logits `[2B, K]`, conditional ones before unconditional ones; without guidance to `[B, K]`."""
    if config.guidance == 1.0:
        return logits
    conditional, without = logits.chunk(2)
    return without + config.guidance * (conditional - without)


def pick(logits: Tensor, config: SamplingConfig, generator: torch.Generator) -> Tensor:
    """Sample an index from each row of `[B, K]` logits; returns `[B]` int64."""
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
        outside[:, 0] = False  # so does the likeliest, even with top_p=0
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered.masked_fill(outside, 0.0))
    # sampled on the CPU, so that a seed gives the same sample on every device
    return torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(logits.device)
