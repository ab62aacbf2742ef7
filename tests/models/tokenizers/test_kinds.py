from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.teachers.backbone import AlignedHeadConfig, BackboneTeacher, BackboneTeacherConfig
from models.teachers.teacher import Teacher
from models.tokenizers.config import TokenizerConfig
from models.tokenizers.convolutional import ConvConfig
from models.tokenizers.image_tokenizer import ImageTokenizer, semantic_cosine
from models.tokenizers.kinds import KINDS, build_tokenizer, tokenizer_config
from models.tokenizers.losses import contrastive_loss
from models.tokenizers.quantizers import ResidualQuantizerConfig, VectorQuantizerConfig
from models.tokenizers.transformer import SemanticDecoderConfig
from models.transforms import TransformConfig


def small_config(kind: str = "sde", **fields: Any) -> TokenizerConfig:
    defaults: dict[str, Any] = {
        "transform": TransformConfig(image_size=32),
        "conv": ConvConfig(
            channels=16, channel_multipliers=(1, 1, 2), encoder_blocks=1, decoder_blocks=1, latent_channels=8
        ),
        "quantizer": VectorQuantizerConfig(codebook_size=64, code_dim=4),
        "residual": ResidualQuantizerConfig(codebook_size=64, code_dim=4, depth=3),
        "pixel_layers": (1, 2),
        "semantic_layer": None,
        "semantic_decoder": SemanticDecoderConfig(width=16, depth=1, heads=2),
    }
    config_class = KINDS[kind].config_class
    return config_class(
        **{name: value for name, value in defaults.items() if name in config_class.model_fields} | fields
    )


SEMANTIC = ["dualtoken", "sde", "semantic", "tokenflow"]
"""Kinds that predict the teacher's features."""


def make(teacher: Teacher | None, **fields: Any) -> ImageTokenizer:
    torch.manual_seed(0)
    return build_tokenizer(small_config(**fields), teacher)


@pytest.fixture(params=sorted(KINDS))
def tokenizer(request: pytest.FixtureRequest, stub_teacher: Teacher) -> ImageTokenizer:
    return make(stub_teacher, kind=request.param).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1


def test_codes_have_the_declared_shape(tokenizer: ImageTokenizer, images: Tensor) -> None:
    codes = tokenizer.encode(images)
    books, depth = {"dualtoken": (2, 3), "vila_u": (1, 3)}.get(tokenizer.config.kind, (1, 1))
    assert codes.shape == (3, *tokenizer.code_shape) == (3, books, depth, 8, 8)
    assert codes.dtype == torch.int64
    assert int(codes.min()) >= 0 and int(codes.max()) < tokenizer.codebook_sizes[0] == 64
    assert len(tokenizer.book_names) == len(tokenizer.codebook_sizes) == len(tokenizer.codebooks) == books
    for book in tokenizer.codebooks:
        assert book.shape[:2] == (1, 64)


def test_code_embeddings_are_sums_of_the_codebooks_vectors(tokenizer: ImageTokenizer, images: Tensor) -> None:
    codes = tokenizer.encode(images)
    sums = [
        sum(book[0][codes[:, number, depth]] for depth in range(codes.shape[2]))
        for number, book in enumerate(tokenizer.codebooks)
    ]
    torch.testing.assert_close(tokenizer.code_embeddings(codes), torch.cat(sums, dim=-1))


