"""One vocabulary for text and images: text tokens, turn and image markers, then one token a visual code.

Where an image has several codes a position, no vocabulary can hold their combinations: there one token stands for every
visual position, and the codes travel beside the token ids.
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
"""Every visual position, where it has several codes."""
_MARKUP = re.compile(r"\s*[<\[\uff1c].*[>\]\uff1e]\s*", re.DOTALL)
"""How added tokens look that are control tokens although their tokenizer does not call them special, such as Qwen's
`<tool_call>`; other added tokens are text, such as runs of spaces."""


@dataclass(frozen=True)
class Vocabulary:
    """Ids of everything that is not text. Codes are contiguous: code k has id `first_code + k`.

    With several codes a position `first_code` is the id of every visual position.
    """

    pad: int
    eos: int
    user: int
    assistant: int
    soi: int
    eoi: int
    first_code: int
    codebook_sizes: tuple[int, ...]
    """Entries of each book."""
    code_shape: tuple[int, int, int, int]
    """Of an image: N books, D depth, h, w."""

    @property
    def one_code(self) -> bool:
        """Whether a position has one code, and so each code its own token."""
        return self.code_shape[:2] == (1, 1)

    @property
    def num_code_tokens(self) -> int:
        """Tokens that stand for visual positions."""
        return self.codebook_sizes[0] if self.one_code else 1

    @property
    def num_positions(self) -> int:
        """Visual positions of an image."""
        return self.code_shape[2] * self.code_shape[3]

    @property
    def size(self) -> int:
        """Rows of the embedding table that this vocabulary needs."""
        return self.first_code + self.num_code_tokens

    def code_ids(self, codes: Tensor) -> Tensor:
        """Codes to token ids, any shape, where a position has one code.

        Raises:
            ValueError: a code outside the codebook.
        """
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.num_code_tokens):
            raise ValueError(
                f"codes lie in {int(codes.min())}..{int(codes.max())}, the codebook has {self.num_code_tokens}"
            )
        return codes + self.first_code

    def codes(self, token_ids: Tensor) -> Tensor:
        """Token ids of an image back to codes, any shape."""
        return token_ids - self.first_code

    def to_json(self) -> str:
        """The ids as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """Read what `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        lists = {name: tuple(values[name]) for name in ("codebook_sizes", "code_shape")}
        return cls(**(values | lists))


def train_bpe(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over some texts, with padding and end of sequence, that splits texts as Qwen2 does.

    `AutoTokenizer` reads the folder of a Qwen2 model with Qwen2's splitting, whatever splitting was saved there.

    Args:
        texts: whatever the model is to read.
        vocab_size: most tokens; 256 bytes are always there, so every text can be written.
    """
    from transformers import Qwen2Tokenizer

    blank = Qwen2Tokenizer(vocab={PAD: 0, EOS: 1}, merges=[], unk_token=None, pad_token=PAD, eos_token=EOS)
    return blank.train_new_from_iterator(sorted(set(texts)), vocab_size, show_progress=False)


def count_codes(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many codes have tokens already, from the first on, as in the folder of a model that was trained here."""
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
    """Add the markers and one token a code to a text tokenizer (MUSE-VL, section 3.2: the vocabulary is extended).

    Args:
        tokenizer: changed in place.
        codebook_sizes: number of codes of each book.
        code_shape: of an image: N books, D depth, h, w. With several codes a position one token stands for all.

    Returns:
        The ids.

    Raises:
        ValueError: it has tokens of codes already, and others behind them where further codes would stand.
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
            f"the tokenizer has tokens of codes already and others behind them, so {codes[-1]} cannot stand where it "
            f"belongs; start from a model without tokens like {codes[0]}, or from one whose codebook is not smaller"
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
    """Text to token ids and back, with no control token in between, whatever the text says.

    `tokenizer.encode` reads `<|eos|>` in a caption as the end of the sequence. Here the same characters become the
    pieces that any other text becomes; control tokens come from code alone, by their ids. It holds for the tokens of
    our vocabulary and for those that a published tokenizer brought along.

    Attributes:
        control_ids: the ids that no text has.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> None:
        """
        Args:
            tokenizer: fast or slow, over the extended vocabulary; it is not changed, and must not be afterwards.
            vocabulary: ids.
        """
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        controls = {index: token.content for index, token in added if token.special or _MARKUP.fullmatch(token.content)}
        own = {vocabulary.pad, vocabulary.eos, vocabulary.user, vocabulary.assistant, vocabulary.soi, vocabulary.eoi}
        codes = range(vocabulary.first_code, vocabulary.size)
        self.control_ids = frozenset({*controls, *tokenizer.all_special_ids, *own, *codes})
        # what stands for a character that the vocabulary lacks is text, unless it is a marker as well, as in GPT-2
        markers = {*own, tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
        self._unknown = tokenizer.unk_token_id if tokenizer.unk_token_id not in markers else None
        self._backend = _without_added_tokens(tokenizer, set(controls.values()))
        # a copy numbers what is added to the model's vocabulary anew
        kept = self._backend.get_added_tokens_decoder().items() if self._backend is not None else []
        self._renumbered = {index: tokenizer.convert_tokens_to_ids(token.content) for index, token in kept}

    def ids(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            ValueError: the tokenizer's model itself makes a control token of the text, and of its characters too.
        """
        if self._backend is not None:
            found = self._backend.encode(text, add_special_tokens=False).ids
            ids = [self._renumbered.get(index, index) for index in found]
        else:
            ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if self._refused(ids):  # a unigram model may know `</s>` as a piece like any other
            ids = [part for index in ids for part in (self._characters(index) if self._refused([index]) else [index])]
            if refused := self._refused(ids):
                tokens = self.tokenizer.convert_ids_to_tokens(sorted(refused))
                raise ValueError(
                    f"the text {text[:80]!r} becomes the control tokens {tokens}, which this tokenizer cannot write as "
                    "text; take them out of the text"
                )
        return ids

    def text(self, token_ids: list[int]) -> str:
        """The text of some token ids; control tokens among them say nothing, cut characters become U+FFFD."""
        words = [index for index in token_ids if index not in self.control_ids]
        return self.tokenizer.decode(words, clean_up_tokenization_spaces=False)

    def _refused(self, ids: list[int]) -> set[int]:
        return {index for index in ids if index in self.control_ids and index != self._unknown}

    def _characters(self, index: int) -> list[int]:
        """Ids of the single characters of a token; the token itself where the vocabulary lacks one of them."""
        parts = [self.tokenizer.convert_tokens_to_ids(part) for part in self.tokenizer.convert_ids_to_tokens(index)]
        return [index] if None in parts else parts


def _without_added_tokens(tokenizer: PreTrainedTokenizerBase, names: set[str]) -> Tokenizer | None:
    """A copy of a fast tokenizer's backend that does not look for some added tokens in text; None of a slow one.

    `split_special_tokens` alone would still find those that are added, but not special.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    description = json.loads(backend.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] not in names]
    # they join what was encoded with the tokens that were taken out, and are not asked to
    description |= {"post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(description))
