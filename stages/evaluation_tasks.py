"""The three measurements on held-out pairs: reconstruction, understanding, generation; each one maps over rows.

Shape legend: B batch, N books, D depth, h w code grid.
"""

from __future__ import annotations

import io
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.losses import BackbonePerceptualDistance
from models.metrics import psnr, ssim
from models.sampling import SamplingConfig, draw_codes
from models.teachers import BackboneTeacher, Teacher
from models.tokenizers import ImageTokenizer
from models.transforms import normalise, to_pil, to_pixels
from models.vlm import mean_log_likelihood
from stages.evaluation_results import store_rows
from stages.image_data import ImageSource
from stages.loading import load_teacher, load_tokenizer
from stages.sequences import SequenceBuilder
from stages.training import autocast, mix_seed, resolve_device
from stages.vlm_training import CodedRows, fill, load_rows, load_vlm
from storage.manifest import Manifest
from storage.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH = 32
RANDOM, SAME_CATEGORY = "random", "same_category"


class TaskConfig(Protocol):
    """What the tasks read of the stage's config."""

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
    threads_per_worker: int


@dataclass(frozen=True)
class Concepts:
    """The concept and category of each held-out row, and how distractors are drawn from them."""

    names: list[str]
    categories: list[str]
    seed: int

    def choices(self, row: int, count: int, distractors: str) -> tuple[list[str], int]:
        """`count` different concepts, the row's own among them, in random order, and its position.

        Fixed by (seed, row, kind of distractors) alone, so every model answers the same questions.

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
    """What travels to a worker; calling it there opens the store and loads what the first item needs."""

    store: Store
    action_key: str
    config: Any
    seed: int
    inputs: dict[str, Manifest]

    def __call__(self) -> EvaluationWorker:
        return EvaluationWorker(self)


class EvaluationWorker:
    """Holds the models; each call measures a range of held-out rows and returns what it found through a receipt."""

    def __init__(self, job: TaskFactory) -> None:
        self.job = job
        self.config: TaskConfig = job.config
        self.device = resolve_device(self.config.device)
        torch.set_num_threads(self.config.threads_per_worker)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        rows = list(range(item["start"], item["start"] + item["count"]))
        found = {
            "reconstruction": self.reconstruct,
            "understanding": self.understand,
            "generation": self.generate,
        }[item["task"]](rows)
        store_rows(self.job.store, self.job.action_key, item["shard"], item["task"], found)
        return {"shard": item["shard"]}

    @cached_property
    def teacher(self) -> Teacher:
        """The frozen teacher, also of a tokenizer without a semantic branch."""
        return load_teacher(self.job.store, self.job.inputs["prepare_teacher"]).to(self.device)

    @cached_property
    def tokenizer(self) -> ImageTokenizer:
        """The trained tokenizer."""
        tokenizer = load_tokenizer(self.job.store, self.job.inputs["train_tokenizer"].digest).to(self.device)
        if tokenizer.teacher is not None:
            tokenizer.teacher.to(self.device)
        return tokenizer

    @cached_property
    def vlm(self) -> tuple[PreTrainedModel, SequenceBuilder]:
        """The fine-tuned model and what writes its sequences."""
        model, builder = load_vlm(self.job.store, self.job.inputs["sft"])
        return model.to(self.device), builder

    @cached_property
    def rows(self) -> CodedRows:
        """The held-out rows of the code table, in its order."""
        return load_rows(self.job.store, self.job.inputs["tokenize"], split="test", views=False)

    @cached_property
    def images(self) -> ImageSource:
        """The held-out images; row for row those of `rows`."""
        transform = self.tokenizer.config.transform
        source = ImageSource(self.job.store, self.job.inputs["download"], transform, split="test")
        if source.keys != self.rows.keys:
            raise ValueError(
                "the code table and the download differ in their held-out rows; tokenize this download again"
            )
        return source

    @cached_property
    def concepts(self) -> Concepts:
        """Names and categories of the held-out rows."""
        names = [fill(self.config.concept, self.rows.row(index)) for index in range(len(self.rows))]
        categories = self.rows.columns.get(self.config.category_column) or [""] * len(names)
        return Concepts(names, categories, self.job.seed)

    @cached_property
    def prototypes(self) -> tuple[dict[str, int], Tensor, Tensor]:
        """Mean training image of each concept: index by name, as pixels `[C, P]` and as teacher embeddings `[C, E]`."""
        transform = self.tokenizer.config.transform
        source = ImageSource(self.job.store, self.job.inputs["download"], transform, split="train")
        fields = [{name: values[i] for name, values in source.columns.items()} for i in range(len(source))]
        names = [fill(self.config.concept, row | {"text": source.captions[i]}) for i, row in enumerate(fields)]
        index = {name: position for position, name in enumerate(sorted(set(names)))}
        owner = torch.tensor([index[name] for name in names])
        pixels, embedded = [], []
        for start in range(0, len(source), _BATCH):
            images = normalise(source.pixels(list(range(start, min(start + _BATCH, len(source))))))
            pixels.append(_small(images))
            embedded.append(self._embed(images).cpu())
        return index, _means(torch.cat(pixels), owner, len(index)), _means(torch.cat(embedded), owner, len(index))

    @torch.no_grad()
    def reconstruct(self, rows: list[int]) -> list[dict[str, Any]]:
        """Encode and decode each held-out image; PSNR, SSIM in both ranges, perceptual distance, semantic cosine."""
        found = []
        for batch in _batches(rows):
            pixels = self.images.pixels(batch)
            codes = self.rows.codes[batch].long().to(self.device)
            with autocast(self.device, self.config.precision):
                drawn = to_pixels(self.tokenizer.decode(codes)).cpu()
                cosines = self._semantic_cosines(pixels, codes)
            measured = {
                "psnr": psnr(drawn, pixels),
                "ssim": ssim(drawn, pixels),
                "ssim_range2": ssim(drawn, pixels, data_range=2.0),
                "perceptual": self._perceptual(drawn, pixels),
                "semantic_cosine": cosines,
            }
            originals, reconstructions = to_pil(pixels), to_pil(drawn)
            for position, row in enumerate(batch):
                values = {name: float(value[position]) for name, value in measured.items() if value is not None}
                found.append(
                    {
                        "key": self.rows.keys[row],
                        "caption": self.rows.columns["text"][row],
                        "original": encode_png(originals[position]),
                        "reconstruction": encode_png(reconstructions[position]),
                        **values,
                    }
                )
        return found

    @torch.no_grad()
    def understand(self, rows: list[int]) -> list[dict[str, Any]]:
        """Four-way questions: the answer with the highest mean log-likelihood a token is the model's pick."""
        found = []
        for distractors in (RANDOM, SAME_CATEGORY):
            for row in rows:
                choices, answer = self.concepts.choices(row, self.config.num_choices, distractors)
                scores = self._answer_scores(row, choices)
                picked = int(scores.argmax())
                original = self.images.pixels([row])
                found.append(
                    {
                        "key": self.rows.keys[row],
                        "image": encode_png(to_pil(original)[0]),
                        "question": self.config.question,
                        "choices": choices,
                        "answer": answer,
                        "picked": picked,
                        "correct": picked == answer,
                        "distractors": distractors,
                        "log_likelihoods": scores.tolist(),
                        "pixel_baseline_correct": self._nearest_pixels(original, choices) == answer,
                        "teacher_correct": self.recognise(normalise(original), [choices])[0] == answer,
                    }
                )
        return found

    @torch.no_grad()
    def generate(self, rows: list[int]) -> list[dict[str, Any]]:
        """Draw an image for each held-out prompt and ask the frozen teacher which of some concepts it shows."""
        model, builder = self.vlm
        prompts = [
            fill(self.config.prompt, self.rows.row(row)) for row in rows for _ in range(self.config.images_per_prompt)
        ]
        generator = torch.Generator().manual_seed(mix_seed(self.job.seed, "drawing", rows[0]))
        with autocast(self.device, self.config.precision):
            codes = draw_codes(
                model,
                builder.vocabulary,
                [builder.drawing_prompt(prompt) for prompt in prompts],
                builder.drawing_prompt(""),
                self.config.sampling,
                generator,
            )
            drawn = torch.cat(
                [to_pixels(self.tokenizer.decode(part[:, None, None])).cpu() for part in codes.split(_BATCH)]
            )
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
                }
            )
        return found

    def recognise(self, images: Tensor, choices: Listing[Listing[str]]) -> list[int]:
        """Position of the concept that the teacher sees in each image.

        By image-text similarity; a teacher without a text tower compares with mean training images instead.

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
                index, _, embedded = self.prototypes
                known = F.normalize(torch.stack([embedded[index[name]] for name in names]), dim=1).to(seen.device)
            picks.append(int((known @ vector).argmax()))
        return picks

    def _embed(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.teacher.embed_images(images.to(self.device)).float()

    def _nearest_pixels(self, pixels: Tensor, choices: list[str]) -> int:
        index, means, _ = self.prototypes
        known = torch.stack([means[index[name]] for name in choices])
        return int((known - _small(normalise(pixels))).square().sum(1).argmin())

    def _answer_scores(self, row: int, choices: list[str]) -> Tensor:
        """Mean log-likelihood of each answer, `[len(choices)]`."""
        model, builder = self.vlm
        fields = self.rows.row(row)
        codes = self.rows.codes[row, 0, 0]
        question = fill(self.config.question, fields)
        answers = [self.config.answer.format(choice=choice) for choice in choices]
        batch = builder.batch([builder.understanding(codes, question, answer) for answer in answers]).to(self.device)
        with autocast(self.device, self.config.precision):
            return mean_log_likelihood(model, batch.token_ids, batch.labels, batch.attention_mask).cpu()

    def _semantic_cosines(self, pixels: Tensor, codes: Tensor) -> Tensor | None:
        if self.tokenizer.teacher is None:
            return None
        target = self.tokenizer.teacher.features(normalise(pixels).to(self.device), self.tokenizer.grid)
        predicted = self.tokenizer.semantic_features(codes)
        return F.cosine_similarity(predicted.float(), target.float(), dim=-1).mean((1, 2))

    def _perceptual(self, drawn: Tensor, pixels: Tensor) -> Tensor | None:
        if not isinstance(self.teacher, BackboneTeacher):
            return None
        distance = BackbonePerceptualDistance(self.teacher)
        return distance(normalise(drawn).to(self.device), normalise(pixels).to(self.device)).cpu()


def encode_png(image: Image.Image) -> bytes:
    """An image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _small(images: Tensor) -> Tensor:
    """`[B, 3, H, W]` -> `[B, 3 * 16 * 16]`: pixels for the raw-pixel baseline."""
    return F.adaptive_avg_pool2d(images, 16).flatten(1)


def _means(values: Tensor, owner: Tensor, count: int) -> Tensor:
    sums = torch.zeros(count, values.shape[1]).index_add_(0, owner, values)
    return sums / torch.bincount(owner, minlength=count)[:, None]


def _batches(rows: list[int]) -> list[list[int]]:
    return [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
