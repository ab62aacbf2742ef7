"""Fréchet distances, perceptual distances and zero-shot classification, for tokenizer training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.metrics.frechet import InceptionFeatures
from models.teachers.backbone import BackboneTeacher
from models.teachers.teacher import Teacher
from models.teachers.zero_shot import Templates, class_embeddings, class_ranks
from models.tokenizers.image_tokenizer import ImageTokenizer
from models.tokenizers.losses import LpipsDistance
from models.transforms import normalise
from stages.artifacts.models import read_state
from storage.digests import sha256_file

RFID, FRECHET_TEACHER = "rfid", "frechet_teacher"


class SetDistance(NamedTuple):
    """Name and settings of a Fréchet distance in a feature space."""

    metric: str
    """`rfid` in Inception's space, else `frechet_teacher`, which is comparable between our runs but not with papers."""
    settings: dict[str, Any]
    """What should be reported with the metric: library, weights, features."""


@dataclass(frozen=True)
class FeatureSpace:
    """Feature space in which the sets of reconstructions and originals are compared."""

    distance: SetDistance
    describe: Callable[[Tensor], Tensor]
    """uint8 `[B, 3, H, W]` on the CPU -> float32 `[B, F]` on the CPU."""


def feature_space(section: str, inception_weights: str, teacher: Teacher | None, device: torch.device) -> FeatureSpace:
    """Return FID's own feature space if its weights are given, else the teacher's.

    Args:
        section: of the recipe, for messages.
        inception_weights: path of torch-fidelity's weights, or "".
        teacher: frozen; on `device`. None where Inception's weights are given.
        device: where features are computed.

    Raises:
        ValueError: there is no such file, or it is damaged or of another network.
    """
    if inception_weights:
        network = _inception(section, inception_weights).to(device)
        settings = {
            "library": InceptionFeatures.library(),
            "weights": sha256_file(inception_weights),
            "features": "InceptionV3, last pooling, 2048",
        }
        return FeatureSpace(SetDistance(RFID, settings), lambda pixels: network(pixels.to(device)).cpu())
    assert teacher is not None, "there is nothing to compare in"
    if isinstance(teacher, BackboneTeacher):
        blocks = ", ".join(map(str, teacher.config.feature_blocks))
        what = f"{teacher.config.architecture}, blocks {blocks}, mean over positions"
    else:
        what = f"{type(teacher).__name__}, image embeddings"
    settings = {"features": what, "rule": "Fréchet distance in the teacher's space: no FID, compares with no paper"}
    return FeatureSpace(SetDistance(FRECHET_TEACHER, settings), partial(_teacher_features, teacher, device))


@torch.no_grad()
def _teacher_features(teacher: Teacher, device: torch.device, pixels: Tensor) -> Tensor:
    images = normalise(pixels).to(device)
    if isinstance(teacher, BackboneTeacher):
        return teacher.raw_features(images, teacher.native_grid).mean((1, 2)).float().cpu()
    return teacher.embed_images(images).float().cpu()


def _inception(section: str, path: str) -> InceptionFeatures:
    _check_file(section, "inception_weights", path)
    state = read_state(path, f"{section}.inception_weights")
    try:
        return InceptionFeatures(state)
    except ValueError as error:
        raise ValueError(f"{section}.inception_weights={path!r}: {error}") from error


def weights_inputs(section: str, **paths: str) -> dict[str, str]:
    """Return the digests of weight files for a stage's external inputs, so that their content enters the action key.

    Args:
        section: of the recipe, for messages.
        paths: by the name of the config's field; an empty one is left out.

    Raises:
        ValueError: there is no such file.
    """
    given = {name: path for name, path in paths.items() if path}
    for name, path in given.items():
        _check_file(section, name, path)
    return {name: sha256_file(path) for name, path in given.items()}


