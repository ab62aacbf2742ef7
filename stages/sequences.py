"""Token sequences and their loss masks, for both training stages, for asking and for drawing.

Layouts (MUSE-VL, section 3.2); parts with loss are in brackets:
pretraining, image first  [soi codes eoi text eos]; text first  [text soi codes eoi eos];
understanding  user soi codes eoi question assistant [answer eos];
generation  user prompt assistant [soi codes eoi] eos.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.vlm import IGNORED
from models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Sequence(NamedTuple):
    """One training or scoring sequence."""

    token_ids: list[int]
    labels: list[int]
    """Same length; `IGNORED` where there is no loss."""


class Batch(NamedTuple):
    """Sequences padded on the right, each `[B, T]` int64."""

    token_ids: Tensor
    labels: Tensor
    attention_mask: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(*(part.to(device) for part in self))


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
        """`soi codes eoi` of an image's codes `[h, w]`, row by row."""
        return [self.vocabulary.soi, *self.vocabulary.code_ids(codes.long().flatten()).tolist(), self.vocabulary.eoi]

    def pretraining(self, text: str, codes: Tensor, *, image_first: bool) -> Sequence:
        """An image-text pair in one of the two orders, loss on everything. An empty text is a dropped one."""
        image, words = self.image(codes), self.text(text)
        token_ids = [*image, *words] if image_first else [*words, *image]
        token_ids.append(self.vocabulary.eos)
        return Sequence(token_ids, list(token_ids))

    def question(self, codes: Tensor, question: str) -> list[int]:
        """The prompt of understanding, up to and with `assistant`."""
        return [self.vocabulary.user, *self.image(codes), *self.text(question), self.vocabulary.assistant]

    def understanding(self, codes: Tensor, question: str, answer: str) -> Sequence:
        """A question about an image, loss on the answer and the end."""
        prompt, reply = self.question(codes, question), [*self.text(answer), self.vocabulary.eos]
        return Sequence(prompt + reply, [IGNORED] * len(prompt) + reply)

    def drawing_prompt(self, prompt: str) -> list[int]:
        """The prompt of generation, up to and with `soi`; an empty prompt is the unconditional one."""
        return [self.vocabulary.user, *self.text(prompt), self.vocabulary.assistant, self.vocabulary.soi]

    def generation(self, prompt: str, codes: Tensor, seen: Tensor | None = None) -> Sequence:
        """An image for a prompt, loss on the image.

        Args:
            prompt: text; empty is the unconditional one.
            codes: `[h, w]`, what is to be drawn.
            seen: `[h, w]`, what stands in the sequence instead; None is `codes`.
        """
        asked = self.drawing_prompt(prompt)[:-1]
        labels = [IGNORED] * len(asked) + self.image(codes) + [IGNORED]
        return Sequence([*asked, *self.image(codes if seen is None else seen), self.vocabulary.eos], labels)

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
        return Batch(token_ids, labels, mask)
