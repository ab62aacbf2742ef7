"""The three measurements on held-out pairs: reconstruction, understanding, generation; each one maps over rows.

Shape legend: B batch, N books, D depth, h w code grid.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.language.decoding import draw_codes
from models.language.sampling import SamplingConfig
from models.language.vlm import UnifiedVlm, mean_log_likelihood
from models.teachers.backbone import BackboneTeacher
from models.teachers.teacher import Teacher
from models.teachers.zero_shot import Templates
from models.tokenizers.image_tokenizer import ImageTokenizer
from models.tokenizers.losses import BackbonePerceptualDistance
from models.transforms import TransformConfig, normalise, to_pil, to_pixels
from stages.artifacts.codes import CodedRows, load_rows
from stages.artifacts.images import ImageSource
from stages.artifacts.models import load_teacher, load_tokenizer
from stages.artifacts.rows import TEST, TRAIN
from stages.artifacts.templates import fill, fill_row
from stages.evaluate.results import TEXT_CUT
from stages.language.sequences import SequenceBuilder
from stages.language.training import load_vlm
from stages.metrics.measuring import ZeroShot, feature_space, lpips_distance, perceptual_of
from stages.metrics.reconstructions import ReconstructionMeasures
from stages.runtime.devices import autocast, resolve_device
from stages.runtime.progress import in_batches
from stages.runtime.seeds import mix_seed
from storage.manifest import Manifest
from storage.store import Store

_BATCH = 32
RANDOM, SAME_CATEGORY = "random", "same_category"


class TaskConfig(Protocol):
    """The fields of the stage's config that the tasks use."""

    question: str
    answer: str
    concept: str
    category_column: str
    num_choices: int
    prompt: str
    recognition_choices: int
    sampling: SamplingConfig
    images_per_prompt: int
    precision: str
    device: str
    cpu_threads: int
    inception_weights: str
    lpips_vgg_weights: str
    class_templates: Templates


@dataclass(frozen=True)
class Concepts:
    """The concept and category of each held-out row, and the selection of distractors."""

    names: list[str]
    categories: list[str]
    seed: int

    def choices(self, row: int, count: int, distractors: str) -> tuple[list[str], int]:
        """Return `count` different concepts in random order, including the row's own, and the position of that one.

        They depend on (seed, row, kind of distractors) alone, so every model answers the same questions.

        Raises:
            ValueError: there are not enough other concepts.
        """
        own, category = self.names[row], self.categories[row]
        others = {
            name
            for name, other in zip(self.names, self.categories, strict=True)
            if name != own and (distractors == RANDOM or other == category)
        }
        if len(others) < count - 1:
            raise ValueError(
                f"concept {own!r} has {len(others)} {distractors} distractors, {count - 1} are needed; lower "
                f"evaluate.num_choices or evaluate.recognition_choices, or hold out more concepts"
            )
        generator = torch.Generator().manual_seed(mix_seed(self.seed, "choices", row, distractors, count))
        ordered = sorted(others)
        picked = [ordered[index] for index in torch.randperm(len(ordered), generator=generator)[: count - 1]]
        position = int(torch.randint(count, (), generator=generator))
        return [*picked[:position], own, *picked[position:]], position


@dataclass(frozen=True)
class TaskFactory:
    """Picklable description of the models; calling it in the worker process builds the tasks."""

    store: Store
    config: Any
    seed: int
    inputs: dict[str, Manifest]

    def __call__(self) -> EvaluationTasks:
        return EvaluationTasks(self)