def test_decoding_what_was_encoded_is_deterministic(tokenizer: ImageTokenizer, images: Tensor) -> None:
    first, second = (tokenizer.decode(tokenizer.encode(images)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == images.shape
    assert float(first.detach().abs().max()) <= 1.0


def test_codes_do_not_depend_on_the_batch(tokenizer: ImageTokenizer, images: Tensor) -> None:
    together = tokenizer.encode(images)
    assert torch.equal(together, torch.cat([tokenizer.encode(image[None]) for image in images]))


def test_forward_agrees_with_encode_and_decode(tokenizer: ImageTokenizer, images: Tensor) -> None:
    output = tokenizer(images)
    assert torch.equal(output.codes, tokenizer.encode(images))
    torch.testing.assert_close(output.reconstruction.clamp(-1, 1), tokenizer.decode(output.codes), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", SEMANTIC)
def test_semantic_features_are_those_of_the_forward_pass(kind: str, stub_teacher: Teacher, images: Tensor) -> None:
    tokenizer = make(stub_teacher, kind=kind).eval()
    output = tokenizer(images)
    torch.testing.assert_close(output.semantic_target, stub_teacher.features(images, (8, 8)))
    predicted = tokenizer.semantic_features(output.codes)
    torch.testing.assert_close(output.semantic_prediction, predicted, atol=1e-5, rtol=1e-4)


def test_given_teacher_features_replace_the_teachers(stub_teacher: Teacher, images: Tensor) -> None:
    tokenizer = make(stub_teacher).eval()
    known = stub_teacher.features(images, tokenizer.grid)
    assert torch.equal(tokenizer(images, known).codes, tokenizer.encode(images))
    other = torch.randn_like(known)
    assert torch.equal(tokenizer(images, other).semantic_target, other)
    assert not torch.equal(tokenizer(images, other).codes, tokenizer.encode(images))


def test_vqgan_ignores_the_teacher(stub_teacher: Teacher, images: Tensor) -> None:
    with_teacher, without = make(stub_teacher, kind="vqgan").eval(), make(None, kind="vqgan").eval()
    assert with_teacher.teacher is None
    assert torch.equal(with_teacher.encode(images), without.encode(images))
    assert with_teacher(images).semantic_target is None and with_teacher(images).semantic_prediction is None
    with pytest.raises(ValueError, match="'vqgan' has no semantic branch"):
        without.semantic_features(without.encode(images))


@pytest.mark.parametrize("kind", [kind for kind in sorted(KINDS) if KINDS[kind].needs_teacher])
def test_a_missing_teacher_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind} needs a teacher"):
        make(None, kind=kind)


def test_an_image_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size=34 is not a multiple of the downsampling 4"):
        make(None, kind="vqgan", transform=TransformConfig(image_size=34))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_gradients_reach_all_parts_but_the_teacher(kind: str, stub_teacher: Teacher, images: Tensor) -> None:
    tokenizer = make(stub_teacher, kind=kind).train()
    output = tokenizer(images)
    loss = (output.reconstruction - images).square().mean() + output.quantizer_loss
    assert tokenizer.has_semantic_branch == (kind in SEMANTIC) == (output.semantic_target is not None)
    if output.semantic_target is not None:
        loss = loss + 1 - semantic_cosine(output.semantic_prediction, output.semantic_target).mean()
        assert not output.semantic_target.requires_grad
    if output.image_embedding is not None:
        texts = F.normalize(torch.randn(3, stub_teacher.embed_dim), dim=-1)
        torch.testing.assert_close(output.image_embedding.norm(dim=-1), torch.ones(3))
        loss = loss + contrastive_loss(output.image_embedding, texts, tokenizer.logit_scale)
    loss.backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in stub_teacher.parameters())


def test_semantic_codes_learn_nothing_from_pixels(stub_teacher: Teacher, images: Tensor) -> None:
    tokenizer = make(stub_teacher, kind="semantic").train()
    (tokenizer(images).reconstruction - images).square().mean().backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in tokenizer.decoder.parameters())
    assert all(parameter.grad is None for parameter in tokenizer.pre_quant.parameters())


def test_tokenflow_index_has_the_least_sum_of_both_distances(stub_teacher: Teacher, images: Tensor) -> None:
    tokenizer = make(stub_teacher, kind="tokenflow", semantic_code_dim=6).eval()
    before = tokenizer._before_quantization(images, stub_teacher.features(images, tokenizer.grid))
    semantic, pixel = (F.normalize(part, dim=-1).double() for part in before.split((6, 4), dim=-1))
    tables = tokenizer.codebooks[0][0].double().split((6, 4), dim=-1)
    for table in tables:
        torch.testing.assert_close(table.norm(dim=-1), torch.ones(64, dtype=torch.double), atol=1e-6, rtol=0)
    distances = torch.stack(
        [(part[..., None, :] - table).square().sum(-1) for part, table in zip((semantic, pixel), tables, strict=True)]
    )
    assert torch.equal(tokenizer.encode(images)[:, 0, 0], distances.sum(0).argmin(-1))


def test_tokenflow_decoders_read_their_own_table(stub_teacher: Teacher, images: Tensor) -> None:
    tokenizer = make(stub_teacher, kind="tokenflow", semantic_code_dim=6).eval()
    codes = tokenizer.encode(images)
    drawn, predicted = tokenizer.decode(codes), tokenizer.semantic_features(codes)
    with torch.no_grad():
        tokenizer.quantizer.codebook[:, :6].neg_()
    assert torch.equal(tokenizer.decode(codes), drawn)
    assert not torch.equal(tokenizer.semantic_features(codes), predicted)


