"""Which rows are wanted: by their caption, by the image's shape, and each image only once. All are off by default."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Annotated, Literal

from PIL import Image
from pydantic import Field, PositiveInt

from models.config import Config, Fraction

if TYPE_CHECKING:
    import numpy as np

PERCEPTUAL_HASH = "perceptual_hash"
"""Column of the metadata with the 64 bits as hexadecimal digits, where near duplicates are looked for."""
HASH_BITS = 64

Script = Literal[
    "ARABIC", "ARMENIAN", "BENGALI", "CJK", "CYRILLIC", "DEVANAGARI", "ETHIOPIC", "GEORGIAN", "GREEK", "GUJARATI",
    "GURMUKHI", "HANGUL", "HEBREW", "HIRAGANA", "KANNADA", "KATAKANA", "KHMER", "LAO", "LATIN", "MALAYALAM",
    "MONGOLIAN", "MYANMAR", "SINHALA", "TAMIL", "TELUGU", "THAI", "TIBETAN",
]  # fmt: skip
"""The first word of a letter's Unicode name: CJK for Chinese characters."""


class FilterConfig(Config):
    """Rows that are left out; each stays in the metadata with `status: filtered` and the reason."""

    min_side: PositiveInt | None = None
    """Shortest side of an image, pixels."""
    max_aspect_ratio: Annotated[float, Field(ge=1)] | None = None
    """Longest side over shortest side."""
    min_caption_characters: PositiveInt | None = None
    """Length of a caption without white space at its ends."""
    max_caption_characters: PositiveInt | None = None
    """Length of a caption without white space at its ends."""
    caption_scripts: tuple[Script, ...] = ()
    """Scripts that captions are written in, as Unicode names them: `[LATIN]`, `[CJK, HIRAGANA, KATAKANA]`."""
    min_script_fraction: Fraction = 0.8
    """Part of a caption's letters that must be of `caption_scripts`; a caption without letters has none of them."""
    exact_duplicates: bool = False
    """Leave out images whose bytes came before in the list."""
    near_duplicate_bits: Annotated[int, Field(ge=0, lt=HASH_BITS)] | None = None
    """Leave out images whose perceptual hash (64 bits, `imagehash.phash`) differs in at most so many bits from that of
    an image that came before and was kept. A few bits find rescaled and recompressed copies."""


def caption_problem(caption: str, filters: FilterConfig) -> str:
    """Why a caption is not wanted, '' where it is."""
    length = len(caption.strip())
    if filters.min_caption_characters is not None and length < filters.min_caption_characters:
        return f"caption shorter than {filters.min_caption_characters} characters"
    if filters.max_caption_characters is not None and length > filters.max_caption_characters:
        return f"caption longer than {filters.max_caption_characters} characters"
    if filters.caption_scripts and script_fraction(caption, filters.caption_scripts) < filters.min_script_fraction:
        return f"caption not in {', '.join(filters.caption_scripts)}"
    return ""


def script_fraction(text: str, scripts: tuple[str, ...]) -> float:
    """Part of the letters of a text that belong to some scripts; 0 where there are no letters."""
    letters = [character for character in unicodedata.normalize("NFKC", text) if character.isalpha()]
    of_script = sum(not _scripts_of(letter).isdisjoint(scripts) for letter in letters)
    return of_script / len(letters) if letters else 0.0


def _scripts_of(letter: str) -> set[str]:
    """By its Unicode name; the mark of a long vowel belongs to both Japanese syllabaries, that of repetition to CJK."""
    first = unicodedata.name(letter, "").split(" ")[0]
    return {"CJK"} if first == "IDEOGRAPHIC" else {first, *first.split("-")}


def image_problem(width: int, height: int, filters: FilterConfig) -> str:
    """Why an image of this size is not wanted, '' where it is."""
    shortest, longest = sorted((width, height))
    if filters.min_side is not None and shortest < filters.min_side:
        return f"shortest side below {filters.min_side} pixels"
    if filters.max_aspect_ratio is not None and longest > filters.max_aspect_ratio * shortest:
        return f"aspect ratio above {filters.max_aspect_ratio:g}"
    return ""


def perceptual_hash(image: Image.Image) -> str:
    """`imagehash.phash` of an RGB image as it is seen: upright, transparent parts over white."""
    import imagehash

    bits: np.ndarray = imagehash.phash(image.convert("L")).hash
    return f"{int(''.join('1' if bit else '0' for bit in bits.flatten()), 2):016x}"
