"""Training of an image tokenizer with a discriminator, with the losses of the papers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, create_model, model_validator
from torch import Tensor, nn

from infra.terminal import on_one_line
from models.config import Config, Fraction
from models.ranks import is_first_rank, mean_terms, num_ranks, own_part, start_equal
from models.teachers.backbone import BackboneTeacher
from models.teachers.teacher import Teacher
from models.teachers.zero_shot import Templates
from models.tokenizers.config import TokenizerConfig
from models.tokenizers.convolutional import DISCRIMINATORS
from models.tokenizers.image_tokenizer import ImageTokenizer, TokenizerOutput
from models.tokenizers.kinds import KINDS, build_tokenizer, tokenizer_config
from models.tokenizers.losses import (
    BackbonePerceptualDistance,
    ContrastiveLossConfig,
    LossConfig,
    SemanticLossConfig,
    adaptive_weight,
    contrastive_loss,
    generator_loss,
    hinge_discriminator_loss,
    semantic_loss,
)
from models.transforms import CropConfig, RandomCrop, normalise, to_pixels
from stages.artifacts import external_codes
from stages.artifacts.images import BatchReader, ImageSource
from stages.artifacts.models import load_teacher, put_json, put_weights, read_state
from stages.artifacts.rows import TEST, TRAIN
from stages.artifacts.templates import Template, fill_row
from stages.metrics.catalogue import HELD_OUT_CURVE
from stages.metrics.measuring import ZeroShot, feature_space, lpips_distance, perceptual_of, weights_inputs
from stages.metrics.reconstructions import ReconstructionMeasures
from stages.metrics.rows import artifact_metrics, name_of
from stages.protocol import Outcome, RuntimeInt, RuntimeStr, Stage, StageContext
from stages.runtime.devices import autocast, resolve_device
from stages.runtime.progress import in_batches
from stages.runtime.seeds import mix_seed
from stages.train_tokenizer.held_out import HeldOut
from stages.training.loop import EpochSampler, OptimiserConfig, build_optimiser, optimise, train
from stages.training.shared import SharedLoopConfig, run_shared
from storage.digests import sha256_file
from storage.manifest import Manifest
from storage.tables import OURS

logger = logging.getLogger(__name__)

_EVALUATION_BATCH = 32
_PICTURES = 8
_FEATURE_CACHE_BYTES = 2 << 30
"""Teacher features of the training images are cached if they fit into this size, and else computed at every step."""


class TrainTokenizerConfig(SharedLoopConfig, TokenizerConfig):
    """The tokenizer, its loss and its training: what all kinds have that are trained here."""

    loss: LossConfig = LossConfig()
    """Terms of the loss and their weights."""
    discriminator_optimiser: OptimiserConfig = OptimiserConfig(weight_decay=0.0)
    """Optimiser of the discriminator."""
    decode_threads: RuntimeInt = 2
    """Number of threads that read and decode the images of the next step."""
    horizontal_flip: bool = True
    """Whether half of the training images are mirrored."""
    random_crop: CropConfig = CropConfig()
    """Random crops of the training images, sampled again at every use."""
    weights: RuntimeStr = ""
    """Initial weights, a `.safetensors` file of `musevl import-tokenizer`; its content enters the action key, not its
    path. With `steps: 0` they are used without training."""
    inception_weights: RuntimeStr = ""
    """Path of torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, for rFID on the held-out images; its
    content enters the action key, not its path. Empty: a Fréchet distance in the teacher's feature space, under another
    name."""
    measure_every: NonNegativeInt = 0
    """Number of steps between measurements on the held-out images during training; the loss curves show them at the
    next point (`log_every`). 0: only at the end."""
    class_name: Template = "{caption}"
    """Template over the metadata's columns for the class name of a held-out image in zero-shot classification."""
    class_templates: Templates = "name"
    """`name`: the text of a class is its name; `openai`: the mean over CLIP's 80 templates for ImageNet."""
    steps: NonNegativeInt = 1000
    """Number of optimiser steps; 0 uses `weights` without training."""
    ema_decay: Fraction = 0.0
    """Decay of the exponential moving average of the weights, which the artifact then holds; 0 turns it off."""

    @model_validator(mode="after")
    def _check_weights(self) -> TrainTokenizerConfig:
        if not self.steps and not self.weights:
            raise ValueError("steps=0 trains nothing; give weights, or steps")
        return self

    def needs_fp32(self, inputs: Mapping[str, Manifest]) -> bool:
        """Return True also for weights that are used without training (`steps: 0`), as they encode in fp32 as well."""
        return not self.steps or super().needs_fp32(inputs)


