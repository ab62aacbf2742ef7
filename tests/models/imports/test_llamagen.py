"""LlamaGen's checkpoint layout: the same codes and pictures as a network that is written out under its names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.imports.llamagen import convert_llamagen
from models.tokenizers.config import VqganConfig
from models.tokenizers.convolutional import ConvConfig
from models.tokenizers.kinds import build_tokenizer
from models.tokenizers.quantizers import VectorQuantizerConfig
from models.transforms import TransformConfig
from tests.helpers.llamagen import CODES, DIM, LATENT, MULTIPLIERS, WIDTH, Reference


def config(**fields: Any) -> VqganConfig:
    conv = ConvConfig(
        channels=WIDTH, channel_multipliers=MULTIPLIERS, encoder_blocks=2, decoder_blocks=3, latent_channels=LATENT
    )
    quantizer = VectorQuantizerConfig(codebook_size=CODES, code_dim=DIM, update="gradient")
    defaults: dict[str, Any] = {"conv": conv, "quantizer": quantizer}
    return VqganConfig(transform=TransformConfig(image_size=16), **(defaults | fields))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.mark.parametrize("update", ["gradient", "ema"])
@torch.no_grad()
def test_codes_and_pictures_are_the_references(reference: Reference, update: str) -> None:
    quantizer = VectorQuantizerConfig(codebook_size=CODES, code_dim=DIM, update=update)
    tokenizer = build_tokenizer(config(quantizer=quantizer)).eval()
    state = {**reference.state, "quantize.codebook_used": torch.zeros(65536)}
    tokenizer.load_state_dict(convert_llamagen(state, tokenizer.config), strict=True)
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
    with pytest.raises(ValueError, match="lacks the keys .* and [0-9]+ more"):
        convert_llamagen({"weight": torch.zeros(1)}, config())


def test_shapes_that_do_not_fit_are_named_with_the_settings_that_do(reference: Reference) -> None:
    larger = VectorQuantizerConfig(codebook_size=2 * CODES, code_dim=DIM, update="gradient")
    message = r"'quantize.embedding.weight' has shape \(24, 4\).*needs \(48, 4\)"
    with pytest.raises(ValueError, match=message) as refused:
        convert_llamagen(reference.state, config(quantizer=larger))
    assert f"--set tokenizer.quantizer.codebook_size={CODES}" in str(refused.value)


@pytest.mark.parametrize("prefix", ["", "vq_model."])
@pytest.mark.parametrize(
    ("conv", "settings"),
    [
        ({"channel_multipliers": (1, 2)}, "--set 'tokenizer.conv.channel_multipliers=[1,2,2]'"),
        ({"channel_multipliers": (1, 1, 2, 2, 4)}, "--set 'tokenizer.conv.channel_multipliers=[1,2,2]'"),
        ({"channels": 64}, "--set tokenizer.conv.channels=32"),
        (
            {"encoder_blocks": 1, "decoder_blocks": 2},
            "tokenizer.conv.encoder_blocks=2 --set tokenizer.conv.decoder_blocks=3",
        ),
    ],
)
def test_another_size_is_told_from_the_shapes(
    reference: Reference, conv: dict[str, Any], settings: str, prefix: str
) -> None:
    """As of VQ-8 and the recipe of VQ-16; what the message says to set is what fits."""
    state = {f"{prefix}{name}": value for name, value in reference.state.items()}
    given = config()
    other = given.model_copy(update={"conv": given.conv.model_copy(update=conv)})
    with pytest.raises(ValueError, match="by its shapes it is the one of") as refused:
        convert_llamagen(state, other)
    assert settings in str(refused.value) and "damaged" not in str(refused.value)
    convert_llamagen(state, given)


def test_a_part_of_a_larger_model_is_found_by_its_names(reference: Reference) -> None:
    """As in the state dict of a LightningModule, which has its loss beside it."""
    state = {f"first_stage.{name}": value for name, value in reference.state.items()}
    state["loss.discriminator.main.0.weight"] = torch.zeros(1)
    expected = convert_llamagen(reference.state, config())
    for name, value in convert_llamagen(state, config()).items():
        assert torch.equal(value, expected[name])
