"""LlamaGen's checkpoint layout: the same codes and pictures as a network that is written out under its names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.convolutional import ConvConfig
from models.image_tokenizer import TokenizerConfig
from models.import_llamagen import convert_llamagen
from models.quantizers import QuantizerConfig
from models.tokenizers import build_tokenizer
from models.transforms import TransformConfig
from tests.llamagen import CODES, DIM, LATENT, MULTIPLIERS, WIDTH, Reference


def config(**fields: Any) -> TokenizerConfig:
    conv = ConvConfig(
        channels=WIDTH, channel_multipliers=MULTIPLIERS, encoder_blocks=2, decoder_blocks=3, latent_channels=LATENT
    )
    quantizer = QuantizerConfig(codebook_size=CODES, code_dim=DIM, update="gradient")
    defaults: dict[str, Any] = {"kind": "vqgan", "conv": conv, "quantizer": quantizer}
    return TokenizerConfig(transform=TransformConfig(image_size=16), **(defaults | fields))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.mark.parametrize("update", ["gradient", "ema"])
@torch.no_grad()
def test_codes_and_pictures_are_the_references(reference: Reference, update: str) -> None:
    quantizer = QuantizerConfig(codebook_size=CODES, code_dim=DIM, update=update)
    tokenizer = build_tokenizer(config(quantizer=quantizer)).eval()
    state = {**reference.state, "quantize.codebook_used": torch.zeros(65536)}
    tokenizer.load_state_dict(convert_llamagen({"model": state}, tokenizer.config), strict=True)
    codes = reference.encode(reference.images)
    assert torch.equal(tokenizer.encode(reference.images)[:, 0, 0], codes)
    drawn = reference.decode(codes).clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode(codes[:, None, None]), drawn, atol=1e-4, rtol=1e-4)


def test_keys_that_do_not_fit_are_named(reference: Reference) -> None:
    damaged = dict(reference.state)
    del damaged["decoder.mid.1.q.weight"]
    with pytest.raises(ValueError, match=r"lacks the keys decoder\.mid\.1\.q\.weight;.*fetch the file again"):
        convert_llamagen(damaged, config())
    with pytest.raises(ValueError, match=r"has keys that this recipe's tokenizer does not text\.a"):
        convert_llamagen({**reference.state, "text.a": torch.zeros(1)}, config())
    for other in ([1, 2], {"model": 3}):
        with pytest.raises(ValueError, match="no dict of tensors"):
            convert_llamagen(other, config())
    with pytest.raises(ValueError, match="lacks the keys .* and [0-9]+ more"):
        convert_llamagen({"weight": torch.zeros(1)}, config())


def test_shapes_that_do_not_fit_are_named(reference: Reference) -> None:
    larger = QuantizerConfig(codebook_size=2 * CODES, code_dim=DIM, update="gradient")
    with pytest.raises(ValueError, match=r"'quantize.embedding.weight' has shape \(24, 4\).*needs \(48, 4\)"):
        convert_llamagen(reference.state, config(quantizer=larger))


def test_another_kind_is_refused(reference: Reference) -> None:
    with pytest.raises(ValueError, match="kind=vqgan, the recipe has sde"):
        convert_llamagen(reference.state, config(kind="sde"))
