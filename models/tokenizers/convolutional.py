"""The convolutional encoder and decoder of VQGAN in the variant of LlamaGen's VQ-16, and the discriminators.

Shape legend: B batch, C channels, H W pixels, h w code grid. Source: VQGAN (arXiv 2012.09841) table 7; LlamaGen
(arXiv 2406.06525) section 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from models.config import Config
from models.ranks import mean_over_ranks


class ConvConfig(Config):
    """Architecture of the convolutional encoder and decoder."""

    patch_size: PositiveInt = 1
    """Side of the pixel blocks that are folded into channels before the first convolution and unfolded after the last:
    1 in the papers; 2 saves three quarters of the work at full resolution, which dominates on a CPU."""

    channels: PositiveInt = 128
    """Channels at the highest resolution."""
    channel_multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 1, 2, 2, 4)
    """Channels at each resolution, in multiples of `channels`; each step after the first halves the resolution."""
    encoder_blocks: PositiveInt = 2
    """Number of residual blocks at each resolution of the encoder."""
    decoder_blocks: PositiveInt = 3
    """Number of residual blocks at each resolution of the decoder."""
    latent_channels: PositiveInt = 256
    """Channels between the encoder and the quantizer, and between the quantizer and the decoder."""
    attention: bool = True
    """Whether each residual block at the lowest resolution is followed by self-attention."""

    @property
    def downsampling(self) -> int:
        """Number of pixels that a code covers along one side."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)


def _norm(channels: int) -> nn.GroupNorm:
    # a teacher's width may not be a multiple of 32
    return nn.GroupNorm(math.gcd(min(32, channels // 4), channels), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two convolutions with GroupNorm and SiLU: `[B, C_in, H, W]` -> `[B, C_out, H, W]`.

    The second is 3x3, the first has kernels of side `first_kernel` (odd).
    """

    def __init__(self, in_channels: int, out_channels: int, *, first_kernel: int = 3) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, first_kernel, padding=first_kernel // 2)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(hidden)))


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions: `[B, C, H, W]` -> the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # each [B, H*W, C]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(mixed.transpose(1, 2).reshape(x.shape))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution: `[B, C, H, W]` -> `[B, C, 2H, 2W]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """3x3 convolution of stride 2: `[B, C, H, W]` -> `[B, C, H/2, W/2]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def _middle(channels: int, attention: bool) -> nn.Sequential:
    blocks: list[nn.Module] = [ResidualBlock(channels, channels)]
    if attention:
        blocks.append(SpatialAttention(channels))
    blocks.append(ResidualBlock(channels, channels))
    return nn.Sequential(*blocks)


class ConvEncoder(nn.Module):
    """Maps images `[B, 3, H, W]` to latents `[B, latent_channels, h, w]`."""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        layers: list[nn.Module] = [
            nn.PixelUnshuffle(config.patch_size),
            nn.Conv2d(3 * config.patch_size**2, config.channels, 3, padding=1),
        ]
        previous = config.channels
        for level, width in enumerate(widths):
            lowest = level == len(widths) - 1
            for _ in range(config.encoder_blocks):
                layers.append(ResidualBlock(previous, width))
                if lowest and config.attention:
                    layers.append(SpatialAttention(width))
                previous = width
            if not lowest:
                layers.append(Downsample(width))
        layers += [_middle(previous, config.attention), _norm(previous), nn.SiLU()]
        layers.append(nn.Conv2d(previous, config.latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class ConvDecoder(nn.Module):
    """Maps latents `[B, latent_channels, h, w]` to images `[B, 3, H, W]` of about [-1, 1], not clamped."""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in reversed(config.channel_multipliers)]
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)]
        layers.append(_middle(widths[0], config.attention))
        previous = widths[0]
        for level, width in enumerate(widths):
            for _ in range(config.decoder_blocks):
                layers.append(ResidualBlock(previous, width))
                if level == 0 and config.attention:
                    layers.append(SpatialAttention(width))
                previous = width
            if level < len(widths) - 1:
                layers.append(Upsample(width))
        layers += [_norm(previous), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.to_rgb = nn.Conv2d(previous, 3 * config.patch_size**2, 3, padding=1)
        self.unfold = nn.PixelShuffle(config.patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        return self.unfold(self.to_rgb(self.layers(latents)))

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradient norms balance the adversarial loss (VQGAN, eq. 7)."""
        return self.to_rgb.weight


class PatchDiscriminator(nn.Module):
    """PatchGAN: images `[B, 3, H, W]` -> logits `[B, 1, h', w']`, one per patch. Source: pix2pix (arXiv 1611.07004)."""

    def __init__(self, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for level in range(1, num_layers + 1):
            wider = channels * min(2**level, 8)
            stride = 2 if level < num_layers else 1
            layers += [nn.Conv2d(width, wider, 4, stride=stride, padding=1), _norm(wider), nn.LeakyReLU(0.2)]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        _start_discriminator(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class DiscriminatorBlock(nn.Module):
    """GroupNorm, leaky ReLU and a 3x3 convolution, with a skip connection that resizes and projects the input.

    `[B, C_in, H, W]` -> `[B, C_out, H / stride, W / stride]`, rounded up.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(32, in_channels), in_channels, eps=1e-6)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(F.leaky_relu(self.norm(x), 0.2))
        if hidden.shape[-2:] != x.shape[-2:]:
            x = F.interpolate(x, size=hidden.shape[-2:], mode="bilinear", align_corners=False)
        return self.skip(x) + hidden


class ResidualDiscriminator(nn.Module):
    """PatchGAN of residual blocks with 3x3 kernels: images `[B, 3, H, W]` -> logits `[B, 1, h', w']`, one per patch.

    Source: DualToken's released code (github.com/songweii/DualToken, vqgan/discriminator.py).
    """

    def __init__(self, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for level in range(1, num_layers + 1):
            wider = channels * min(2**level, 8)
            layers.append(DiscriminatorBlock(width, wider, stride=2 if level < num_layers else 1))
            width = wider
        layers.append(nn.Conv2d(width, 1, 3, padding=1))
        self.layers = nn.Sequential(*layers)
        _start_discriminator(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def _start_discriminator(discriminator: nn.Module) -> None:
    """Initialise as pix2pix does: kernels from a normal distribution of deviation 0.02, biases 0."""
    for module in discriminator.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
            nn.init.zeros_(module.bias) if module.bias is not None else None


DISCRIMINATORS: dict[str, Callable[[int, int], nn.Module]] = {
    "patchgan": PatchDiscriminator,
    "residual": ResidualDiscriminator,
}
"""The class of each `LossConfig.discriminator`; its arguments are the numbers of channels and of layers."""


def gradient_norm(loss: Tensor, weight: Tensor) -> Tensor:
    """Return the L2 norm of the gradient of `loss` by `weight`, detached; with several ranks, of the mean gradient."""
    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
    return mean_over_ranks(gradient.detach()).norm()
