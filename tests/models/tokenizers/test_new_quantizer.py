"""A kind of quantizer is one config class that builds it, and its line in the union of `QuantizerConfig`."""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal

import pytest
import torch
from pydantic import PositiveInt, Tag, ValidationError, create_model
from torch import Tensor

from models.config import Config, told_apart_by_kind
from models.teachers.teacher import Teacher
from models.tokenizers.config import TokenFlowConfig, TokenizerConfig, VqganConfig
from models.tokenizers.kinds import KINDS
from models.tokenizers.one_code import OneCodeTokenizer
from models.tokenizers.quantizers import Quantized, Quantizer, VectorQuantizer, VectorQuantizerConfig


class FiniteScalarConfig(Config):
    """Finite scalar quantization (arXiv 2309.15505): each channel is rounded to one of a few levels."""

    kind: Literal["finite_scalar"]
    levels: tuple[PositiveInt, ...]

    @property
    def codebook_size(self) -> int:
        return prod(self.levels)

    @property
    def code_dim(self) -> int:
        return len(self.levels)

    def build(self) -> Quantizer:
        return FiniteScalarQuantizer(self)


class FiniteScalarQuantizer(Quantizer):
    steps: Tensor
    places: Tensor

    def __init__(self, config: FiniteScalarConfig) -> None:
        super().__init__()
        levels = torch.tensor(config.levels)
        self.register_buffer("steps", levels - 1)
        self.register_buffer("places", levels.cumprod(0) // levels)

    def forward(self, vectors: Tensor) -> Quantized:
        scaled = (vectors.float().tanh() + 1) / 2 * self.steps
        digits = scaled.round()
        codes = (digits.long() * self.places).sum(-1)
        return Quantized(self._centred(scaled + (digits - scaled).detach()), codes, vectors.new_zeros(()))

    def lookup(self, codes: Tensor) -> Tensor:
        return self._centred(codes[..., None] // self.places % (self.steps + 1))

    def _centred(self, digits: Tensor) -> Tensor:
        return digits / self.steps * 2 - 1


WithFiniteScalar = Annotated[
    Annotated[VectorQuantizerConfig, Tag("nearest")] | Annotated[FiniteScalarConfig, Tag("finite_scalar")],
    told_apart_by_kind("nearest"),
]
"""What a line makes of `QuantizerConfig`."""


def make(kind: str, teacher: Teacher | None, quantizer: dict[str, object]) -> OneCodeTokenizer:
    tokenizer_class = KINDS[kind]
    config_class = create_model("Config", __base__=tokenizer_class.config_class, quantizer=WithFiniteScalar)
    conv = {"channels": 16, "channel_multipliers": (1, 1, 2), "encoder_blocks": 1, "decoder_blocks": 1}
    values = {"transform": {"image_size": 32}, "conv": conv | {"latent_channels": 8}, "quantizer": quantizer}
    if kind != "vqgan":
        values["semantic_decoder"] = {"width": 16, "depth": 1, "heads": 2}
    tokenizer = tokenizer_class(config_class.model_validate(values), teacher)
    assert isinstance(tokenizer, OneCodeTokenizer)
    return tokenizer


@pytest.mark.parametrize("kind", ["sde", "semantic", "vqgan"])
def test_a_class_and_a_line_are_a_quantizer(kind: str, stub_teacher: Teacher) -> None:
    torch.manual_seed(0)
    tokenizer = make(kind, stub_teacher, {"kind": "finite_scalar", "levels": [8, 5, 5]})
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    output = tokenizer(images)
    output.reconstruction.square().mean().backward()
    assert kind == "semantic" or float(tokenizer.pre_quant.weight.grad.abs().sum()) > 0, "gradients pass through"
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 1, 1, 8, 8) and int(codes.min()) >= 0 and int(codes.max()) < 200
    assert tokenizer.codebook_sizes == (200,) and tokenizer.codebooks[0].shape == (1, 200, 3)
    torch.testing.assert_close(tokenizer.codebooks[0][0][codes[:, 0, 0]], tokenizer.code_embeddings(codes))
    torch.testing.assert_close(tokenizer.decode(codes), output.reconstruction.clamp(-1, 1))


def test_the_quantizer_that_needs_no_name_is_the_nearest_code() -> None:
    tokenizer = make("vqgan", None, {"codebook_size": 16, "code_dim": 4})
    assert isinstance(tokenizer.quantizer, VectorQuantizer)


@pytest.mark.parametrize("config_class", [VqganConfig, TokenFlowConfig])
def test_a_kind_without_a_line_is_refused(config_class: type[TokenizerConfig]) -> None:
    with pytest.raises(ValidationError, match="finite_scalar"):
        config_class.model_validate({"quantizer": {"kind": "finite_scalar", "levels": [8, 5]}})
