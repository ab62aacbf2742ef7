"""The table of all kinds of image tokenizers, and the function that builds one from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.teachers.teacher import Teacher
from models.tokenizers.config import TokenizerConfig
from models.tokenizers.image_tokenizer import ImageTokenizer
from models.tokenizers.one_code import SdeTokenizer, SemanticTokenizer, TokenFlowTokenizer, VqganTokenizer
from models.tokenizers.residual import DualTokenTokenizer, VilaUTokenizer

KINDS: dict[str, type[ImageTokenizer]] = {
    kind.config_class.model_fields["kind"].default: kind
    for kind in (
        VqganTokenizer,  # a line for each kind
        SdeTokenizer,
        SemanticTokenizer,
        TokenFlowTokenizer,
        DualTokenTokenizer,
        VilaUTokenizer,
    )
}
"""The class of each kind that encodes and decodes images."""


def build_tokenizer(config: TokenizerConfig, teacher: Teacher | None = None) -> ImageTokenizer:
    """Build the tokenizer of a config; arguments and errors as for `ImageTokenizer`."""
    return KINDS[config.kind](config, teacher)


def tokenizer_config(values: Mapping[str, Any]) -> TokenizerConfig:
    """Build the config of a tokenizer from values that include its kind; fields that the kind lacks are ignored.

    The config of a training has further fields, and artifacts of earlier versions have the fields of all kinds.
    """
    config_class = KINDS[values["kind"]].config_class
    return config_class(**{name: values[name] for name in config_class.model_fields if name in values})
