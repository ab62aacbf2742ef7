"""Token sequences and their loss masks, for both training stages, for asking and for drawing.

Layouts (MUSE-VL, section 3.2); parts with loss are in brackets:
pretraining, image first  [soi codes eoi text eos]; text first  [text soi codes eoi eos];
understanding  user soi codes eoi question assistant [answer eos];
generation  user prompt assistant [soi codes eoi] eos.
Shape legend: B batch, T tokens, V visual positions, N books, D depth, h w code grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.vlm import IGNORED, ImageCodes
from models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Sequence(NamedTuple):
    """One training or scoring sequence."""

    token_ids: list[int]
    labels: list[int]
    """Same length; `IGNORED` where there is no loss."""
    codes: ImageCodes | None = None
    """Of the visual positions, where they have several codes and so no token of their own."""


class Batch(NamedTuple):
    """Sequences padded on the right; the arguments of `UnifiedVlm.losses`."""

    token_ids: Tensor
    """`[B, T]` int64."""
    labels: Tensor
    """`[B, T]` int64."""
    attention_mask: Tensor
    """`[B, T]` int64."""
    codes: ImageCodes | None
    """Of all visual positions, row by row."""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        codes = ImageCodes(*(part.to(device) for part in self.codes)) if self.codes is not None else None
        return Batch(self.token_ids.to(device), self.labels.to(device), self.attention_mask.to(device), codes)


class SequenceBuilder:
    """Writes sequences with one tokenizer and vocabulary; remembers the ids of texts it has seen."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self._texts: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        """Token ids of a text, without markers."""
        if text not in self._texts:
            self._texts[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._texts[text]

    def image(self, codes: Tensor) -> list[int]:
        """`soi codes eoi` of an image's codes `[N, D, h, w]`, row by row."""
        vocabulary = self.vocabulary
        visual = [vocabulary.first_code] * vocabulary.num_positions
        if vocabulary.one_code:
            visual = vocabulary.code_ids(codes.long().flatten()).tolist()
        return [vocabulary.soi, *visual, vocabulary.eoi]

    def image_codes(self, shown: Tensor, wanted: Tensor) -> ImageCodes | None:
        """Codes `[N, D, h, w]` that are read and that are asked for, where no token holds them."""
        if self.vocabulary.one_code:
            return None
        return ImageCodes(*(codes.long().flatten(2).permute(2, 0, 1) for codes in (shown, wanted)))

    def pretraining(self, text: str, codes: Tensor, *, image_first: bool) -> Sequence:
        """An image-text pair in one of the two orders, loss on everything. An empty text is a dropped one."""
        image, words = self.image(codes), self.text(text)
        token_ids = [*image, *words] if image_first else [*words, *image]
        token_ids.append(self.vocabulary.eos)
        return Sequence(token_ids, list(token_ids), self.image_codes(codes, codes))

    def question(self, codes: Tensor, question: str) -> Sequence:
        """The prompt of understanding, up to and with `assistant`, without loss; codes are `[N, D, h, w]`."""
        prompt = [self.vocabulary.user, *self.image(codes), *self.text(question), self.vocabulary.assistant]
        return Sequence(prompt, [IGNORED] * len(prompt), self.image_codes(codes, codes))

    def understanding(self, codes: Tensor, question: str, answer: str) -> Sequence:
        """A question about an image, loss on the answer and the end."""
        prompt, reply = self.question(codes, question), [*self.text(answer), self.vocabulary.eos]
        return Sequence(prompt.token_ids + reply, prompt.labels + reply, prompt.codes)

    def drawing_prompt(self, prompt: str) -> list[int]:
        """The prompt of generation, up to and with `soi`; an empty prompt is the unconditional one."""
        return [self.vocabulary.user, *self.text(prompt), self.vocabulary.assistant, self.vocabulary.soi]

    def generation(self, prompt: str, codes: Tensor, seen: Tensor | None = None) -> Sequence:
        """An image for a prompt, loss on the image.

        Args:
            prompt: text; empty is the unconditional one.
            codes: `[N, D, h, w]`, what is to be drawn.
            seen: `[N, D, h, w]`, what stands in the sequence instead; None is `codes`.
        """
        asked, shown = self.drawing_prompt(prompt)[:-1], codes if seen is None else seen
        labels = [IGNORED] * len(asked) + self.image(codes) + [IGNORED]
        return Sequence([*asked, *self.image(shown), self.vocabulary.eos], labels, self.image_codes(shown, codes))

    def batch(self, sequences: list[Sequence]) -> Batch:
        """Pad sequences to the longest."""
        longest = max(len(sequence.token_ids) for sequence in sequences)
        token_ids = torch.full((len(sequences), longest), self.vocabulary.pad)
        labels = torch.full((len(sequences), longest), IGNORED)
        mask = torch.zeros(len(sequences), longest, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            length = len(sequence.token_ids)
            token_ids[row, :length] = torch.tensor(sequence.token_ids)
            labels[row, :length] = torch.tensor(sequence.labels)
            mask[row, :length] = 1
        held = [sequence.codes for sequence in sequences if sequence.codes is not None]
        codes = ImageCodes(*(torch.cat(parts) for parts in zip(*held, strict=True))) if held else None
        return Batch(token_ids, labels, mask, codes)
