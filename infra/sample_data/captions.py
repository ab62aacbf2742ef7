"""Concept names, captions and the train/test split of the sample data: pure functions of text.

The caption rule: "<article> <concept> in <style> style". There is no article if the head of the name (the word
before the first preposition) is plural or a mass noun, if the name is a proper one (zodiac signs), or if it starts
with "no", "people" or a similar word; otherwise it is "an" before a vowel sound and "a" elsewhere.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

SPLIT_SEED = "musevl-emoji-1"
"""Part of the hash that selects the test style of a concept; another value gives another split."""

_SPOKEN = {"#": " hash ", "*": " asterisk ", "&": " and "}
_PREPOSITIONS = re.compile(r" (?:with|without|of|on|in|for|behind|showing|over) ")
_AN = re.compile(r"[aeiou]|hour|x-ray|sos |ng ")
_A_DESPITE_VOWEL = re.compile(r"uni|eu|one\b|ewe")
_SINGULAR_IN_S = re.compile(r"(?:ss|us|(?<!k)is|rhinoceros)$")
_NO_ARTICLE_HEADS = frozenset(
    {
        "bacon",
        "bread",
        "broccoli",
        "butter",
        "cheese",
        "curry",
        "feet",
        "fire",
        "fog",
        "garlic",
        "honey",
        "ice",
        "meat",
        "men",
        "money",
        "people",
        "popcorn",
        "rice",
        "salt",
        "sand",
        "soap",
        "spaghetti",
        "sushi",
        "teeth",
        "tofu",
        "women",
        "zzz",
    }
)
_NO_ARTICLE_START = re.compile(r"(?:no|input|people|men|women) ")
_NO_ARTICLE_SUBCATEGORIES = frozenset({"zodiac"})


def concept_name(short_name: str) -> str:
    """The Unicode short name in lowercase letters, digits, spaces and hyphens: "Mrs. Claus" gives "mrs claus".

    Raises:
        ValueError: nothing of the name is left.
    """
    text = "".join(_SPOKEN.get(char, char) for char in short_name)
    ascii_text = unicodedata.normalize("NFKD", text.replace("’", "").replace("'", ""))
    ascii_text = "".join(char for char in ascii_text if not unicodedata.combining(char)).lower()
    name = re.sub(r"[^a-z0-9-]+", " ", ascii_text).strip()
    if not name:
        raise ValueError(f"short name {short_name!r} has no letter or digit; add a spoken form for it")
    return name


def article(concept: str, subcategory: str) -> str:
    """Return the article of a concept by the rule at the top of this module: "a", "an" or an empty string."""
    head = _PREPOSITIONS.split(concept)[0].split()[-1]
    is_plural = len(head) > 1 and head.endswith("s") and not _SINGULAR_IN_S.search(head)
    if _NO_ARTICLE_START.match(concept):
        return ""
    if is_plural or head in _NO_ARTICLE_HEADS or subcategory in _NO_ARTICLE_SUBCATEGORIES:
        return ""
    return "an" if _AN.match(concept) and not _A_DESPITE_VOWEL.match(concept) else "a"


def caption(concept: str, subcategory: str, style: str) -> str:
    """Return the caption of one image, e.g. "a fox in noto style"."""
    return f"{article(concept, subcategory)} {concept} in {style} style".strip()


def held_out_style(concept: str, styles: Sequence[str], seed: str = SPLIT_SEED) -> str:
    """Return the style of `concept` that is held out, drawn from `styles` by a hash of the concept and the seed.

    Raises:
        ValueError: `styles` is empty.
    """
    if not styles:
        raise ValueError(f"concept {concept!r} has no styles to draw a test style from")
    digest = hashlib.sha256(f"{seed}:{concept}".encode()).digest()
    return sorted(styles)[int.from_bytes(digest[:8], "big") % len(styles)]
