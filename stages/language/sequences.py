"""Token sequences and their loss masks, for both training stages and for inference.

Layouts (MUSE-VL, section 3.2); the parts with a loss are in brackets:
pretraining, image first  [soi codes eoi text eos]; text first  [text soi codes eoi eos];
understanding  user soi codes eoi question assistant [answer eos];
generation  user prompt assistant [soi codes eoi] eos.
Text never becomes control tokens, and a sequence is never longer than `max_tokens`: text that does not fit next to the
image is truncated.
Shape legend: B batch, T tokens, V visual positions, N books, D depth, h w code grid.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.language.vlm import IGNORED, ImageCodes
from models.language.vocabulary import PlainText, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MARKERS = 5
"""Largest number of markers of a sequence with one image: user, soi, eoi, assistant, eos."""
_REMEMBERED = 100_000
"""Number of texts whose ids are cached, since captions of small data, and questions of any data, occur repeatedly."""


class Sequence(NamedTuple):
    """A sequence for training or scoring."""

    token_ids: list[int]
    labels: list[int]
    """Labels, as many as `token_ids`; `IGNORED` at positions without a loss."""
    codes: ImageCodes | None = None
    """Codes at the visual positions, if a position has several codes and thus no token of its own."""


class Batch(NamedTuple):
    """Sequences padded on the right; the arguments of `UnifiedVlm.losses`."""

    token_ids: Tensor
    """`[B, T]` int64 token ids."""
    labels: Tensor
    """`[B, T]` int64, `IGNORED` at positions without a loss."""
    attention_mask: Tensor
    """`[B, T]` int64, 0 at padding."""
    codes: ImageCodes | None
    """Codes at all visual positions, row by row."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        codes = ImageCodes(*(part.to(device) for part in self.codes)) if self.codes is not None else None
        return Batch(self.token_ids.to(device), self.labels.to(device), self.attention_mask.to(device), codes)


class _Fitted(NamedTuple):
    """Token ids of a text after truncation, and whether the text is complete."""

    ids: list[int]
    is_whole: bool