class Perceptual(NamedTuple):
    """A perceptual distance of image pairs and the name of its metric."""

    metric: str
    """`lpips`, or `perceptual` for a backbone's distance, which is not comparable with papers."""
    distance: nn.Module
    """Two `[B, 3, H, W]` in [-1, 1] -> `[B]`."""

    @torch.no_grad()
    def measure(self, drawn: Tensor, pixels: Tensor, device: torch.device) -> Tensor:
        """Return the distance of each pair of uint8 images `[B, 3, H, W]`, `[B]` on the CPU."""
        found: Tensor = self.distance(normalise(drawn).to(device), normalise(pixels).to(device)).cpu()
        return found


def lpips_distance(field: str, vgg_weights: str | None) -> LpipsDistance:
    """Build LPIPS with VGG's weights from a file, or from lpips's own download.

    Args:
        field: of the recipe that gives the path, for messages.
        vgg_weights: path of torchvision's VGG16 state dict; None or "" downloads it.

    Raises:
        ValueError: the file is missing, damaged or of another network, or the download fails.
    """
    return LpipsDistance(read_state(vgg_weights, field) if vgg_weights else None, field)


def perceptual_of(distance: nn.Module | None) -> Perceptual | None:
    """Return a distance with the name of its metric; None for no distance."""
    if distance is None:
        return None
    return Perceptual("lpips" if isinstance(distance, LpipsDistance) else "perceptual", distance)


def _check_file(section: str, name: str, path: str) -> None:
    if not Path(path).is_file():
        raise ValueError(
            f"{section}.{name}={path!r} does not exist; give the path of {_FILES[name]}, or leave it empty"
        )


_FILES = {
    "inception_weights": "torch-fidelity's weights-inception-2015-12-05-6726825d.pth",
    "lpips_vgg_weights": "torchvision's VGG16 state dict",
}
"""The file that each field asks for, for messages."""


@dataclass(frozen=True)
class ZeroShotClasses:
    """The classes of a zero-shot classification."""

    count: int
    templates: Templates

    def settings(self, first: int) -> dict[str, Any]:
        """Return what should be reported with an accuracy that counts the `first` nearest classes."""
        return {"classes": self.count, "templates": self.templates, "chance": first / self.count}


@dataclass(frozen=True)
class ZeroShot:
    """Zero-shot classification of images among the classes of a split."""

    names: list[str]
    """Names of the classes, sorted."""
    labels: Tensor
    """Class of each row of the split, `[rows]` int64."""
    classes: Tensor
    """Unit vectors `[K, E]`."""
    templates: Templates
    teacher: Teacher

    @classmethod
    def of(cls, teacher: Teacher, row_names: list[str], templates: Templates) -> ZeroShot | None:
        """Return the task whose classes are the distinct names of a split's rows; None without a text tower."""
        if not teacher.has_text:
            return None
        names = sorted(set(row_names))
        position = {name: index for index, name in enumerate(names)}
        labels = torch.tensor([position[name] for name in row_names])
        with torch.no_grad():
            return cls(names, labels, class_embeddings(teacher, names, templates), templates, teacher)

    @property
    def among(self) -> ZeroShotClasses:
        """Number of classes, and the templates of their names."""
        return ZeroShotClasses(len(self.names), self.templates)

    @torch.no_grad()
    def teacher_ranks(self, rows: list[int], images: Tensor) -> Tensor:
        """Return the rank `[B]` of the right class of images `[B, 3, H, W]` in [-1, 1] by the teacher's embeddings."""
        return class_ranks(self.teacher.embed_images(images).cpu(), self.classes, self.labels[rows])

    @torch.no_grad()
    def code_ranks(self, rows: list[int], tokenizer: ImageTokenizer, codes: Tensor) -> Tensor | None:
        """Return the rank by the tokenizer's codes `[B, N, D, h, w]`; None if the codes have no such embedding."""
        if not tokenizer.embeds_codes:
            return None
        return class_ranks(tokenizer.embed_codes(codes).cpu(), self.classes, self.labels[rows])
