"""Templates such as `Draw {caption}.`, which contain column names in braces and nothing else.

They are not Python format strings, in which `{caption.foo}` would read an attribute and `{caption:999999999}` would
pad to that length. Any column name is allowed: `{Image Size}`, `{a.b}`. `{{` and `}}` stand for single braces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator

CAPTION = "caption"
"""Name of an image's text in templates, whatever its column is called in the data."""
_PARTS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def names_in(template: str) -> list[str]:
    """Return the column names in a template, each once.

    Raises:
        ValueError: a brace is unmatched, or a pair of braces is empty.
    """
    names = []
    for part in _PARTS.finditer(template):
        if part[0] in ("{", "}"):
            raise ValueError(f"the brace {part[0]!r} is unmatched; write {part[0] * 2} for one that is text")
        if part[1] is not None:
            if not part[1].strip():
                raise ValueError(f"{part[0]!r} names no column; write for example {{{CAPTION}}}")
            names.append(part[1])
    return list(dict.fromkeys(names))


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Fill a template with the values of its names.

    Raises:
        ValueError: a name is unknown.
    """

    def value(part: re.Match[str]) -> str:
        if part[1] is None:
            return part[0][0]
        if part[1] not in fields:
            raise ValueError(f"template {template!r}: {unknown_name(part[1], list(fields))}")
        return fields[part[1]]

    return _PARTS.sub(value, template)


def fill_row(template: str, row: Mapping[str, str]) -> str:
    """Fill a template with the columns of an image; `{caption}` is its `text`."""
    return fill(template, {**row, CAPTION: row["text"]})


def unknown_name(name: str, known: list[str]) -> str:
    """Return the message about an unknown name."""
    remedy = f"it can name {', '.join(sorted(known))}" if known else "the data have none"
    for mark in ":!.[":
        if name.partition(mark)[0] in known:
            return f"there is no column {name!r}, and nothing but a column's name goes into the braces; {remedy}"
    return f"there is no column {name!r}; {remedy}"


def _readable(template: str) -> str:
    names_in(template)
    return template


def _over_choice(template: str) -> str:
    if other := [name for name in names_in(template) if name != "choice"]:
        raise ValueError(unknown_name(other[0], ["choice"]))
    return template


Template = Annotated[str, AfterValidator(_readable)]
"""A template over columns; the recipe checks that they exist."""
ChoiceTemplate = Annotated[str, AfterValidator(_over_choice)]
"""A template whose only name is `{choice}`."""
