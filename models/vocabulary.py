"""One vocabulary for text and images: text tokens, turn and image markers, then one token a visual code."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<|pad|>", "<|eos|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
SOI, EOI = "<|soi|>", "<|eoi|>"


@dataclass(frozen=True)
class Vocabulary:
    """Ids of everything that is not text. Codes are contiguous: code k has id `first_code + k`."""

    pad: int
    eos: int
    user: int
    assistant: int
    soi: int
    eoi: int
    first_code: int
    codebook_size: int
    code_rows: int
    """Rows of the code grid."""
    code_columns: int
    """Columns of the code grid."""

    @property
    def num_codes(self) -> int:
        """Codes of one image."""
        return self.code_rows * self.code_columns

    @property
    def size(self) -> int:
        """Rows of the embedding table that this vocabulary needs."""
        return self.first_code + self.codebook_size

    def code_ids(self, codes: Tensor) -> Tensor:
        """Codes to token ids, any shape.

        Raises:
            ValueError: a code outside the codebook.
        """
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size):
            raise ValueError(
                f"codes lie in {int(codes.min())}..{int(codes.max())}, the codebook has {self.codebook_size}"
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
        return cls(**json.loads(text))


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


def extend_tokenizer(tokenizer: PreTrainedTokenizerFast, codebook_size: int, grid: tuple[int, int]) -> Vocabulary:
    """Add the markers and one token a code to a text tokenizer (MUSE-VL, section 3.2: the vocabulary is extended).

    Args:
        tokenizer: changed in place.
        codebook_size: number of codes.
        grid: code rows and columns of an image.

    Returns:
        The ids.
    """
    from tokenizers import AddedToken

    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    markers = [USER, ASSISTANT, SOI, EOI]
    tokenizer.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    codes = [AddedToken(f"<|code_{code}|>", special=True, normalized=False) for code in range(codebook_size)]
    tokenizer.add_tokens(codes)
    ids = tokenizer.convert_tokens_to_ids
    return Vocabulary(
        pad=tokenizer.pad_token_id,
        eos=tokenizer.eos_token_id,
        user=ids(USER),
        assistant=ids(ASSISTANT),
        soi=ids(SOI),
        eoi=ids(EOI),
        first_code=ids("<|code_0|>"),
        codebook_size=codebook_size,
        code_rows=grid[0],
        code_columns=grid[1],
    )
