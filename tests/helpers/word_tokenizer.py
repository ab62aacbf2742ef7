"""A tokenizer of six words, for tiny models that need a folder with one."""

from __future__ import annotations

from pathlib import Path


def save_word_tokenizer(folder: Path, length: int | None) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "cat": 3, "dog": 4, "</s>": 5}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {} if length is None else {"model_max_length": length}
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", **options
    ).save_pretrained(folder)
