"""An image tokenizer by hand, with `models/` alone: train a small VQGAN briefly, then encode and decode.

From the project's folder: `python -m docs.examples.tokenizer`
"""

import zipfile
from pathlib import Path

import torch

from models.metrics.measures import psnr
from models.tokenizers.config import VqganConfig
from models.tokenizers.convolutional import ConvConfig
from models.tokenizers.kinds import build_tokenizer
from models.tokenizers.quantizers import VectorQuantizerConfig
from models.transforms import TransformConfig, load_image, normalise, to_pil, to_pixels, to_tensor

FRUIT = [f"{code_point:x}.webp" for code_point in range(0x1F347, 0x1F352)]
SAMPLES = Path(__file__).parents[2] / "infra" / "sample_data" / "noto.zip"

config = VqganConfig(
    transform=TransformConfig(image_size=64),
    conv=ConvConfig(patch_size=4, channels=32, channel_multipliers=(1, 2), latent_channels=32),
    quantizer=VectorQuantizerConfig(codebook_size=256, code_dim=8),
)


def main(steps: int = 200) -> None:
    """Train, print the codes of the first image, and save it beside what they draw."""
    torch.manual_seed(0)
    with zipfile.ZipFile(SAMPLES) as archive:
        pictures = [load_image(archive.read(name), config.transform) for name in FRUIT]
    images = normalise(to_tensor(pictures))  # [B, 3, 64, 64] in [-1, 1]
    tokenizer = build_tokenizer(config).train()
    optimiser = torch.optim.AdamW(tokenizer.parameters(), lr=1e-3)
    for _ in range(steps):
        output = tokenizer(images)
        loss = (output.reconstruction - images).abs().mean() + output.quantizer_loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    tokenizer.eval()
    with torch.no_grad():
        codes = tokenizer.encode(images[:1])  # [1, books, depth, 8, 8]
        before, after = to_pixels(images[:1]), to_pixels(tokenizer.decode(codes))
    print("\n".join(" ".join(f"{code:3d}" for code in row) for row in codes[0, 0, 0].tolist()))
    decibels = float(psnr(after, before))
    print(f"{codes.numel()} codes of {tokenizer.codebook_sizes[0]}, PSNR {decibels:.1f} dB, see drawn.png")
    to_pil(torch.cat([before, after], dim=-1))[0].save("drawn.png")


if __name__ == "__main__":
    main()