class SequenceBuilder:
    """Builds sequences with one tokenizer and vocabulary; caches the ids of texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary, max_tokens: int) -> None:
        """
        Args:
            tokenizer: text tokenizer over the vocabulary.
            vocabulary: the ids of markers and codes.
            max_tokens: length of the longest sequence.

        Raises:
            ValueError: an image's codes and the markers leave no space for text.
        """
        self.tokenizer, self.vocabulary, self.max_tokens = tokenizer, vocabulary, max_tokens
        self.plain = PlainText(tokenizer, vocabulary)
        self.room = max_tokens - vocabulary.num_positions - _MARKERS
        """Largest number of text tokens in a sequence with an image."""
        if self.room < 1:
            raise ValueError(
                f"max_tokens={max_tokens} leaves no space for text next to an image of {vocabulary.num_positions} "
                f"codes and {_MARKERS} markers; allow longer sequences (max_tokens, and llm.max_positions of a small "
                "model), or choose a tokenizer with fewer codes"
            )
        self._ids = lru_cache(maxsize=_REMEMBERED)(self._first_ids)

    def text(self, text: str) -> list[int]:
        """Return the token ids of a text without markers, truncated to `max_tokens`."""
        return list(self._ids(text))

    def fits(self, *texts: str) -> bool:
        """Return whether texts fit completely into one sequence with an image."""
        # a text has at most as many tokens as bytes; the factor 2 allows for what a normaliser adds
        if 2 * sum(len(unicodedata.normalize("NFKD", text).encode()) for text in texts) <= self.room:
            return True
        return sum(len(self._ids(text)) for text in texts) <= self.room

    def _first_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.plain.ids(text)[: self.max_tokens])  # truncated before it is cached

    def _fitted(self, *texts: str) -> list[_Fitted]:
        """Truncate texts that share a sequence with an image: shorter texts are kept before longer ones."""
        ids, space_left = [self.text(text) for text in texts], self.room
        kept = [0] * len(ids)
        for place, index in enumerate(sorted(range(len(ids)), key=lambda index: len(ids[index]))):
            kept[index] = min(len(ids[index]), space_left // (len(ids) - place))
            space_left -= kept[index]
        return [_Fitted(own[:count], len(own) == count) for own, count in zip(ids, kept, strict=True)]

    def _end(self, text: _Fitted) -> int:
        """Return the label of the end-of-sequence token after a text; there is no loss on it after a truncated text."""
        return self.vocabulary.eos if text.is_whole else IGNORED

    def image(self, codes: Tensor) -> list[int]:
        """Return the tokens `soi codes eoi` of an image's codes `[N, D, h, w]` in row-major order."""
        vocabulary = self.vocabulary
        visual = [vocabulary.first_code] * vocabulary.num_positions
        if vocabulary.one_code:
            visual = vocabulary.code_ids(codes.long().flatten()).tolist()
        return [vocabulary.soi, *visual, vocabulary.eoi]

    def image_codes(self, shown: Tensor, wanted: Tensor) -> ImageCodes | None:
        """Return the input and target codes `[N, D, h, w]` by position; None if each code has its own token."""
        if self.vocabulary.one_code:
            return None
        return ImageCodes(*(codes.long().flatten(2).permute(2, 0, 1) for codes in (shown, wanted)))

    def pretraining(self, text: str, codes: Tensor, *, image_first: bool) -> Sequence:
        """Build an image-text pair in one of the two orders, with loss on all tokens; a dropped text is empty."""
        image, (words,) = self.image(codes), self._fitted(text)
        token_ids = [*image, *words.ids] if image_first else [*words.ids, *image]
        labels = [*token_ids, self._end(words) if image_first else self.vocabulary.eos]
        return Sequence([*token_ids, self.vocabulary.eos], labels, self.image_codes(codes, codes))

    def question(self, codes: Tensor, question: str) -> Sequence:
        """Build the prompt of understanding up to and including `assistant`, without loss; codes are `[N, D, h, w]`."""
        return self._question(codes, self._fitted(question)[0])

    def _question(self, codes: Tensor, question: _Fitted) -> Sequence:
        prompt = [self.vocabulary.user, *self.image(codes), *question.ids, self.vocabulary.assistant]
        return Sequence(prompt, [IGNORED] * len(prompt), self.image_codes(codes, codes))

    def understanding(self, codes: Tensor, question: str, answer: str) -> Sequence:
        """Build a question about an image, with loss on the answer and the end-of-sequence token."""
        asked, answered = self._fitted(question, answer)
        prompt = self._question(codes, asked)
        token_ids = [*prompt.token_ids, *answered.ids, self.vocabulary.eos]
        return Sequence(token_ids, [*prompt.labels, *answered.ids, self._end(answered)], prompt.codes)

    def drawing_prompt(self, prompt: str) -> list[int]:
        """Build the prompt of generation up to and including `soi`; an empty prompt is the unconditional one."""
        vocabulary, (words,) = self.vocabulary, self._fitted(prompt)
        return [vocabulary.user, *words.ids, vocabulary.assistant, vocabulary.soi]

    def generation(self, prompt: str, codes: Tensor, seen: Tensor | None = None) -> Sequence:
        """Build an image for a prompt, with loss on the image.

        Args:
            prompt: text; an empty text is the unconditional prompt.
            codes: `[N, D, h, w]` target codes.
            seen: `[N, D, h, w]` input codes, if they differ from the targets; default `codes`.
        """
        asked, shown = self.drawing_prompt(prompt)[:-1], codes if seen is None else seen
        labels = [IGNORED] * len(asked) + self.image(codes) + [IGNORED]
        return Sequence([*asked, *self.image(shown), self.vocabulary.eos], labels, self.image_codes(shown, codes))

    def batch(self, sequences: list[Sequence]) -> Batch:
        """Pad sequences on the right to the length of the longest one."""
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
