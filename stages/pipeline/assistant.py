"""Inference with the model of a recipe: answers to questions about images, and images for prompts."""

from __future__ import annotations

import torch
from PIL import Image

from models.language.decoding import answer_tokens, draw_codes
from models.language.sampling import SamplingConfig
from models.tokenizers.image_tokenizer import ImageTokenizer
from models.transforms import load_image, normalise, to_pil, to_pixels, to_tensor
from stages.artifacts.models import load_tokenizer
from stages.language.training import load_vlm
from stages.pipeline.execution import require_artifact
from stages.pipeline.recipe import Recipe
from stages.runtime.devices import autocast, resolve_device, with_precision
from stages.runtime.progress import progress
from storage.store import Store

_LONGEST_ANSWER = 64


class Assistant:
    """The fine-tuned model of a recipe and its tokenizer."""

    def __init__(self, recipe: Recipe, store: Store) -> None:
        """
        Raises:
            MissingInput: the recipe has not been run on this store.
        """
        sft = require_artifact("sft", recipe, store, needed_by="ask and generate")
        made_by = {"train_tokenizer": store.load(sft.metadata["tokenizer"])}
        self.config = with_precision(recipe.evaluate, made_by)
        self.device = resolve_device(self.config.device)
        self.vlm, self.builder = load_vlm(store, sft)
        self.vlm.to(self.device)
        self.tokenizer: ImageTokenizer = load_tokenizer(store, sft.metadata["tokenizer"]).to(self.device)
        if self.tokenizer.teacher is not None:
            self.tokenizer.teacher.to(self.device)

    @torch.no_grad()
    def ask(self, image: bytes, question: str) -> str:
        """Answer a question about an encoded image of any size.

        Raises:
            UnusableImage: the image cannot be decoded.
            ValueError: the question is longer than the model reads.
        """
        self._check_length("question", question)
        shaped = load_image(image, self.tokenizer.config.transform)
        with autocast(self.device, self.config.precision):
            codes = self.tokenizer.encode(normalise(to_tensor([shaped]).to(self.device)))[0].cpu()
            prompt = self.builder.question(codes, question)
            shown = prompt.codes.shown if prompt.codes is not None else None
            longest = min(_LONGEST_ANSWER, self.builder.max_tokens - len(prompt.token_ids))
            controls = self.builder.plain.control_ids
            tokens = answer_tokens(self.vlm, prompt.token_ids, shown, max_tokens=longest, control_ids=controls)
        return self.builder.plain.text(tokens).strip()

    @torch.no_grad()
    def draw(
        self,
        prompt: str,
        *,
        num_images: int = 1,
        guidance: float | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> list[Image.Image]:
        """Generate images for a prompt; settings that are not given are the recipe's.

        Raises:
            ValueError: the prompt is longer than the model reads, or a setting is out of range.
        """
        self._check_length("prompt", prompt)
        changes = {"guidance": guidance, "temperature": temperature}
        sampling = SamplingConfig.model_validate(
            self.config.sampling.model_dump() | {name: value for name, value in changes.items() if value is not None}
        )
        wanted, unconditional = self.builder.drawing_prompt(prompt), self.builder.drawing_prompt("")
        generator = torch.Generator().manual_seed(seed)
        shown = progress(self.vlm.vocabulary.num_positions, "drawing, positions", delay=2)
        with shown as bar, autocast(self.device, self.config.precision):
            codes = draw_codes(
                self.vlm, [wanted] * num_images, unconditional, sampling, generator, on_position=bar.update
            )
            return to_pil(to_pixels(self.tokenizer.decode(codes)).cpu())

    def _check_length(self, what: str, text: str) -> None:
        """Raise ValueError for text that training would truncate, since a user can shorten it."""
        if not self.builder.fits(text):
            raise ValueError(
                f"the {what} has more than the {self.builder.room} tokens that the model reads beside an image "
                f"({len(text)} characters); shorten it, or train with a larger sft.max_tokens"
            )
