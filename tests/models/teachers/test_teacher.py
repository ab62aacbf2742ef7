import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.teachers.backbone import (
    AlignedHeadConfig,
    BackboneTeacher,
    BackboneTeacherConfig,
    convert_efficientnet_lite0,
    split_words,
)
from models.teachers.teacher import (
    Interpolation,
    OpenClipTeacher,
    OpenClipTeacherConfig,
    PixelNormalisation,
    Teacher,
    TransformersTeacher,
    TransformersTeacherConfig,
    interpolation_of,
)
from tests.helpers.word_tokenizer import save_word_tokenizer

Emoji = Callable[[str], Tensor]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1


def check_contract(teacher: Teacher, images: Tensor, grid: tuple[int, int]) -> None:
    """What every teacher promises: shape, scale, determinism, frozen whatever its parent does."""
    features = teacher.features(images, grid)
    assert features.shape == (len(images), *grid, teacher.feature_dim)
    assert features.dtype == torch.float32
    assert torch.equal(features, teacher.train(True).features(images, grid))
    assert not any(module.training for module in teacher.modules())
    parent = torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in parent[0].modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not features.requires_grad
    embedded = teacher.embed_images(images)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(len(images)))
    torch.testing.assert_close(embedded[:1], teacher.embed_images(images[:1]), atol=1e-5, rtol=1e-4)
    assert embedded.shape[1] == teacher.embed_dim
    check_levels(teacher, images, grid)


def check_levels(teacher: Teacher, images: Tensor, grid: tuple[int, int]) -> None:
    """Levels of the image tower, and a copy of it that can be trained."""
    levels, features = teacher.levels(images, grid, (2, 1))
    torch.testing.assert_close(features, teacher.features(images, grid))
    assert [level.shape for level in levels] == [
        (len(images), *grid, width) for width in teacher.level_widths(grid, (2, 1))
    ]
    torch.testing.assert_close(teacher.levels(images, grid, (1,))[0][0], levels[1])
    for layer in (0, 99):
        with pytest.raises(ValueError, match=f"layer {layer} is asked for"):
            teacher.levels(images, grid, (layer,))
    tower = teacher.image_tower()
    torch.testing.assert_close(tower.features(images, grid), features)
    with torch.enable_grad():
        tower.levels(images, grid, (1,))[1].square().mean().backward()
    assert any(parameter.grad is not None for parameter in tower.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module.training for module in tower.train(True).modules())
    text = sum(parameter.numel() for parameter in teacher.parameters()) - sum(p.numel() for p in tower.parameters())
    assert text > 0 if teacher.has_text else text == 0, "the text side stays with the teacher"


