"""DualToken's tokenizer at a small size, written out under the names of its checkpoints (its released code, 2026).

The image tower is transformers' SigLIP, as there; everything else is plain function calls on a state dict.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.word_tokenizer import save_word_tokenizer

HIDDEN, CODE_DIM, CODES, DEPTH, GRID, SIDE, CHANNELS, LATENT = 128, 32, 20, 3, 4, 16, 128, 64
"""Sizes; the image decoder starts at 8 x 8, the codes stand on 4 x 4."""
LAYERS, SHORTCUT_LAYER, PIXEL_LAYER, SEMANTIC_LAYER = 4, 1, 2, 3
SHORTCUT_WEIGHT = 0.6


class Encoded(NamedTuple):
    codes: Tensor
    """`[B, 2, D, h, w]`, semantic before pixel."""
    pooled: Tensor
    """`[B, C]` of the semantic codes, through the rest of the tower."""


class DualTokenReference:
    """Random weights in the released layout; SigLIP's own folder is written where the teacher is read from."""

    def __init__(self, folder: Path) -> None:
        from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

        self.folder = folder
        torch.manual_seed(0)
        sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
        vision = sizes | {"image_size": SIDE, "patch_size": SIDE // GRID}
        text = sizes | {"vocab_size": 6, "max_position_embeddings": 10, "num_hidden_layers": 1}
        text |= {"pad_token_id": 0, "eos_token_id": 5}
        self.siglip = SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()
        self.siglip.save_pretrained(folder)
        SiglipImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
        save_word_tokenizer(folder, 10)
        with torch.no_grad():  # a trained tower is not the one that training started from
            for parameter in self.siglip.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        self.state: dict[str, Tensor] = {f"siglip_model.{name}": v for name, v in self.siglip.state_dict().items()}
        self.generator = torch.Generator().manual_seed(1)
        for book in ("sem", "pix"):
            codebook = torch.randn(CODES + 1, CODE_DIM, generator=self.generator)
            codebook[-1] = 0.0  # a padding row that no code names
            counts = torch.rand(CODES, generator=self.generator) * 5
            for depth in range(DEPTH):  # one codebook, saved once a depth
                name = f"quantizer_{book}.codebooks.{depth}"
                self.state |= {f"{name}.weight": codebook, f"{name}.cluster_size_ema": counts}
                self.state[f"{name}.embed_ema"] = codebook[:-1] * counts[:, None]
        self.images = torch.rand(2, 3, SIDE, SIDE, generator=self.generator) * 2 - 1
        with torch.no_grad():
            self.decode(self.encode(self.images).codes)

    def random(self, name: str, *shape: int) -> Tensor:
        if name not in self.state:
            fan = max(1, torch.Size(shape[1:]).numel())
            self.state[name] = torch.randn(*shape, generator=self.generator) / fan**0.5
        return self.state[name]

    def linear(self, x: Tensor, name: str, width: int) -> Tensor:
        return F.linear(x, self.random(f"{name}.weight", width, x.shape[-1]), self.random(f"{name}.bias", width))

    def layer_norm(self, x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        width = x.shape[-1]
        return F.layer_norm(x, (width,), self.random(f"{name}.weight", width), self.random(f"{name}.bias", width), eps)

    def projection(self, x: Tensor, name: str, width: int, causal: bool) -> Tensor:
        """`[B, T, C]` -> `[B, T, width]`."""
        batch, tokens, in_dim = x.shape
        inner, head = max(in_dim, width), min(in_dim, width)
        self.state.setdefault(f"{name}.attn.zero_k_bias", torch.zeros(inner))
        bias = [self.random(f"{name}.attn.q_bias", inner), self.state[f"{name}.attn.zero_k_bias"]]
        bias.append(self.random(f"{name}.attn.v_bias", inner))
        weight = self.random(f"{name}.attn.qkv.weight", 3 * inner, in_dim)
        qkv = F.linear(self.layer_norm(x, f"{name}.norm1"), weight, torch.cat(bias))
        q, k, v = qkv.reshape(batch, tokens, 3, inner // head, head).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhqc,bhkc->bhqk", q, k) * head**-0.5
        if causal:
            scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
        heads = torch.einsum("bhqk,bhkc->bhqc", scores.softmax(-1), v)
        mixed = heads.mean(1) if in_dim > width else heads.transpose(1, 2).flatten(2)
        attended = self.linear(mixed, f"{name}.attn.proj", width)
        x = self.linear(self.layer_norm(x, f"{name}.norm3"), f"{name}.proj", width) + attended
        hidden = self.layer_norm(self.layer_norm(x, f"{name}.norm2"), f"{name}.mlp.norm", 1e-6)
        gate = F.gelu(self.linear(hidden, f"{name}.mlp.w0", 2 * width), approximate="tanh")
        return x + self.linear(gate * self.linear(hidden, f"{name}.mlp.w1", 2 * width), f"{name}.mlp.w2", width)

    def quantize(self, x: Tensor, book: str) -> tuple[Tensor, Tensor]:
        """`[B, T, C]` -> sums of codes, the same shape, and codes `[B, T, D]`."""
        codebook = self.state[f"quantizer_{book}.codebooks.0.weight"][:-1]
        total, picks = torch.zeros_like(x), []
        for _ in range(DEPTH):
            picks.append((x - total)[..., None, :].sub(codebook).square().sum(-1).argmin(-1))
            total = total + codebook[picks[-1]]
        return total, torch.stack(picks, dim=-1)

    def encode(self, images: Tensor) -> Encoded:
        vision: Any = self.siglip.vision_model
        x = vision.embeddings(images)
        pixel: Any = 0
        for number, layer in enumerate(vision.encoder.layers, start=1):
            x = layer(x, None)
            if number == SHORTCUT_LAYER:
                pixel = pixel + SHORTCUT_WEIGHT * self.projection(x, "prequant_shortcut", CODE_DIM, False)
            if number == PIXEL_LAYER:
                pixel = pixel + self.projection(x, "prequant_pix", CODE_DIM, False)
            if number == SEMANTIC_LAYER:
                found, semantic_codes = self.quantize(self.projection(x, "prequant_sem", CODE_DIM, False), "sem")
                x = self.projection(found, "postquant_sem", HIDDEN, True)
        pixel_codes = self.quantize(pixel, "pix")[1]
        codes = torch.stack([semantic_codes, pixel_codes], dim=1)  # [B, 2, T, D]
        return Encoded(codes.transpose(2, 3).unflatten(3, (GRID, GRID)), vision.head(vision.post_layernorm(x)))

    def conv(self, x: Tensor, name: str, width: int, size: int = 3) -> Tensor:
        weight = self.random(f"{name}.weight", width, x.shape[1], size, size)
        return F.conv2d(x, weight, self.random(f"{name}.bias", width), padding=size // 2)

    def group_norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.random(f"{name}.weight", x.shape[1]), self.random(f"{name}.bias", x.shape[1])
        return F.group_norm(x, min(32, x.shape[1] // 4), weight, bias, eps=1e-6)

    def res(self, x: Tensor, name: str, width: int, first_kernel: int = 3) -> Tensor:
        hidden = self.conv(F.silu(self.group_norm(x, f"{name}.norm1")), f"{name}.conv1", width, first_kernel)
        hidden = self.conv(F.silu(self.group_norm(hidden, f"{name}.norm2")), f"{name}.conv2", width)
        return hidden + (x if x.shape[1] == width else self.conv(x, f"{name}.nin_shortcut", width, 1))

    def attention(self, x: Tensor, name: str) -> Tensor:
        normed, width = self.group_norm(x, f"{name}.norm"), x.shape[1]
        q, k, v = (self.conv(normed, f"{name}.{part}", width, 1).flatten(2) for part in "qkv")
        weights = (torch.einsum("bcq,bck->bqk", q, k) * width**-0.5).softmax(-1)
        return x + self.conv(torch.einsum("bqk,bck->bcq", weights, v).view_as(x), f"{name}.proj_out", width, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[B, 2, D, h, w]` -> images; two levels of resolution, two blocks each."""
        codebook = self.state["quantizer_pix.codebooks.0.weight"]
        tokens = codebook[codes[:, 1]].sum(1).flatten(1, 2)  # [B, T, C]
        x = self.projection(tokens, "postquant_pix", HIDDEN, True)
        x = x.transpose(1, 2).unflatten(2, (GRID, GRID))
        x = F.interpolate(x, size=(SIDE // 2, SIDE // 2), mode="bilinear")
        x = self.conv(self.res(x, "post_quant_conv", LATENT, first_kernel=1), "decoder.conv_in", CHANNELS)
        x = self.res(x, "decoder.mid.block_1", CHANNELS)
        x = self.res(self.attention(x, "decoder.mid.attn_1"), "decoder.mid.block_2", CHANNELS)
        for level in (1, 0):
            for block in range(2):
                x = self.res(x, f"decoder.up.{level}.block.{block}", CHANNELS)
                x = self.attention(x, f"decoder.up.{level}.attn.{block}") if level == 1 else x
            if level:
                grown = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(grown, "decoder.up.1.upsample.conv", CHANNELS)
        return self.conv(F.silu(self.group_norm(x, "decoder.norm_out")), "decoder.conv_out", 3)