class TrainTowerConfig(TrainTokenizerConfig):
    """Training of the kinds that can encode with a copy of the teacher's tower."""

    tower_learning_rate_fraction: Fraction = 1.0
    """Learning rate of the trained copy of the teacher's tower, as a fraction of the learning rate: a rate that suits
    the new parts can destroy its pretrained weights."""


def training_config(kind: type[ImageTokenizer]) -> type[TrainTokenizerConfig]:
    """Make the config class of a kind's section: the fields of the kind and those of its training."""
    training, loss = TrainTowerConfig if kind.trains_tower else TrainTokenizerConfig, kind.loss_class
    # The kind's own class comes first: of fields that both have, `kind` among them, pydantic takes the first one's
    bases: tuple[Any, ...] = (kind.config_class, training)
    return create_model(
        f"Train{kind.config_class.__name__}",
        __base__=bases,
        __doc__=kind.config_class.__doc__,
        __module__=__name__,
        loss=(loss, Field(default=loss(), description=training.model_fields["loss"].description)),
    )


class ExternalCodesConfig(Config):
    """Codes of a tokenizer outside this project."""

    kind: Literal["external"] = "external"
    """Selects this kind."""
    codes: RuntimeStr
    """Folder of the codes; its content enters the action key, not its path."""


TRAINING: dict[str, type[TrainTokenizerConfig]] = {name: training_config(kind) for name, kind in KINDS.items()}
"""The config class of the section of each kind that is trained here."""
globals().update({section.__name__: section for section in TRAINING.values()})  # pickle looks them up by name

if TYPE_CHECKING:
    TokenizerSection = TrainTokenizerConfig | ExternalCodesConfig
else:
    TokenizerSection = Union[*TRAINING.values(), ExternalCodesConfig]
"""What the section `tokenizer` of a recipe can be; its `kind` says which."""


def run(context: StageContext[TokenizerSection]) -> Outcome:
    """Make the `tokenizer` artifact: `tokenizer.json`, weights and loss curves, and metrics on the held-out split."""
    if isinstance(context.config, ExternalCodesConfig):
        return external_codes.keep(context)
    return run_shared(context, _train)


def _train(context: StageContext[TrainTokenizerConfig]) -> Outcome | None:
    config = context.config
    source = ImageSource(context.store, context.inputs["download"], config.transform, split=TRAIN)
    prepared = context.inputs.get("prepare_teacher")
    teacher = load_teacher(context.store, prepared) if prepared is not None else None
    torch.manual_seed(mix_seed(context.seed, "tokenizer"))
    training = TokenizerTraining(config, context.seed, source, teacher)
    training.held_out = _held_out(context, training)
    with training.reader:
        history = train(context, training, config)
    tokenizer = training.final_tokenizer()
    found = training.held_out.measure(tokenizer)
    if not is_first_rank():
        return None
    for name, value in _held_out_curves(found).items():
        history.add(config.steps, name, value)
    files = [
        put_json(context.store, tokenizer.config.model_dump(mode="json"), "tokenizer.json"),
        put_weights(context, tokenizer),
        history.save(context),
    ]
    weights = "ema" if config.ema_decay else "last"
    measured = {
        "split": training.held_out.split,
        "num_images": len(training.held_out.source),
        "settings": {name_of(row): row["settings"] for row in found if row["role"] == OURS},
    }
    metadata = {"weights": weights, "code_shape": list(tokenizer.code_shape), "measured": measured}
    return Outcome("tokenizer", files, metrics=artifact_metrics(found), metadata=metadata)


