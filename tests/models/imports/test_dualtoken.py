"""DualToken's checkpoint layout: the same codes, pictures and vectors as a network written out under its names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.imports.dualtoken import convert_dualtoken
from models.teachers.teacher import Teacher, TransformersTeacher, TransformersTeacherConfig
from models.tokenizers.config import DualTokenConfig
from models.tokenizers.convolutional import ConvConfig
from models.tokenizers.kinds import build_tokenizer
from models.tokenizers.quantizers import ResidualQuantizerConfig
from models.transforms import TransformConfig
from tests.helpers.dualtoken import (
    CHANNELS,
    CODE_DIM,
    CODES,
    DEPTH,
    GRID,
    LATENT,
    PIXEL_LAYER,
    SEMANTIC_LAYER,
    SHORTCUT_LAYER,
    SHORTCUT_WEIGHT,
    SIDE,
    DualTokenReference,
)


def config(**fields: Any) -> DualTokenConfig:
    residual: dict[str, Any] = {"codebook_size": CODES, "code_dim": CODE_DIM, "depth": DEPTH}
    return DualTokenConfig(
        transform=TransformConfig(image_size=SIDE),
        conv=ConvConfig(
            channels=CHANNELS, channel_multipliers=(1, 1), decoder_blocks=2, latent_channels=LATENT, encoder_blocks=1
        ),
        code_grid=GRID,
        residual=ResidualQuantizerConfig(**residual | fields.pop("residual", {})),
        pixel_layers=(PIXEL_LAYER, SHORTCUT_LAYER),
        pixel_layer_weights=(1.0, SHORTCUT_WEIGHT),
        **{"released_layout": True, "semantic_layer": SEMANTIC_LAYER} | fields,
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> DualTokenReference:
    return DualTokenReference(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def teacher(reference: DualTokenReference) -> Teacher:
    return TransformersTeacher(TransformersTeacherConfig(path=str(reference.folder))).freeze()


@pytest.mark.parametrize("spelling", ["sem", "semantic"])
@torch.no_grad()
def test_codes_pictures_and_vectors_are_the_references(
    reference: DualTokenReference, teacher: Teacher, spelling: str
) -> None:
    state: dict[str, Tensor] = dict(reference.state)
    if spelling == "semantic":  # as files of the first version are
        state = {name.replace("sem", "semantic").replace("pix", "pixel"): value for name, value in state.items()}
    tokenizer = build_tokenizer(config(), teacher).eval()
    tokenizer.load_state_dict(convert_dualtoken(state, config(), teacher), strict=True)
    encoded = reference.encode(reference.images)
    codes = tokenizer.encode(reference.images)
    assert torch.equal(codes, encoded.codes)
    drawn = reference.decode(encoded.codes).clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode(codes), drawn, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokenizer.embed_codes(codes), F.normalize(encoded.pooled, dim=-1), atol=1e-5, rtol=1e-4)


def test_codebooks_can_learn_on_from_their_running_statistics(reference: DualTokenReference, teacher: Teacher) -> None:
    converted = convert_dualtoken(reference.state, config(), teacher)
    for number, book in enumerate(("sem", "pix")):
        ours = {name: converted[f"quantizers.{number}.books.0.{name}"] for name in ("codebook", "ema_sums")}
        counts = converted[f"quantizers.{number}.books.0.ema_counts"]
        assert torch.equal(counts, reference.state[f"quantizer_{book}.codebooks.0.cluster_size_ema"])
        torch.testing.assert_close(ours["ema_sums"] / counts[:, None], ours["codebook"])


def test_keys_that_do_not_fit_are_named(reference: DualTokenReference, teacher: Teacher) -> None:
    damaged = dict(reference.state)
    del damaged["prequant_sem.mlp.w1.weight"]
    with pytest.raises(ValueError, match=r"lacks the keys prequant_sem\.mlp\.w1\.weight; it is no DualToken tokenizer"):
        convert_dualtoken(damaged, config(), teacher)
    larger = {**reference.state, "siglip_model.vision_model.encoder.layers.9.mlp.fc1.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"has keys that this recipe's tokenizer does not siglip_model.*layers\.9"):
        convert_dualtoken(larger, config(), teacher)
    with pytest.raises(ValueError, match=r"'quantizer_sem.codebooks.0.weight' has shape \(20, 32\).* needs \(40, 32\)"):
        convert_dualtoken(reference.state, config(residual={"codebook_size": 40}), teacher)
    own = {**reference.state, "quantizer_pix.codebooks.1.weight": torch.zeros(CODES + 1, CODE_DIM)}
    with pytest.raises(ValueError, match="differs from 'quantizer_pix.codebooks.0.weight'.*residual.shared=false"):
        convert_dualtoken(own, config(), teacher)


def test_what_the_layout_needs_is_said(reference: DualTokenReference, teacher: Teacher, stub_teacher: Teacher) -> None:
    for fields in ({"released_layout": False}, {"semantic_layer": None}):
        with pytest.raises(ValueError, match="need tokenizer.released_layout=true"):
            convert_dualtoken(reference.state, config(**fields), teacher)
    with pytest.raises(ValueError, match="set teacher.model to {kind: transformers"):
        convert_dualtoken(reference.state, config(), stub_teacher)
