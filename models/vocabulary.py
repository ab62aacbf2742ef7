"""One vocabulary for text and images: text tokens, turn and image markers, then one token a visual code.

Where an image has several codes a position, no vocabulary can hold their combinations: there one token stands for every
visual position, and the codes travel beside the token ids.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<|pad|>", "<|eos|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
SOI, EOI = "<|soi|>", "<|eoi|>"
CODES = "<|codes|>"
"""Every visual position, where it has several codes."""


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
    """
    from tokenizers import AddedToken

    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    markers = [USER, ASSISTANT, SOI, EOI]
    tokenizer.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    one_code = code_shape[:2] == (1, 1)
    codes = [f"<|code_{code}|>" for code in range(codebook_sizes[0])] if one_code else [CODES]
    tokenizer.add_tokens([AddedToken(code, special=True, normalized=False) for code in codes])
    ids = tokenizer.convert_tokens_to_ids
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