class TokenizerTraining:
    """Trains the tokenizer (the generator) and, from `adversarial_start` on, the discriminator."""

    def __init__(self, config: TrainTokenizerConfig, seed: int, source: ImageSource, teacher: Teacher | None) -> None:
        self.config, self.source = config, source
        self.device = resolve_device(config.device)
        self.teacher = teacher.to(self.device) if teacher is not None else None
        self.tokenizer = build_tokenizer(tokenizer_config(config.model_dump()), self.teacher).to(self.device)
        if config.weights:
            _load_weights(self.tokenizer, config.weights)
        loss = config.loss
        pooled_weight = loss.pooled_weight if isinstance(loss, SemanticLossConfig) else 0.0
        if pooled_weight and not (self.tokenizer.has_semantic_branch and self.tokenizer.embeds_codes):
            raise ValueError(
                f"tokenizer.loss.pooled_weight={pooled_weight} needs a kind that predicts the teacher's features "
                f"and a teacher that can pool them: SigLIP, or a backbone whose head has keep_backbone (which pools "
                f"its final features alone, tokenizer.semantic_layer=null); set it to 0"
            )
        discriminator = DISCRIMINATORS[loss.discriminator]
        self.discriminator = discriminator(loss.discriminator_channels, loss.discriminator_layers).to(self.device)
        start_equal(self.tokenizer, self.discriminator)
        slower = {"tower": config.tower_learning_rate_fraction} if isinstance(config, TrainTowerConfig) else {}
        self.optimiser = build_optimiser(self.tokenizer, config.optimiser, slower)
        self.discriminator_optimiser = build_optimiser(self.discriminator, config.discriminator_optimiser)
        self.perceptual = _perceptual_distance(loss, self.teacher)
        self.average = (
            build_tokenizer(self.tokenizer.config, self.teacher).to(self.device) if config.ema_decay else None
        )
        if self.average is not None:
            self.average.load_state_dict(self.tokenizer.state_dict())
        self.sampler = EpochSampler(len(source), config.batch_size, seed)
        self.seed = seed
        crops_of = self._own_crops if config.random_crop.kind != "none" else None
        self.reader = BatchReader(source, self._own_rows, config.steps, config.decode_threads, crops_of)
        self.held_out: HeldOut | None = None

    def step(self, step: int) -> dict[str, Tensor]:
        rows = self._own_rows(step)
        images = normalise(self.reader.pixels(step).to(self.device))
        mirrored = torch.rand(self.config.batch_size) < (0.5 if self.config.horizontal_flip else 0.0)
        mirrored = mirrored[own_part(self.config.batch_size)]
        images = torch.where(mirrored.to(self.device)[:, None, None, None], images.flip(3), images)
        target = None
        if self.teacher_features is not None:
            target = self.teacher_features[mirrored.long(), torch.tensor(rows)].to(self.device).float()
        self.tokenizer.train()
        with autocast(self.device, self.config.precision):
            output = self.tokenizer(images, target)
            loss, terms = self._generator_loss(output, images, rows, step)
        terms["loss"] = loss
        terms["gradient_norm"] = optimise(
            [loss], self.tokenizer, self.optimiser, self.config.optimiser, step, self.config.steps
        )
        if self._adversarial(step):
            terms["discriminator"] = self._train_discriminator(output.reconstruction.detach(), images, step)
        terms = mean_terms(terms)
        self._average_weights()
        every = self.config.measure_every
        if self.held_out is not None and every and (step + 1) % every == 0 and step + 1 < self.config.steps:
            measured = _held_out_curves(self.held_out.measure(self.final_tokenizer()))
            # non-finite metrics are left out, since the loop would stop at them as at a non-finite loss
            terms |= {name: torch.tensor(value) for name, value in measured.items() if math.isfinite(value)}
        return terms

    def _own_rows(self, step: int) -> list[int]:
        """Return the indices of this rank's images of a step."""
        return self.sampler.batch(step)[own_part(self.config.batch_size)]

    def _own_crops(self, step: int) -> list[RandomCrop]:
        """Return the crops of this rank's images; those of a step do not depend on the number of ranks."""
        places = range(self.config.batch_size)[own_part(self.config.batch_size)]
        return [RandomCrop(self.config.random_crop, mix_seed(self.seed, "crop", step, place)) for place in places]

    @cached_property
    @torch.no_grad()
    def teacher_features(self) -> Tensor | None:
        """Teacher features of all training images and their mirror images, `[2, N, h, w, C]`, or None if not cached.

        The teacher is frozen, so if flipping is the only augmentation and the data are small, two passes per image
        suffice.
        """
        if self.teacher is None or not self.tokenizer.has_semantic_branch or self.config.random_crop.kind != "none":
            return None
        rows, columns = self.tokenizer.grid
        if 2 * len(self.source) * rows * columns * self.teacher.feature_dim * 4 > _FEATURE_CACHE_BYTES // num_ranks():
            return None
        views: list[list[Tensor]] = [[], []]
        for rows_of_batch in in_batches(len(self.source), _EVALUATION_BATCH, "teacher's features of training images"):
            images = normalise(self.source.pixels(rows_of_batch).to(self.device))
            for view, shown in zip(views, (images, images.flip(3)), strict=True):
                with autocast(self.device, self.config.precision):
                    target = self.tokenizer.target_features(shown)
                assert target is not None, "a semantic branch has a target"
                view.append(target.cpu())
        return torch.stack([torch.cat(view) for view in views])

    def _adversarial(self, step: int) -> bool:
        return self.config.loss.adversarial_weight > 0 and step >= self.config.loss.adversarial_start

    def _generator_loss(
        self, output: TokenizerOutput, images: Tensor, rows: list[int], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.config.loss
        drawn = output.reconstruction.float()
        terms = {"l2": F.mse_loss(drawn, images), "quantizer": output.quantizer_loss}
        reconstruction = weights.l2_weight * terms["l2"]
        if weights.l1_weight:
            terms["l1"] = F.l1_loss(drawn, images)
            reconstruction = reconstruction + weights.l1_weight * terms["l1"]
        if self.perceptual is not None:
            looked_at = max(1, round(weights.perceptual_fraction * len(images)))
            terms["perceptual"] = self.perceptual(drawn[:looked_at], images[:looked_at]).mean()
            reconstruction = reconstruction + weights.perceptual_weight * terms["perceptual"]
        loss = reconstruction + output.quantizer_loss
        if output.semantic_prediction is not None and output.semantic_target is not None:
            assert isinstance(weights, SemanticLossConfig), "the kind decodes features"
            terms["semantic"] = semantic_loss(output.semantic_prediction, output.semantic_target)
            semantic = terms["semantic"]
            if weights.semantic_mse_weight:
                terms["semantic_mse"] = F.mse_loss(output.semantic_prediction.float(), output.semantic_target.float())
                semantic = semantic + weights.semantic_mse_weight * terms["semantic_mse"]
            loss = loss + weights.semantic_weight * semantic
            if weights.pooled_weight:
                loss = loss + weights.pooled_weight * self._pooled_loss(output, terms, weights)
        if output.image_embedding is not None:
            assert self.teacher is not None and isinstance(weights, ContrastiveLossConfig), "the kind is aligned"
            texts = self.teacher.embed_texts([self.source.captions[row] for row in rows])
            terms["contrastive"] = contrastive_loss(output.image_embedding, texts, self.tokenizer.logit_scale)
            loss = loss + weights.contrastive_weight * terms["contrastive"]
        if self._adversarial(step):
            terms["adversarial"] = generator_loss(self.discriminator(drawn))
            scale: Tensor | float = weights.adversarial_weight
            if weights.adversarial_adaptive:
                compared, last_layer = reconstruction, self.tokenizer.decoder.last_layer
                if weights.adversarial_l2_weight is not None:
                    compared = compared + (weights.adversarial_l2_weight - weights.l2_weight) * terms["l2"]
                scale = scale * adaptive_weight(compared, terms["adversarial"], last_layer, weights.adversarial_clamp)
            loss = loss + scale * terms["adversarial"]
        return loss, terms

    def _pooled_loss(self, output: TokenizerOutput, terms: dict[str, Tensor], weights: SemanticLossConfig) -> Tensor:
        """Compute DualToken's semantic loss on pooled vectors (released code, stage 1), and record its `terms`."""
        assert output.semantic_prediction is not None and output.semantic_target is not None
        predicted = self.tokenizer.pooled_prediction(output.semantic_prediction).float()
        with torch.no_grad():
            target = self.tokenizer.pooled_target(output.semantic_target).float()
        terms["pooled"] = semantic_loss(predicted, target)
        if not weights.semantic_mse_weight:
            return terms["pooled"]
        terms["pooled_mse"] = F.mse_loss(predicted, target)
        return terms["pooled"] + weights.semantic_mse_weight * terms["pooled_mse"]

    def _train_discriminator(self, drawn: Tensor, images: Tensor, step: int) -> Tensor:
        weights = self.config.loss
        begun = weights.adversarial_start if weights.discriminator_schedule == "own" else 0
        with autocast(self.device, self.config.precision):
            real, fake = self.discriminator(images), self.discriminator(drawn)
            loss = hinge_discriminator_loss(real, fake, weights.hinge_slope)
        optimise(
            [loss],
            self.discriminator,
            self.discriminator_optimiser,
            self.config.discriminator_optimiser,
            step - begun,
            self.config.steps - begun,
        )
        return loss

    @torch.no_grad()
    def _average_weights(self) -> None:
        if self.average is None:
            return
        for mean, current in zip(self.average.parameters(), self.tokenizer.parameters(), strict=True):
            mean.lerp_(current, 1 - self.config.ema_decay)
        # buffers are copied: an EMA codebook is a moving average already
        for buffer, current_buffer in zip(self.average.buffers(), self.tokenizer.buffers(), strict=True):
            buffer.copy_(current_buffer)

    def final_tokenizer(self) -> ImageTokenizer:
        """Return the tokenizer whose weights the artifact holds, in eval mode."""
        return (self.average if self.average is not None else self.tokenizer).eval()

    def batch_keys(self, step: int) -> list[str]:
        return [self.source.keys[index] for index in self.sampler.batch(step)]

    @torch.no_grad()
    def pictures(self) -> dict[str, Tensor]:
        """Return the first training images above their reconstructions."""
        shown = list(range(min(_PICTURES, len(self.source))))
        images = normalise(self.source.pixels(shown).to(self.device))
        tokenizer = self.final_tokenizer()
        with autocast(self.device, self.config.precision):
            drawn = to_pixels(tokenizer(images).reconstruction).cpu()
        rows = [torch.cat(list(row), dim=2) for row in (self.source.pixels(shown), drawn)]
        return {"originals and reconstructions": torch.cat(rows, dim=1)}

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {
            "tokenizer": self.tokenizer,
            "discriminator": self.discriminator,
            "optimiser": self.optimiser,
            "discriminator_optimiser": self.discriminator_optimiser,
        }
        return parts | ({"average": self.average} if self.average is not None else {})

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


def _held_out_curves(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the tokenizer's own metrics by the names of their curves."""
    return {f"{HELD_OUT_CURVE}{name_of(row)}": row["value"] for row in rows if row["role"] == OURS}


def _load_weights(tokenizer: ImageTokenizer, path: str) -> None:
    state = read_state(path, "tokenizer.weights")
    try:
        tokenizer.load_state_dict(state)
    except RuntimeError as error:
        reason = on_one_line(error, 300)
        raise ValueError(
            f"tokenizer.weights={path!r} are not those of this recipe's tokenizer: {reason}; `musevl import-tokenizer` "
            f"with the same recipe writes them"
        ) from error


def _perceptual_distance(loss: LossConfig, teacher: Teacher | None) -> nn.Module | None:
    if loss.perceptual == "none" or loss.perceptual_weight == 0:
        return None
    if loss.perceptual == "lpips":
        return lpips_distance("tokenizer.loss.lpips_vgg_weights", loss.lpips_vgg_weights)
    if not isinstance(teacher, BackboneTeacher):
        raise ValueError(
            "tokenizer.loss.perceptual=backbone needs teacher.model.kind=backbone; use lpips (with "
            "tokenizer.loss.lpips_vgg_weights where no hub is reachable) or none"
        )
    return BackbonePerceptualDistance(teacher)


def _held_out(context: StageContext[TrainTokenizerConfig], training: TokenizerTraining) -> HeldOut:
    """Prepare the measurement on the test split, or on the training split if no image is held out."""
    config, teacher, device = context.config, training.teacher, training.device
    download = context.inputs["download"]
    split = TEST if TEST in download.metadata.get("splits", {}) else TRAIN
    if split == TRAIN:
        logger.warning(
            "the download holds nothing out: the tokenizer is measured on its training images, and evaluate will need "
            "some: set download.held_out_fraction, or give the rows a column `split` (download.extra_columns: [split])"
        )
    source = ImageSource(context.store, download, config.transform, split=split)
    names = [fill_row(config.class_name, source.row(row)) for row in range(len(source))]
    space = task = None
    if teacher is not None or config.inception_weights:
        space = feature_space("tokenizer", config.inception_weights, teacher, device)
    if teacher is not None:
        task = ZeroShot.of(teacher, names, config.class_templates)
    perceptual = perceptual_of(training.perceptual)
    return HeldOut(source, split, ReconstructionMeasures(perceptual, space, task, device, config.precision))


def _external_inputs(config: TokenizerSection) -> dict[str, str]:
    if isinstance(config, ExternalCodesConfig):
        return external_codes.content_of(config.codes)
    given = weights_inputs("tokenizer", inception_weights=config.inception_weights)
    if not config.weights:
        return given
    if not Path(config.weights).is_file():
        raise ValueError(f"tokenizer.weights={config.weights!r} does not exist; `musevl import-tokenizer` writes it")
    return given | {"weights": sha256_file(config.weights)}


def _unused_inputs(config: TokenizerSection) -> tuple[str, ...]:
    """Return the teacher as unused if neither the kind nor the perceptual distance needs it, since it only measures."""
    if not isinstance(config, ExternalCodesConfig):
        looks_through_it = config.loss.perceptual == "backbone" and config.loss.perceptual_weight > 0
        if looks_through_it or KINDS[config.kind].needs_teacher:
            return ()
    return ("prepare_teacher",)


STAGE = Stage(
    name="train_tokenizer",
    section="tokenizer",
    inputs=("download", "prepare_teacher"),
    unused_inputs=_unused_inputs,
    run=run,
    version=5,  # held-out metrics have the names, settings and functions of evaluation
    external_inputs=_external_inputs,
)
