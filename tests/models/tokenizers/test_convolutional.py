import pytest
import torch

from models.tokenizers.convolutional import (
    ConvConfig,
    ConvDecoder,
    ConvEncoder,
    DiscriminatorBlock,
    PatchDiscriminator,
    ResidualDiscriminator,
    gradient_norm,
)

TINY = {"channels": 16, "encoder_blocks": 1, "decoder_blocks": 1, "latent_channels": 8}


def num_parameters(*modules: torch.nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({"channel_multipliers": (1, 1, 2, 2, 4)}, 16),
        ({"channel_multipliers": (1, 2)}, 2),
        ({"channel_multipliers": (1,), "patch_size": 4}, 4),
        ({"channel_multipliers": (1, 2, 2), "patch_size": 2, "attention": False}, 8),
    ],
)
def test_decoder_undoes_the_encoders_shape(fields: dict[str, object], factor: int) -> None:
    config = ConvConfig(**TINY | fields)
    assert config.downsampling == factor
    images = torch.randn(2, 3, 32, 64)
    latents = ConvEncoder(config)(images)
    assert latents.shape == (2, 8, 32 // factor, 64 // factor)
    assert ConvDecoder(config)(latents).shape == images.shape


def test_default_is_llamagens_vq16() -> None:
    with torch.device("meta"):
        config = ConvConfig()
        encoder, decoder = ConvEncoder(config), ConvDecoder(config)
        latents = encoder(torch.empty(1, 3, 256, 256))
        assert latents.shape == (1, 256, 16, 16)
        assert decoder(latents).shape == (1, 3, 256, 256)
    assert 71e6 < num_parameters(encoder, decoder) < 73e6, "LlamaGen's model zoo gives 72M for VQ-16"


def test_attention_reaches_every_position() -> None:
    def influence(attention: bool) -> torch.Tensor:
        torch.manual_seed(0)
        config = ConvConfig(**TINY | {"channel_multipliers": (1,), "attention": attention})
        # GroupNorm mixes positions too; without it only convolutions and attention do
        encoder = ConvEncoder(config)
        for module in encoder.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.forward = lambda x: x  # type: ignore[method-assign]
        images = torch.randn(1, 3, 40, 8, requires_grad=True)
        encoder(images)[..., 0, 0].sum().backward()
        assert images.grad is not None
        return images.grad[..., -1, -1].abs().sum()

    assert influence(False) == 0
    assert influence(True) > 0


def test_last_layer_is_where_the_image_is_made() -> None:
    decoder = ConvDecoder(ConvConfig(**TINY | {"channel_multipliers": (1,), "patch_size": 2}))
    with torch.no_grad():
        decoder.last_layer.zero_()
        decoder.to_rgb.bias.fill_(0.25)
        torch.testing.assert_close(decoder(torch.randn(1, 8, 4, 4)), torch.full((1, 3, 8, 8), 0.25))


@pytest.mark.parametrize(("num_layers", "side"), [(1, 30), (2, 14), (3, 6)])
def test_discriminator_gives_one_logit_a_patch(num_layers: int, side: int) -> None:
    assert PatchDiscriminator(8, num_layers)(torch.randn(2, 3, 64, 64)).shape == (2, 1, side, side)


def test_discriminators_patches_are_70_pixels_wide() -> None:
    discriminator = PatchDiscriminator(8, 3)
    for module in discriminator.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
    images = torch.randn(1, 3, 192, 192, requires_grad=True)
    logits = discriminator(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert images.grad is not None
    rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 70  # pix2pix, section 3.2.2


def test_gradient_norm_equals_backward_and_keeps_the_graph() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    loss = (weight @ torch.randn(4)).square().sum()
    norm = gradient_norm(loss, weight)
    assert weight.grad is None
    loss.backward()
    torch.testing.assert_close(norm, weight.grad.norm())
    assert not norm.requires_grad


def test_dualtokens_discriminator_has_its_releases_shapes() -> None:
    """Conv 3-64 of stride 2, blocks 64-128 and 128-256 of stride 2 and 256-512, conv 512-1; every kernel is 3."""
    with torch.device("meta"):
        discriminator = ResidualDiscriminator()
        assert discriminator(torch.empty(1, 3, 384, 384)).shape == (1, 1, 48, 48)
    blocks = [(64, 128), (128, 256), (256, 512)]
    expected = 3 * 64 * 9 + 64 + 512 * 9 + 1
    expected += sum(2 * small + (9 * small + 1) * large + (small + 1) * large for small, large in blocks)
    assert num_parameters(discriminator) == expected


@pytest.mark.parametrize("stride", [1, 2])
def test_a_discriminator_block_goes_around_its_convolution(stride: int) -> None:
    block, x = DiscriminatorBlock(8, 16, stride), torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        block.conv.weight.zero_()
        block.conv.bias.zero_()
    side = 9 if stride == 1 else 5
    around = torch.nn.functional.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
    torch.testing.assert_close(block(x), block.skip(around))
