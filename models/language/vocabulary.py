"""One vocabulary for text and images: text tokens, turn and image markers, then one token per visual code.

If an image has several codes per position, no vocabulary can hold their combinations. Then one token stands for every
visual position, and the codes are passed alongside the token ids.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, EOS = "<|pad|>", "<|eos|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
SOI, EOI = "<|soi|>", "<|eoi|>"
CODES = "<|codes|>"
"""The token of every visual position, if a position has several codes."""
_MARKUP = re.compile(r"\s*[<\[\uff1c].*[>\]\uff1e]\s*", re.DOTALL)
"""Pattern of added tokens that are control tokens although their tokenizer does not mark them as special, such as
Qwen's `<tool_call>`; other added tokens are text, such as runs of spaces."""


@dataclass(frozen=True)
class Vocabulary:
    """Ids of all tokens that are not text. Codes are contiguous: code k has id `first_code + k`.

    With several codes per position, `first_code` is the id of every visual position.
    """

    pad: int
    eos: int
    user: int
    assistant: int
    soi: int
    eoi: int
    first_code: int
    codebook_sizes: tuple[int, ...]
    """Number of codes of each book."""
    code_shape: tuple[int, int, int, int]
    """Shape of an image's codes: N books, D depth, h rows, w columns."""

    @property
    def one_code(self) -> bool:
        """Whether a position has one code, so that each code has its own token."""
        return self.code_shape[:2] == (1, 1)

    @property
    def num_code_tokens(self) -> int:
        """Number of tokens that stand for visual positions."""
        return self.codebook_sizes[0] if self.one_code else 1

    @property
    def num_positions(self) -> int:
        """Number of visual positions of an image."""
        return self.code_shape[2] * self.code_shape[3]

    @property
    def size(self) -> int:
        """Number of rows of the embedding table that this vocabulary needs."""
        return self.first_code + self.num_code_tokens

    def code_ids(self, codes: Tensor) -> Tensor:
        """Convert codes of any shape to token ids, for vocabularies with one code per position.

        Raises:
            ValueError: a code is outside the codebook.
        """
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.num_code_tokens):
            raise ValueError(
                f"codes lie in {int(codes.min())}..{int(codes.max())}, the codebook has {self.num_code_tokens}"
            )
        return codes + self.first_code

    def codes(self, token_ids: Tensor) -> Tensor:
        """Convert token ids of an image, of any shape, back to codes."""
        return token_ids - self.first_code

    def to_json(self) -> str:
        """Return the vocabulary as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """Read the vocabulary from the JSON of `to_json`."""
        values: dict[str, Any] = json.loads(text)
        lists = {name: tuple(values[name]) for name in ("codebook_sizes", "code_shape")}
        return cls(**(values | lists))


def train_bpe(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with padding and end-of-sequence tokens that splits texts as Qwen2 does.

    `AutoTokenizer` reads the folder of a Qwen2 model with Qwen2's splitting, whatever splitting was saved there.

    Args:
        texts: the texts that the model will read.
        vocab_size: largest number of tokens; the 256 bytes are always included, so that every text can be encoded.
    """
    from transformers import Qwen2Tokenizer

    blank = Qwen2Tokenizer(vocab={PAD: 0, EOS: 1}, merges=[], unk_token=None, pad_token=PAD, eos_token=EOS)
    return blank.train_new_from_iterator(sorted(set(texts)), vocab_size, show_progress=False)