def test_tokenflow_needs_normalised_tables(stub_teacher: Teacher) -> None:
    with pytest.raises(ValueError, match="l2_normalised=true"):
        make(stub_teacher, kind="tokenflow", quantizer=VectorQuantizerConfig(codebook_size=8, l2_normalised=False))


def test_reconstruction_alone_teaches_the_encoder(stub_teacher: Teacher, images: Tensor) -> None:
    tokenizer = make(stub_teacher).train()
    (tokenizer(images).reconstruction - images).square().mean().backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in tokenizer.encoder.parameters())
    assert all(parameter.grad is None for parameter in tokenizer.semantic_decoder.parameters())


def test_training_leaves_the_teacher_in_eval_mode(stub_teacher: Teacher) -> None:
    tokenizer = make(stub_teacher).train()
    assert tokenizer.quantizer.training
    assert not any(module.training for module in stub_teacher.modules())


def test_teacher_is_neither_saved_nor_counted(stub_teacher: Teacher) -> None:
    tokenizer = make(stub_teacher)
    assert not [name for name in tokenizer.state_dict() if "teacher." in name]
    own = {id(parameter) for parameter in tokenizer.parameters()}
    assert not own & {id(parameter) for parameter in stub_teacher.parameters()}


def test_saved_weights_give_the_same_codes(stub_teacher: Teacher, images: Tensor) -> None:
    trained = make(stub_teacher).train()
    trained(images)
    torch.manual_seed(9)
    loaded = build_tokenizer(small_config(), stub_teacher)
    loaded.load_state_dict(trained.state_dict())
    assert torch.equal(loaded.eval().encode(images), trained.eval().encode(images))


def test_semantic_branch_decides_codes_where_the_image_weight_is_zero(stub_teacher: Teacher, images: Tensor) -> None:
    tokenizer = make(stub_teacher, image_weight=0.0).eval()
    codes = tokenizer.encode(images)
    for parameter in tokenizer.encoder.parameters():
        torch.nn.init.normal_(parameter)
    assert torch.equal(tokenizer.encode(images), codes)


@pytest.mark.parametrize("encoder", ["conv", "tower"])
def test_image_only_differs_from_sde_in_the_semantic_branch_alone(
    encoder: str, stub_teacher: Teacher, images: Tensor
) -> None:
    fields: dict[str, Any] = {"encoder": encoder, "code_grid": 8 if encoder == "tower" else None}
    both, alone = make(stub_teacher, **fields).eval(), make(stub_teacher, semantic_branch=False, **fields).eval()
    shapes = {name: value.shape for name, value in both.state_dict().items()}
    assert {name: value.shape for name, value in alone.state_dict().items()} == {
        name: shape for name, shape in shapes.items() if not name.startswith("semantic_decoder.")
    }
    alone.load_state_dict(both.state_dict(), strict=False)
    output = alone(images)
    assert (output.semantic_target, output.semantic_prediction) == (None, None)
    assert torch.equal(output.codes, alone.encode(images))
    with pytest.raises(ValueError, match="no semantic branch"):
        alone.semantic_features(output.codes)
    # the codes of `Quant(z)` are those of `Quant(T + z)` with T = 0
    assert torch.equal(both(images, torch.zeros(3, 8, 8, 12)).codes, output.codes)


def test_a_tower_encodes_in_place_of_convolutions(stub_teacher: Teacher, images: Tensor) -> None:
    tokenizer = make(stub_teacher, encoder="tower", code_grid=4).train()
    output = tokenizer(images)
    assert output.codes.shape == (3, 1, 1, 4, 4)
    assert output.reconstruction.shape == images.shape, "the decoder's input is resized to what it needs"
    (output.reconstruction - images).square().mean().backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in tokenizer.encoder.parameters())
    assert all(parameter.grad is None for parameter in stub_teacher.parameters())


def test_dualtoken_books_read_their_own_layers(stub_teacher: Teacher, images: Tensor) -> None:
    tokenizer = make(stub_teacher, kind="dualtoken", pixel_layers=(1,), pixel_layer_weights=(1.0,)).eval()
    before = tokenizer.encode(images)
    for parameter in tokenizer.tower.deep.parameters():
        torch.nn.init.normal_(parameter)
    after = tokenizer.encode(images)
    assert torch.equal(before[:, 1], after[:, 1]), "pixel codes come from the shallow layer"
    assert not torch.equal(before[:, 0], after[:, 0]), "semantic codes come from the deep one"