def check_standardised(features: Tensor) -> None:
    torch.testing.assert_close(features.mean(-1), torch.zeros(features.shape[:-1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.var(-1, unbiased=False), torch.ones(features.shape[:-1]), atol=1e-2, rtol=0)


def check_pooling(teacher: Teacher, images: Tensor, grid: tuple[int, int], layers: tuple[int, ...]) -> None:
    """The rest of the tower makes of a level, and about of the standardised features, what it makes of the image."""
    embedded = teacher.embed_images(images)
    for layer, level in zip(layers, teacher.levels(images, grid, layers)[0], strict=True):
        pooled = teacher.pool(level, layer)
        torch.testing.assert_close(torch.nn.functional.normalize(pooled, dim=-1), embedded, atol=1e-4, rtol=1e-3)
    pooled = teacher.pool(teacher.features(images, grid))
    similarity = torch.nn.functional.cosine_similarity(pooled, embedded, dim=-1)
    assert float(similarity.min()) > 0.99, similarity


def check_texts(teacher: Teacher) -> None:
    texts = ["a cat", "dog"]
    embedded = teacher.embed_texts(texts)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(embedded[1:], teacher.embed_texts(texts[1:]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(embedded[0], embedded[1])
    assert teacher.has_text


def test_pixel_normalisation_equals_its_formula() -> None:
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    normalised = PixelNormalisation(8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))(images)
    for channel, (mean, std) in enumerate([(0.1, 0.4), (0.2, 0.5), (0.3, 0.6)]):
        torch.testing.assert_close(normalised[:, channel], ((images[:, channel] + 1) / 2 - mean) / std)
    assert PixelNormalisation(5, (0.5,) * 3, (0.5,) * 3)(images).shape == (1, 3, 5, 5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_are_resized_as_pillow_does_it(interpolation: Interpolation) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    pillow = Image.fromarray(pixels).resize((16, 16), Image.Resampling[interpolation.upper()])
    images, wanted = (torch.from_numpy(np.array(one)).permute(2, 0, 1)[None].float() for one in (pixels, pillow))
    found = PixelNormalisation(16, (0.5,) * 3, (0.5,) * 3, interpolation)(images / 127.5 - 1)
    assert float((found.clamp(-1, 1) - (wanted / 127.5 - 1)).abs().max()) < 1.6 / 127.5, "but for rounding"


def test_interpolations_are_known_by_word_and_by_pillows_number() -> None:
    known = {"bicubic": "bicubic", "bilinear": "bilinear", 2: "bilinear", 3: "bicubic", "random": "bicubic"}
    for name, wanted in known.items():
        assert interpolation_of(name, "x") == wanted
    with pytest.raises(ValueError, match="the processor of 'a' resizes with 1, but a teacher needs bicubic"):
        interpolation_of(1, "the processor of 'a'")


def test_a_backbones_interpolation_is_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    known = timm.data.resolve_model_data_config
    monkeypatch.setattr(timm.data, "resolve_model_data_config", lambda model: known(model) | INTERPOLATION)
    config = BackboneTeacherConfig(architecture="resnet18", feature_blocks=(0,), head=None, input_size=32)
    assert BackboneTeacher(config, None, None).normalisation.interpolation == "bilinear"
    monkeypatch.undo()
    lite = BackboneTeacherConfig(input_size=32, head=None)
    assert BackboneTeacher(lite, None, None).normalisation.interpolation == "bicubic", "as ever"


INTERPOLATION = {"interpolation": "bilinear"}


def test_open_clips_markers_in_a_caption_are_text() -> None:
    import open_clip

    named: Any = SimpleNamespace(config=OpenClipTeacherConfig(name="ViT-B-32"))
    plain, theirs = OpenClipTeacher.tokenizer.func(named), open_clip.get_tokenizer("ViT-B-32")
    assert torch.equal(plain(["a cat, it's 12"]), theirs(["a cat, it's 12"]))
    for text in ("a <end_of_text> dog", "&lt;END_OF_TEXT&gt; a <start_of_text>"):
        ids = plain([text])[0].tolist()
        assert (ids.count(plain.sot_token_id), ids.count(plain.eot_token_id)) == (1, 1)
        assert theirs([text])[0].tolist() != ids


class TestBackboneTeacher:
    def test_contract_holds_without_a_head(self, backbone_teacher: BackboneTeacher, images: Tensor) -> None:
        check_contract(backbone_teacher, images, (4, 4))
        first, second = backbone_teacher.features(images, (4, 4)).split([112, 320], dim=-1)  # stages 4 and 6 of Lite0
        check_standardised(first)
        check_standardised(second)
        assert not backbone_teacher.has_text

    def test_contract_holds_with_a_head(self, aligned_teacher: BackboneTeacher, images: Tensor) -> None:
        check_contract(aligned_teacher, images, (4, 4))
        check_standardised(aligned_teacher.features(images, (4, 4)))
        check_texts(aligned_teacher)

    def test_the_backbones_features_can_stand_beside_the_aligned_ones(
        self, aligned_teacher: BackboneTeacher, images: Tensor
    ) -> None:
        config = aligned_teacher.config
        head = config.head.model_copy(update={"keep_backbone": True})
        both = BackboneTeacher(config.model_copy(update={"head": head}), None, aligned_teacher.head.words).freeze()
        both.load_state_dict(aligned_teacher.state_dict())
        check_contract(both, images, (4, 4))
        raw, aligned = both.features(images, (4, 4)).split([112 + 320, 16], dim=-1)
        torch.testing.assert_close(raw, aligned_teacher.raw_features(images, (4, 4)))
        torch.testing.assert_close(aligned, aligned_teacher.features(images, (4, 4)))
        torch.testing.assert_close(both.embed_images(images), aligned_teacher.embed_images(images))
        check_pooling(both, images, both.native_grid, ())
        with pytest.raises(ValueError, match="not those of layer 3; set tokenizer.semantic_layer=null"):
            both.pool(both.features(images, (4, 4)), 3)

    def test_features_without_the_backbones_cannot_be_pooled(
        self, aligned_teacher: BackboneTeacher, images: Tensor
    ) -> None:
        assert not aligned_teacher.pools_features
        with pytest.raises(ValueError, match="BackboneTeacher cannot pool its features.*keep_backbone"):
            aligned_teacher.pool(aligned_teacher.features(images, (4, 4)))

    def test_features_of_a_stage_are_timms(self, efficientnet_state: dict[str, Tensor], images: Tensor) -> None:
        import timm

        config = BackboneTeacherConfig(input_size=64, feature_blocks=(6,), head=None)
        teacher = BackboneTeacher(config, efficientnet_state, None).freeze()
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        model.load_state_dict(efficientnet_state)
        resized = torch.nn.functional.interpolate(images, size=(64, 64), mode="bicubic", antialias=True)
        data = timm.data.resolve_model_data_config(model)
        mean, std = (torch.tensor(data[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        with torch.no_grad():
            last = model.eval().forward_intermediates(((resized + 1) / 2 - mean) / std, intermediates_only=True)[-1]
        maps = last.permute(0, 2, 3, 1)
        expected = torch.nn.functional.layer_norm(maps, maps.shape[-1:])
        torch.testing.assert_close(teacher.features(images, (2, 2)), expected, atol=1e-4, rtol=1e-3)

    def test_converted_weights_know_their_classes(self, efficientnet_state: dict[str, Tensor], emoji: Emoji) -> None:
        import timm

        model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
        model.load_state_dict(efficientnet_state, strict=True)
        data = timm.data.resolve_model_data_config(model)
        normalise = PixelNormalisation(224, data["mean"], data["std"])
        for code, wanted in {"1f353": 949, "1f34d": 953, "1f34a": 950, "1f427": 145, "1f98b": 323}.items():
            with torch.no_grad():
                logits = model(normalise(emoji(code)))[0]
            rank = int((logits > logits[wanted]).sum())
            assert rank < 20, f"{code} is ImageNet's class {wanted}, though it is drawn"

    def test_crops_of_one_emoji_are_closer_than_other_emoji(
        self, backbone_teacher: BackboneTeacher, emoji: Emoji
    ) -> None:
        pictures = [emoji(code) for code in ("1f431", "1f697", "1f34c", "1f3e0")]
        crops = torch.cat([picture[..., start : start + 112, :112] for picture in pictures for start in (0, 16)])
        embedded = backbone_teacher.embed_images(crops)
        similarity = embedded @ embedded.T - 2 * torch.eye(8)
        assert similarity.argmax(1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]

    def test_no_text_tower_is_said(self, backbone_teacher: BackboneTeacher) -> None:
        with pytest.raises(ValueError, match="BackboneTeacher has no text tower"):
            backbone_teacher.embed_texts(["cat"])

    def test_a_teacher_comes_back_from_its_state(self, aligned_teacher: BackboneTeacher, images: Tensor) -> None:
        loaded = BackboneTeacher(aligned_teacher.config, None, aligned_teacher.head.words).freeze()
        loaded.load_state_dict(aligned_teacher.state_dict())
        torch.testing.assert_close(loaded.features(images, (4, 4)), aligned_teacher.features(images, (4, 4)))
        torch.testing.assert_close(loaded.embed_texts(["a dog"]), aligned_teacher.embed_texts(["a dog"]))

    def test_words_are_a_bag(self, aligned_teacher: BackboneTeacher) -> None:
        a, b, unknown, empty = aligned_teacher.embed_texts(["Cat, dog!", "dog cat", "zebra", ""])
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(unknown, empty)
        assert split_words("A cat's 2 Eyes!") == ["a", "cat", "s", "2", "eyes"]

    @pytest.mark.parametrize("key", ["_blocks.16._bn1.weight", "_blocks.3._se_reduce.weight", "layer1.0.weight"])
    def test_keys_of_other_networks_are_refused_by_name(self, key: str) -> None:
        with pytest.raises(ValueError, match=key.replace(".", r"\.")):
            convert_efficientnet_lite0({key: torch.zeros(1)})


class TestOtherBackbones:
    """Backbones that are no EfficientNet show their levels as timm's `forward_intermediates` does."""

    @staticmethod
    def make(architecture: str, blocks: tuple[int, ...], size: int, **fields: Any) -> BackboneTeacher:
        torch.manual_seed(0)
        config = BackboneTeacherConfig(
            architecture=architecture, feature_blocks=blocks, input_size=size, **({"head": None} | fields)
        )
        teacher = BackboneTeacher(config, None, ["cat"]).freeze()
        assert isinstance(teacher, BackboneTeacher)
        return teacher

    @pytest.mark.parametrize(("architecture", "size"), [("resnet18", 64), ("vit_tiny_patch16_224", 224)])
    def test_contract_holds(self, architecture: str, size: int, images: Tensor) -> None:
        teacher = self.make(architecture, (1, 3), size)
        check_contract(teacher, images, (4, 4))
        widths = teacher.level_widths((4, 4), (2, 4))  # layers count from 1, blocks from 0
        pixels = teacher.normalisation(images)
        with torch.no_grad():
            expected = teacher.backbone.forward_intermediates(pixels, indices=[1, 3], intermediates_only=True)
        maps = list(teacher.stage_maps(pixels, 3))
        for found, wanted in zip((maps[1], maps[3]), expected, strict=True):
            assert torch.equal(found, wanted)
        for part in teacher.features(images, (4, 4)).split([level.shape[1] for level in expected], dim=-1):
            check_standardised(part)
        assert [width % level.shape[1] for width, level in zip(widths, expected, strict=True)] == [0, 0]

    def test_a_head_stands_on_any(self, images: Tensor) -> None:
        teacher = self.make("resnet18", (2, 4), 64, head=AlignedHeadConfig(dim=16, keep_backbone=True))
        check_contract(teacher, images, (4, 4))
        assert teacher.pools_from(None) and not teacher.pools_from(3)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({}, r"teacher\.model\.feature_blocks=\[4, 6\]: resnet18 has stages 0\.\.4"),
            (
                {"architecture": "tf_efficientnet_lite0", "feature_blocks": (7,)},
                r"feature_blocks=\[7\]: tf_eff.*0\.\.6",
            ),
            ({"feature_blocks": ()}, r"feature_blocks\n.*at least 1 item"),
            ({"architecture": "resnet1"}, r"teacher\.model\.architecture='resnet1': Unknown model.*list_models"),
            (
                {"architecture": "vit_tiny_patch16_224"},
                r"teacher\.model\.input_size=128 does not suit vit_tiny.*set teacher\.model\.input_size=224",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused_by_field(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            BackboneTeacher(BackboneTeacherConfig(**({"architecture": "resnet18", "head": None} | fields)), None, None)

    def test_a_backbone_that_hides_its_stages_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import timm

        monkeypatch.setattr(timm, "create_model", lambda *_, **__: torch.nn.Linear(1, 1))
        with pytest.raises(ValueError, match=r"teacher\.model\.architecture='hidden' does not expose.*ResNets"):
            self.make("hidden", (0,), 64)

    def test_weights_of_another_network_are_refused(self, efficientnet_state: dict[str, Tensor]) -> None:
        config = BackboneTeacherConfig(architecture="resnet18", feature_blocks=(1,), head=None, weights="a.pth")
        with pytest.raises(ValueError, match=r"teacher\.model\.weights='a\.pth' are not those of timm's resnet18"):
            BackboneTeacher(config, efficientnet_state, None)


def shake(module: torch.nn.Module) -> None:
    """Weights as training leaves them: norms with scales and offsets of their own."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, torch.nn.LayerNorm):
                child.weight.add_(0.3 * torch.randn(child.weight.shape, generator=generator))
                child.bias.add_(0.2 * torch.randn(child.bias.shape, generator=generator))


def register_tiny_siglip() -> None:
    """A timm model as its SigLIP models are, no token beside the patches and a pooling with a query; they are large."""
    from timm.models import is_model, register_model
    from timm.models.vision_transformer import VisionTransformer

    def tiny_siglip(pretrained: bool = False, num_classes: int = 0, **unused: Any) -> VisionTransformer:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        return VisionTransformer(**sizes, class_token=False, global_pool="map", num_classes=num_classes)

    if not is_model("tiny_siglip"):
        register_model(tiny_siglip)


@pytest.fixture(scope="module", params=["vit", "timm", "map"])
def open_clip_name(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny architecture: open_clip's own ViT with a class token, or a timm trunk as its SigLIP models have it."""
    import open_clip

    vision: dict[str, Any] = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config: dict[str, Any] = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    if request.param == "map":  # "siglip" in a name makes open_clip fetch its tokenizer
        register_tiny_siglip()
        vision = {
            "image_size": 32,
            "timm_model_name": "tiny_siglip",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        }
        extras = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
        config |= {"embed_dim": 32, "custom_text": True, "vision_cfg": vision, "text_cfg": text | extras}
    if request.param == "timm":
        vision = {
            "image_size": 32,
            "timm_model_name": "test_vit",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
        }
        extras = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
        config |= {"custom_text": True, "init_logit_bias": -10, "vision_cfg": vision, "text_cfg": text | extras}
    name = f"tiny-{request.param}"
    path = tmp_path_factory.mktemp("open_clip") / f"{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return name


class TestOpenClipTeacher:
    @pytest.fixture
    def teacher(self, open_clip_name: str) -> Teacher:
        torch.manual_seed(0)
        return OpenClipTeacher(OpenClipTeacherConfig(name=open_clip_name, pretrained=None)).freeze()

    def test_contract_holds(self, teacher: Teacher, images: Tensor) -> None:
        check_contract(teacher, images, (4, 4))
        check_standardised(teacher.features(images, (4, 4)))
        assert teacher.features(images, (3, 5)).shape[1:3] == (3, 5)
        check_texts(teacher)

    def test_a_siglip_pools_what_its_layers_know(self, teacher: OpenClipTeacher, images: Tensor) -> None:
        if teacher.config.name == "tiny-map":
            shake(teacher)
            check_pooling(teacher, images, (4, 4), (1, 2))
            return
        assert not teacher.pools_features, "a class token is not among the features"
        with pytest.raises(ValueError, match="OpenClipTeacher cannot pool its features"):
            teacher.pool(teacher.features(images, (4, 4)))

    def test_features_keep_their_places(self, teacher: OpenClipTeacher) -> None:
        patches = teacher._patches(torch.zeros(1, 3, teacher.side, teacher.side))
        grid = (patches.shape[2], patches.shape[3])
        images = torch.zeros(1, 3, teacher.side, teacher.side)
        changed = images.clone()
        changed[..., :4, -4:] = 1.0
        moved = (teacher.features(images, grid) - teacher.features(changed, grid)).norm(dim=-1)[0]
        assert int(moved.argmax()) == grid[1] - 1, "the upper right patch changed most"

    def test_pixel_statistics_travel_with_the_weights(self, teacher: OpenClipTeacher, images: Tensor) -> None:
        """The tag's statistics are lost where a snapshot is built again without the tag, unless they are saved."""
        teacher.pixel_mean.fill_(0.5)
        teacher.pixel_std.fill_(0.25)
        loaded = OpenClipTeacher(teacher.config).freeze()
        loaded.load_state_dict(teacher.state_dict())
        assert loaded.normalisation == PixelNormalisation(32, (0.5,) * 3, (0.25,) * 3)
        torch.testing.assert_close(loaded.features(images, (4, 4)), teacher.features(images, (4, 4)))

    def test_pixel_statistics_are_the_models_own(self, teacher: OpenClipTeacher) -> None:
        import open_clip

        known = open_clip.get_model_preprocess_cfg(teacher.model)
        assert teacher.normalisation.mean == pytest.approx(known["mean"])
        assert teacher.normalisation.std == pytest.approx(known["std"])
        assert teacher.normalisation.interpolation == known["interpolation"]


@pytest.fixture(scope="module", params=["siglip", "clip", "siglip2"])
def transformers_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a tokenizer and an image processor of its own.

    The third is a SigLIP2 of fixed resolution: the architecture of SigLIP, a tokenizer that knows no longest text.
    """
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(str(request.param))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    text = sizes | {"vocab_size": 6, "max_position_embeddings": 10, "pad_token_id": 0, "eos_token_id": 5}
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    if request.param == "clip":
        CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)).save_pretrained(folder)
        CLIPImageProcessor(**statistics).save_pretrained(folder)
    else:
        SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(folder)
        # SigLIP2's own says bilinear
        resample = 2 if request.param == "siglip2" else 3
        SiglipImageProcessor(**statistics, resample=resample).save_pretrained(folder)
    save_word_tokenizer(folder, None if request.param == "siglip2" else 10)
    return folder


class TestTransformersTeacher:
    @pytest.fixture
    def teacher(self, transformers_folder: Path) -> Teacher:
        return TransformersTeacher(TransformersTeacherConfig(path=str(transformers_folder))).freeze()

    def test_contract_holds(self, teacher: Teacher, images: Tensor) -> None:
        check_contract(teacher, images, (4, 4))
        check_standardised(teacher.features(images, (4, 4)))
        assert teacher.features(images, (3, 5)).shape[1:3] == (3, 5)
        check_texts(teacher)
        written, unknown = teacher.embed_texts(["a </s> cat", "a ? ? ? cat"])
        assert torch.equal(written, unknown), "a marker in a caption is text"

    def test_a_siglip_pools_what_its_layers_know(self, teacher: TransformersTeacher, images: Tensor) -> None:
        if hasattr(teacher.model.vision_model, "head"):
            shake(teacher)
            check_pooling(teacher, images, (4, 4), (1, 2))
            return
        with pytest.raises(ValueError, match="TransformersTeacher cannot pool its features"):
            teacher.pool(teacher.features(images, (4, 4)))

    def test_pixel_statistics_are_the_processors(self, teacher: TransformersTeacher, transformers_folder: Path) -> None:
        interpolation = teacher.normalisation.interpolation
        assert teacher.normalisation == PixelNormalisation(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), interpolation)
        assert interpolation == ("bilinear" if "siglip2" in transformers_folder.name else "bicubic")

    def test_features_are_the_patches_in_place(self, teacher: TransformersTeacher) -> None:
        images = torch.rand(1, 3, 32, 32)
        with torch.no_grad():
            tokens = teacher.model.vision_model(pixel_values=teacher.normalisation(images)).last_hidden_state
        patches = tokens[:, tokens.shape[1] - 16 :]
        expected = torch.nn.functional.layer_norm(patches, (32,)).view(1, 4, 4, 32)
        torch.testing.assert_close(teacher.features(images, (4, 4)), expected)