def count_codes(tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the codes, from code 0 on, that have tokens already, as in the tokenizer of a model of this project."""
    known = tokenizer.get_vocab()
    count = 0
    while _code_token(count) in known:
        count += 1
    return count


def _code_token(code: int) -> str:
    return f"<|code_{code}|>"


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerFast, codebook_sizes: tuple[int, ...], code_shape: tuple[int, int, int, int]
) -> Vocabulary:
    """Add the markers and one token per code to a text tokenizer (MUSE-VL, section 3.2: the vocabulary is extended).

    Args:
        tokenizer: a fast tokenizer, changed in place.
        codebook_sizes: number of codes of each book.
        code_shape: shape of an image's codes: N books, D depth, h, w. With several codes per position one token stands
            for all of them.

    Returns:
        The extended vocabulary.

    Raises:
        ValueError: it has tokens of codes already, followed by others where further codes would have to be.
    """
    from tokenizers import AddedToken

    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": EOS})
    markers = [USER, ASSISTANT, SOI, EOI]
    tokenizer.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    one_code = code_shape[:2] == (1, 1)
    codes = [_code_token(code) for code in range(codebook_sizes[0])] if one_code else [CODES]
    tokenizer.add_tokens([AddedToken(code, special=True, normalized=False) for code in codes])
    ids = tokenizer.convert_tokens_to_ids
    if ids(codes) != list(range(ids(codes[0]), ids(codes[0]) + len(codes))):
        raise ValueError(
            f"the tokenizer has tokens of codes already, followed by other tokens, so {codes[-1]} cannot get its id; "
            f"start from a model without tokens like {codes[0]}, or from one whose codebook is not smaller"
        )
    return Vocabulary(
        pad=tokenizer.pad_token_id,
        eos=tokenizer.eos_token_id,
        user=ids(USER),
        assistant=ids(ASSISTANT),
        soi=ids(SOI),
        eoi=ids(EOI),
        first_code=ids(codes[0]),
        codebook_sizes=codebook_sizes,
        code_shape=code_shape,
    )


class PlainText:
    """Converts text to token ids and back, and never makes a control token of untrusted text.

    `tokenizer.encode` reads `<|eos|>` in a caption as the end of the sequence. Here the same characters are split into
    ordinary tokens, and control tokens are inserted by code alone, by their ids. This holds for the tokens of our
    vocabulary and for the control tokens of a published tokenizer.

    Attributes:
        control_ids: ids of control tokens, which no text is converted to.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> None:
        """
        Args:
            tokenizer: fast or slow, over the extended vocabulary; neither changed here nor to be changed afterwards.
            vocabulary: the ids of markers and codes.
        """
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        controls = {index: token.content for index, token in added if token.special or _MARKUP.fullmatch(token.content)}
        own = {vocabulary.pad, vocabulary.eos, vocabulary.user, vocabulary.assistant, vocabulary.soi, vocabulary.eoi}
        codes = range(vocabulary.first_code, vocabulary.size)
        self.control_ids = frozenset({*controls, *tokenizer.all_special_ids, *own, *codes})
        # the unknown token is text, unless the tokenizer uses it as a marker as well, as GPT-2 does
        markers = {*own, tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
        self._unknown = tokenizer.unk_token_id if tokenizer.unk_token_id not in markers else None
        self._backend = _without_added_tokens(tokenizer, set(controls.values()))
        # a copy assigns new ids to the tokens that are added to the model's vocabulary
        kept = self._backend.get_added_tokens_decoder().items() if self._backend is not None else []
        self._renumbered = {index: tokenizer.convert_tokens_to_ids(token.content) for index, token in kept}

    def ids(self, text: str) -> list[int]:
        """Convert a text to token ids.

        Raises:
            ValueError: the tokenizer's model makes a control token of the text itself, even character by character.
        """
        if self._backend is not None:
            found = self._backend.encode(text, add_special_tokens=False).ids
            ids = [self._renumbered.get(index, index) for index in found]
        else:
            ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if self._refused(ids):  # a unigram model may have `</s>` as an ordinary piece
            ids = [part for index in ids for part in (self._characters(index) if self._refused([index]) else [index])]
            if refused := self._refused(ids):
                tokens = self.tokenizer.convert_ids_to_tokens(sorted(refused))
                raise ValueError(
                    f"the text {text[:80]!r} becomes the control tokens {tokens}, which this tokenizer cannot write as "
                    "text; take them out of the text"
                )
        return ids

    def text(self, token_ids: list[int]) -> str:
        """Convert token ids to text, leaving out control tokens; incomplete characters become U+FFFD."""
        words = [index for index in token_ids if index not in self.control_ids]
        return self.tokenizer.decode(words, clean_up_tokenization_spaces=False)

    def _refused(self, ids: list[int]) -> set[int]:
        return {index for index in ids if index in self.control_ids and index != self._unknown}

    def _characters(self, index: int) -> list[int]:
        """Return the ids of a token's single characters, or the token itself if the vocabulary lacks one of them."""
        parts = [self.tokenizer.convert_tokens_to_ids(part) for part in self.tokenizer.convert_ids_to_tokens(index)]
        return [index] if None in parts else parts


def _without_added_tokens(tokenizer: PreTrainedTokenizerBase, names: set[str]) -> Tokenizer | None:
    """Copy a fast tokenizer's backend so that it does not look for some added tokens in text; None for a slow one.

    `split_special_tokens` alone would still find those that are added but not special.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    description = json.loads(backend.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] not in names]
    # these could insert the removed tokens around the encoded text, which is not wanted here
    description |= {"post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(description))