def test_dualtoken_decoders_read_their_own_book(stub_teacher: Teacher, images: Tensor) -> None:
    tokenizer = make(stub_teacher, kind="dualtoken").eval()
    codes = tokenizer.encode(images)
    other = codes.clone()
    other[:, 0] = (other[:, 0] + 1) % 64
    assert torch.equal(tokenizer.decode(codes), tokenizer.decode(other))
    assert not torch.equal(tokenizer.semantic_features(codes), tokenizer.semantic_features(other))


def test_dualtoken_without_its_semantic_book_is_one_book_of_pixels(stub_teacher: Teacher, images: Tensor) -> None:
    tokenizer = make(stub_teacher, kind="dualtoken", semantic_book=False).train()
    assert (tokenizer.book_names, tokenizer.code_shape) == (("pixel",), (1, 3, 8, 8))
    assert not any("semantic" in name for name, _ in tokenizer.named_parameters())
    output = tokenizer(images)
    assert (output.semantic_target, output.semantic_prediction) == (None, None)
    (output.reconstruction.square().mean() + output.quantizer_loss).backward()
    assert tokenizer.decode(tokenizer.eval().encode(images)).shape == images.shape
    with pytest.raises(ValueError, match="no semantic branch"):
        tokenizer.semantic_features(output.codes)


def test_dualtoken_can_take_its_semantics_from_a_named_layer(stub_teacher: Teacher, images: Tensor) -> None:
    tokenizer = make(stub_teacher, kind="dualtoken", semantic_layer=1).eval()
    (level,), _ = stub_teacher.levels(images, (8, 8), (1,))
    torch.testing.assert_close(tokenizer.target_features(images), level)
    with pytest.raises(ValueError, match="give one weight per layer"):
        make(stub_teacher, kind="dualtoken", pixel_layers=(1,))
    with pytest.raises(ValueError, match="12 to 5 channels needs one to be a multiple"):
        make(stub_teacher, kind="dualtoken", residual=ResidualQuantizerConfig(codebook_size=8, code_dim=5))


def test_vila_u_needs_a_teacher_with_text(backbone_teacher: Teacher) -> None:
    with pytest.raises(ValueError, match="needs a teacher with a text tower"):
        make(backbone_teacher, kind="vila_u")


class TestVilaUAsReleased:
    """Its code quantizes the last layer but one at full width; the rest of SigLIP reads the quantized features."""

    @staticmethod
    def make(teacher: Teacher, code_dim: int = 12, layer: int | None = 1) -> ImageTokenizer:
        residual = ResidualQuantizerConfig(codebook_size=64, code_dim=code_dim, depth=3)
        return make(teacher, kind="vila_u", released_layout=True, semantic_layer=layer, residual=residual)

    def test_a_layer_is_quantized_at_its_full_width(self, pooling_teacher: Teacher, images: Tensor) -> None:
        tokenizer = self.make(pooling_teacher).eval()
        (level,), _ = tokenizer.tower.levels(images, (8, 8), (1,))
        expected = tokenizer.book(0)(level).codes.permute(0, 3, 1, 2)[:, None]
        assert torch.equal(tokenizer.encode(images), expected)
        assert tokenizer.codebooks[0].shape == (1, 64, 12)
        assert not any(name.startswith(("pre_quant", "to_features")) for name in tokenizer.state_dict())

    def test_the_rest_of_the_trained_tower_pools_the_codes(self, pooling_teacher: Teacher, images: Tensor) -> None:
        tokenizer = self.make(pooling_teacher).train()
        output = tokenizer(images)
        output.image_embedding[:, 0].sum().backward()
        assert float(tokenizer.tower.weight.grad.abs().sum()) > 0
        assert float(tokenizer.tower.shallow.weight.grad.abs().sum()) > 0, "straight through the quantizer"
        tokenizer.eval()
        codes = tokenizer.encode(images)
        pooled = tokenizer.code_embeddings(codes).mean((1, 2)) @ tokenizer.tower.weight
        torch.testing.assert_close(tokenizer.embed_codes(codes), F.normalize(pooled, dim=-1))
        assert tokenizer.decode(codes).shape == images.shape

    def test_what_does_not_fit_is_refused_by_field(self, pooling_teacher: Teacher, stub_teacher: Teacher) -> None:
        with pytest.raises(ValueError, match=r"set tokenizer\.residual\.code_dim to 12, it is 4"):
            self.make(pooling_teacher, code_dim=4)
        with pytest.raises(ValueError, match=r"quantizes the features of semantic_layer; give a layer"):
            self.make(pooling_teacher, layer=None)
        with pytest.raises(ValueError, match="of a SigLIP"):
            self.make(stub_teacher)


