"""Filters of rows by caption, image shape and duplicates. All are off by default."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Annotated, Literal

from PIL import Image
from pydantic import Field, PositiveInt, model_validator

from models.config import Config, Fraction

if TYPE_CHECKING:
    import numpy as np

PERCEPTUAL_HASH = "perceptual_hash"
"""Metadata column with the 64-bit hash as hexadecimal digits, if near duplicates are filtered."""
HASH_BITS = 64

Script = Literal[
    "ARABIC", "ARMENIAN", "BENGALI", "CJK", "CYRILLIC", "DEVANAGARI", "ETHIOPIC", "GEORGIAN", "GREEK", "GUJARATI",
    "GURMUKHI", "HANGUL", "HEBREW", "HIRAGANA", "KANNADA", "KATAKANA", "KHMER", "LAO", "LATIN", "MALAYALAM",
    "MONGOLIAN", "MYANMAR", "SINHALA", "TAMIL", "TELUGU", "THAI", "TIBETAN",
]  # fmt: skip
"""The first word of letters' Unicode names; CJK stands for Chinese characters."""


class FilterConfig(Config):
    """Conditions on rows; a row that fails one stays in the metadata with `status: filtered` and the reason."""

    min_side: PositiveInt | None = None
    """Smallest length of an image's shortest side, in pixels."""
    max_aspect_ratio: Annotated[float, Field(ge=1)] | None = None
    """Largest ratio of an image's longest to its shortest side."""
    min_caption_characters: PositiveInt | None = None
    """Smallest length of a caption, without surrounding white space."""
    max_caption_characters: PositiveInt | None = None
    """Largest length of a caption, without surrounding white space."""
    caption_scripts: tuple[Script, ...] = ()
    """Permitted scripts of captions by their Unicode names: `[LATIN]`, `[CJK, HIRAGANA, KATAKANA]`; empty permits
    all."""
    min_script_fraction: Fraction = 0.8
    """Smallest fraction of a caption's letters that belong to `caption_scripts`; without letters it is 0."""
    exact_duplicates: bool = False
    """Whether to leave out images whose bytes equal those of an earlier row."""
    near_duplicate_bits: Annotated[int, Field(ge=0, lt=HASH_BITS)] | None = None
    """Leave out images whose perceptual hash (64 bits, `imagehash.phash`) differs in at most this many bits from that
    of an earlier image that was kept; `null` keeps them. A few bits find rescaled and recompressed copies."""

    @model_validator(mode="after")
    def _check_lengths(self) -> FilterConfig:
        least, most = self.min_caption_characters, self.max_caption_characters
        if least is not None and most is not None and least > most:
            raise ValueError(
                f"min_caption_characters={least} is larger than max_caption_characters={most}; exchange them"
            )
        return self


def caption_problem(caption: str, filters: FilterConfig) -> str:
    """Return why a caption is filtered, or ''."""
    length = len(caption.strip())
    if filters.min_caption_characters is not None and length < filters.min_caption_characters:
        return f"caption shorter than {filters.min_caption_characters} characters"
    if filters.max_caption_characters is not None and length > filters.max_caption_characters:
        return f"caption longer than {filters.max_caption_characters} characters"
    if filters.caption_scripts and script_fraction(caption, filters.caption_scripts) < filters.min_script_fraction:
        return f"caption not in {', '.join(filters.caption_scripts)}"
    return ""


def script_fraction(text: str, scripts: tuple[str, ...]) -> float:
    """Return the fraction of a text's letters that belong to the scripts; 0 if it has no letters."""
    letters = [character for character in unicodedata.normalize("NFKC", text) if character.isalpha()]
    of_script = sum(not _scripts_of(letter).isdisjoint(scripts) for letter in letters)
    return of_script / len(letters) if letters else 0.0


def _scripts_of(letter: str) -> set[str]:
    """Return a letter's scripts by its Unicode name; the long-vowel mark has both kana, the iteration mark has CJK."""
    first = unicodedata.name(letter, "").split(" ")[0]
    return {"CJK"} if first == "IDEOGRAPHIC" else {first, *first.split("-")}


def image_problem(width: int, height: int, filters: FilterConfig) -> str:
    """Return why an image of this size is filtered, or ''."""
    shortest, longest = sorted((width, height))
    if filters.min_side is not None and shortest < filters.min_side:
        return f"shortest side below {filters.min_side} pixels"
    if filters.max_aspect_ratio is not None and longest > filters.max_aspect_ratio * shortest:
        return f"aspect ratio above {filters.max_aspect_ratio:g}"
    return ""


def perceptual_hash(image: Image.Image) -> str:
    """Return `imagehash.phash` of a decoded RGB image (upright, transparency over white) as hexadecimal digits."""
    import imagehash

    bits: np.ndarray = imagehash.phash(image.convert("L")).hash
    return f"{int(''.join('1' if bit else '0' for bit in bits.flatten()), 2):016x}"