class EvaluationTasks:
    """The tasks and their models; each task measures some held-out rows and returns a dictionary per result."""

    def __init__(self, job: TaskFactory) -> None:
        self.job = job
        self.config = cast(TaskConfig, job.config)
        self.device = resolve_device(self.config.device)
        torch.set_num_threads(self.config.cpu_threads)

    def measure(self, task: str, rows: list[int]) -> list[dict[str, Any]]:
        """Run the task with a name on some held-out rows."""
        tasks = {
            "reconstruction": self.reconstruct,
            "understanding": self.understand,
            "generation": self.generate,
        }
        return tasks[task](rows)

    @cached_property
    def teacher(self) -> Teacher:
        """The frozen teacher, even if the tokenizer has no semantic branch."""
        return load_teacher(self.job.store, self.job.inputs["prepare_teacher"]).to(self.device)

    @cached_property
    def tokenizer(self) -> ImageTokenizer:
        """The trained tokenizer."""
        tokenizer = load_tokenizer(self.job.store, self.job.inputs["train_tokenizer"].digest).to(self.device)
        if tokenizer.teacher is not None:
            tokenizer.teacher.to(self.device)
        return tokenizer

    @cached_property
    def vlm(self) -> tuple[UnifiedVlm, SequenceBuilder]:
        """The fine-tuned model and its sequence builder."""
        vlm, builder = load_vlm(self.job.store, self.job.inputs["sft"])
        return vlm.to(self.device), builder

    @cached_property
    def rows(self) -> CodedRows:
        """The held-out rows of the code table, in the table's order."""
        return load_rows(self.job.store, self.job.inputs["tokenize"], split=TEST, views=False)

    @cached_property
    def transform(self) -> TransformConfig:
        """The transform of the code table's images."""
        return TransformConfig(**self.rows.info.transform)

    @cached_property
    def images(self) -> ImageSource:
        """The held-out images, in the order of `rows`."""
        source = ImageSource(self.job.store, self.job.inputs["download"], self.transform, split=TEST)
        positions = {key: position for position, key in enumerate(source.keys)}
        if missing := [key for key in self.rows.keys if key not in positions]:
            raise ValueError(
                f"the download lacks {len(missing)} held-out images of the code table, first key {missing[0]!r}; they "
                "are of different runs: tokenize this download again"
            )
        return source.only([positions[key] for key in self.rows.keys])  # some images could not be encoded

    @cached_property
    def concepts(self) -> Concepts:
        """Names and categories of the held-out rows."""
        names = [fill_row(self.config.concept, self.rows.row(index)) for index in range(len(self.rows))]
        categories = self.rows.columns.get(self.config.category_column) or [""] * len(names)
        return Concepts(names, [category or "" for category in categories], self.job.seed)

    @cached_property
    def measures(self) -> ReconstructionMeasures:
        """With LPIPS where its weights are given, else with the distance of a backbone teacher's features."""
        config, teacher = self.config, self.teacher
        distance: nn.Module | None = None
        if config.lpips_vgg_weights:
            distance = lpips_distance("evaluate.lpips_vgg_weights", config.lpips_vgg_weights)
        elif isinstance(teacher, BackboneTeacher):
            distance = BackbonePerceptualDistance(teacher)
        space = feature_space("evaluate", config.inception_weights, teacher, self.device)
        zero_shot = ZeroShot.of(teacher, self.concepts.names, config.class_templates)
        return ReconstructionMeasures(perceptual_of(distance), space, zero_shot, self.device, config.precision)

    @cached_property
    def training_images(self) -> ImageSource:
        """The training images, from which prototypes are computed."""
        return ImageSource(self.job.store, self.job.inputs["download"], self.transform, split=TRAIN)

    @cached_property
    def pixel_prototypes(self) -> dict[str, Tensor]:
        """Mean of the reduced training images of each concept, `[P]`."""
        return self._prototypes(_small)

    @cached_property
    def embedding_prototypes(self) -> dict[str, Tensor]:
        """Mean teacher embedding of the training images of each concept, a unit vector `[E]`."""
        return {name: F.normalize(mean, dim=0) for name, mean in self._prototypes(self._embed).items()}

    def _prototypes(self, describe: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Average `describe` (`[B, 3, H, W]` in [-1, 1] to `[B, F]`) over the training images of each concept."""
        source = self.training_images
        names = [fill_row(self.config.concept, source.row(row)) for row in range(len(source))]
        batches = in_batches(len(source), _BATCH, "prototypes of the training images")
        described = torch.cat([describe(normalise(source.pixels(batch))).cpu() for batch in batches])
        members: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            members.setdefault(name, []).append(row)
        return {name: described[positions].mean(0) for name, positions in members.items()}

    @torch.no_grad()
    def reconstruct(self, rows: list[int]) -> list[dict[str, Any]]:
        """Decode the codes of held-out images; returns distances to the images, features of both, and class ranks."""
        found = []
        for batch in _batches(rows):
            pixels = self.images.pixels(batch)
            drawn, columns = self.measures.measure(self.tokenizer, batch, pixels, self.rows.codes[batch].long())
            originals, reconstructions = to_pil(pixels), to_pil(drawn)
            for position, row in enumerate(batch):
                found.append(
                    {
                        "key": self.rows.keys[row],
                        "caption": self.rows.columns["text"][row],
                        "original": encode_png(originals[position]),
                        "reconstruction": encode_png(reconstructions[position]),
                        **{name: _cell(value[position]) for name, value in columns.items()},
                    }
                )
        return found

    @torch.no_grad()
    def understand(self, rows: list[int]) -> list[dict[str, Any]]:
        """Ask multiple-choice questions: the answer with the highest mean log-likelihood per token is the model's pick.

        Rows without a category have none with distractors of the same one.
        """
        found = []
        with_category = [row for row in rows if self.concepts.categories[row]]
        for distractors, some in {RANDOM: rows, SAME_CATEGORY: with_category}.items():
            for batch in _batches(some, max(1, _BATCH // self.config.num_choices)):
                asked = [self.concepts.choices(row, self.config.num_choices, distractors) for row in batch]
                choices = [names for names, _ in asked]
                originals = self.images.pixels(batch)
                scores = self._answer_scores(batch, choices)
                recognised = self.recognise(normalise(originals), choices)
                nearest = self._nearest_pixels(originals, choices)
                pictures = to_pil(originals)
                for position, (row, (names, answer)) in enumerate(zip(batch, asked, strict=True)):
                    picked, pixels_say = int(scores[position].argmax()), nearest[position]
                    found.append(
                        {
                            "key": self.rows.keys[row],
                            "image": encode_png(pictures[position]),
                            "question": fill_row(self.config.question, self.rows.row(row)),
                            "choices": names,
                            "answer": answer,
                            "picked": picked,
                            "correct": picked == answer,
                            "distractors": distractors,
                            "log_likelihoods": scores[position].tolist(),
                            "pixel_baseline_correct": None if pixels_say is None else pixels_say == answer,
                            "teacher_correct": recognised[position] == answer,
                            TEXT_CUT: self._is_cut(row, names),
                        }
                    )
        return found

    @torch.no_grad()
    def generate(self, rows: list[int]) -> list[dict[str, Any]]:
        """Generate images for held-out prompts, and let the teacher choose which of some concepts each shows."""
        vlm, builder = self.vlm
        prompts = [
            fill_row(self.config.prompt, self.rows.row(row))
            for row in rows
            for _ in range(self.config.images_per_prompt)
        ]
        generator = torch.Generator().manual_seed(mix_seed(self.job.seed, "drawing", rows[0]))
        with autocast(self.device, self.config.precision):
            codes = draw_codes(
                vlm,
                [builder.drawing_prompt(prompt) for prompt in prompts],
                builder.drawing_prompt(""),
                self.config.sampling,
                generator,
            )
            drawn = torch.cat([to_pixels(self.tokenizer.decode(part)).cpu() for part in codes.split(_BATCH)])
        found = []
        owners = [row for row in rows for _ in range(self.config.images_per_prompt)]
        asked = [self.concepts.choices(row, self.config.recognition_choices, RANDOM) for row in owners]
        choices = [names for names, _ in asked]
        references = self.images.pixels(owners)
        picked = self.recognise(normalise(drawn), choices)
        picked_real = self.recognise(normalise(references), choices)
        pictures, originals = to_pil(drawn), to_pil(references)
        for position, (names, answer) in enumerate(asked):
            found.append(
                {
                    "key": self.rows.keys[owners[position]],
                    "prompt": prompts[position],
                    "concept": names[answer],
                    "image": encode_png(pictures[position]),
                    "reference": encode_png(originals[position]),
                    "choices": names,
                    "picked": picked[position],
                    "correct": picked[position] == answer,
                    "real_correct": picked_real[position] == answer,
                    TEXT_CUT: not builder.fits(prompts[position]),
                }
            )
        return found

    def recognise(self, images: Tensor, choices: Listing[Listing[str]]) -> list[int]:
        """Return the position of the concept that the teacher recognises in each image.

        It compares image and text embeddings; a teacher without a text tower compares with mean training images
        instead.

        Args:
            images: `[B, 3, H, W]` in [-1, 1].
            choices: concepts to choose from, B lists.
        """
        seen = self._embed(images)  # [B, E]
        picks = []
        for vector, names in zip(seen, choices, strict=True):
            if self.teacher.has_text:
                known = self.teacher.embed_texts(list(names)).float()
            else:
                if unknown := [name for name in names if name not in self.embedding_prototypes]:
                    raise ValueError(
                        f"no training image shows {unknown[0]!r}, so a teacher without text cannot recognise it; "
                        "choose a teacher with a text tower, or an evaluate.concept that training images share"
                    )
                known = torch.stack([self.embedding_prototypes[name] for name in names]).to(seen.device)
            picks.append(int((known @ vector).argmax()))
        return picks

    def _embed(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.teacher.embed_images(images.to(self.device)).float()

    def _nearest_pixels(self, pixels: Tensor, choices: Listing[Listing[str]]) -> list[int | None]:
        """Return the position of the concept whose mean training image is nearest to each uint8 image `[B, 3, H, W]`.

        It is None if one of the concepts has no training image, as when captions are the concepts.
        """
        nearest: list[int | None] = []
        for image, names in zip(_small(normalise(pixels)), choices, strict=True):
            if any(name not in self.pixel_prototypes for name in names):
                nearest.append(None)
                continue
            known = torch.stack([self.pixel_prototypes[name] for name in names])
            nearest.append(int((known - image).square().sum(1).argmin()))
        return nearest

    def _answer_scores(self, rows: list[int], choices: list[list[str]]) -> Tensor:
        """Return the mean log-likelihood of each answer, `[len(rows), choices]`."""
        vlm, builder = self.vlm
        sequences = [
            builder.understanding(self.rows.codes[row], question, answer)
            for row, names in zip(rows, choices, strict=True)
            for question, answer in self._answers(row, names)
        ]
        batch = builder.batch(sequences).to(self.device)
        with autocast(self.device, self.config.precision):
            scores = mean_log_likelihood(vlm, *batch)
        return scores.cpu().view(len(rows), -1)

    def _answers(self, row: int, choices: list[str]) -> list[tuple[str, str]]:
        """Return the question of a row, and its choices as answers."""
        question = fill_row(self.config.question, self.rows.row(row))
        return [(question, fill(self.config.answer, {"choice": choice})) for choice in choices]

    def _is_cut(self, row: int, choices: list[str]) -> bool:
        """Return whether the question or an answer is truncated for the model."""
        return not all(self.vlm[1].fits(*texts) for texts in self._answers(row, choices))


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _cell(value: Tensor) -> Any:
    """Convert a number, or a row of features, to a value of a table."""
    return value.numpy() if value.ndim else value.item()


def _small(images: Tensor) -> Tensor:
    """Reduce images `[B, 3, H, W]` to `[B, 3 * 16 * 16]` pixels for the raw-pixel baseline."""
    return F.adaptive_avg_pool2d(images, 16).flatten(1)


def _batches(rows: list[int], size: int = _BATCH) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