def test_codes_embed_as_their_features_pool(pooling_teacher: Teacher, images: Tensor) -> None:
    for kind in SEMANTIC:
        tokenizer = make(pooling_teacher, kind=kind).eval()
        codes = tokenizer.encode(images)
        expected = F.normalize(tokenizer.semantic_features(codes).mean((1, 2)) @ pooling_teacher.weight, dim=-1)
        torch.testing.assert_close(tokenizer.embed_codes(codes), expected)
        assert tokenizer.embeds_codes


def test_dualtoken_pools_from_a_layer_with_its_own_tower(pooling_teacher: Teacher, images: Tensor) -> None:
    """As in the released code: the rest of the tower is trained, its target is the frozen teacher's."""
    tokenizer = make(pooling_teacher, kind="dualtoken", semantic_layer=1).train()
    output = tokenizer(images)
    torch.testing.assert_close(
        tokenizer.pooled_prediction(output.semantic_target), tokenizer.pooled_target(output.semantic_target)
    )
    tokenizer.pooled_prediction(output.semantic_prediction).square().sum().backward()
    assert float(tokenizer.tower.weight.grad.abs().sum()) > 0
    assert pooling_teacher.weight.grad is None
    assert float(tokenizer.post_quant_semantic.out.weight.grad.abs().sum()) > 0


def test_only_kinds_that_quantize_the_teachers_features_ask_for_them(
    stub_teacher: Teacher, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    for kind in KINDS:
        tokenizer = make(stub_teacher, kind=kind).eval()
        target = tokenizer.target_features
        codes = tokenizer._quantize(images, target(images)).codes
        monkeypatch.setattr(
            type(tokenizer), "target_features", lambda _, shown, kind=kind, of=target: asked.append(kind) or of(shown)
        )
        assert torch.equal(tokenizer.encode(images), codes)
    assert {"sde", "semantic", "tokenflow"} <= set(asked) and not {"dualtoken", "vila_u"} & set(asked)


def test_dualtoken_does_not_embed_from_a_layer_that_its_teacher_cannot_pool(
    efficientnet_state: dict[str, Tensor], images: Tensor
) -> None:
    config = BackboneTeacherConfig(input_size=64, head=AlignedHeadConfig(dim=16, keep_backbone=True))
    teacher = BackboneTeacher(config, efficientnet_state, ["cat"]).freeze()
    for layer in (None, 5):
        tokenizer = make(teacher, kind="dualtoken", semantic_layer=layer).eval()
        assert tokenizer.embeds_codes == (layer is None)
        if layer is None:
            assert tokenizer.embed_codes(tokenizer.encode(images)).shape == (len(images), 16)


def test_vila_u_embeds_its_codes_as_it_was_trained(stub_teacher: Teacher, images: Tensor) -> None:
    tokenizer = make(stub_teacher, kind="vila_u").eval()
    output = tokenizer(images)
    torch.testing.assert_close(tokenizer.embed_codes(output.codes), output.image_embedding, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["vqgan", "sde"])
def test_codes_without_an_embedding_say_so(kind: str, stub_teacher: Teacher, images: Tensor) -> None:
    tokenizer = make(stub_teacher, kind=kind).eval()
    assert not tokenizer.embeds_codes
    with pytest.raises(ValueError, match="no semantic branch|cannot pool its features"):
        tokenizer.embed_codes(tokenizer.encode(images))


def test_a_config_of_before_the_kinds_had_their_own_fields_is_read() -> None:
    config = small_config("dualtoken")
    of_all_kinds = small_config().model_dump() | {"semantic_code_dim": 32} | config.model_dump()
    assert tokenizer_config(of_all_kinds) == config


def test_semantic_cosine_is_the_mean_over_positions() -> None:
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    expected = ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean((1, 2))
    torch.testing.assert_close(semantic_cosine(a, b), expected)
    torch.testing.assert_close(semantic_cosine(a, 3 * a), torch.ones(2))
