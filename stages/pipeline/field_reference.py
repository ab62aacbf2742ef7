"""The fields of a recipe in plain words, as in `musevl fields` and `docs/reference.md`.

They are read from `fields.json`, which `stages.pipeline.describe_fields` writes from the config classes: to import
those takes seconds, since PyTorch comes with them. A test compares the file with the classes.
"""

from __future__ import annotations

import difflib
import json
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = Path(__file__).with_name("fields.json")
COMMAND = "python -m stages.pipeline.describe_fields"
"""Command that writes the file and `docs/reference.md`."""

_WIDTH = 100
_MOST_SUGGESTIONS = 3
_PAGE_WIDTH = 120
_ABOUT = (
    f"Written by `{COMMAND}` from the docstrings of the fields; change those, not this page. `musevl fields "
    "SECTION` prints the same. A field is set in a recipe's YAML, or with `--set SECTION.FIELD=VALUE`. *key* says "
    "whether it is part of the result's identity: another value there makes another result, and the stages that depend "
    "on it are made anew. The others are settings of the run; where one is a path, its meaning says whether the "
    "content counts. A default in parentheses holds where the recipe gives the section without the field. A field that "
    "only some kinds of a section have names them in parentheses."
)
_IDENTITY = {True: "part of the result's identity", False: "run-time setting"}


@dataclass(frozen=True)
class FieldDescription:
    """A field or a section of a recipe."""

    path: str
    """Dotted path as in `--set`; `N` stands for the position in a list."""
    kinds: str
    """The kinds of the section that have the field; empty if all have it."""
    type: str
    """Type and range in words."""
    default: str | None
    """Default as YAML; None for required fields and for sections, whose fields have their own."""
    required: bool
    identity: bool
    """Whether the field enters the action key."""
    meaning: str

    @property
    def facts(self) -> list[str]:
        """Type, default and identity."""
        found = [self.type]
        if self.required:
            found.append("has to be given")
        elif self.default is not None:
            found.append(f"default {self.default}")
        return found if self.type.startswith("section") else [*found, _IDENTITY[self.identity]]


def load_fields() -> list[FieldDescription]:
    """Read the descriptions of all fields of a recipe; each section precedes its fields."""
    return [FieldDescription(**row) for row in json.loads(FILE.read_text(encoding="utf-8"))]


def fields_json(fields: list[FieldDescription]) -> str:
    """Format descriptions as the content of the file."""
    return json.dumps([asdict(field) for field in fields], indent=1, ensure_ascii=False) + "\n"


def fields_text(path: str | None = None) -> str:
    """Format the fields at and below a path for a terminal; without a path the sections.

    Raises:
        ValueError: no field has this path.
    """
    fields = load_fields()
    if path is None:
        chosen = [field for field in fields if "." not in field.path]
        return "\n".join([*map(_text, chosen), "", "the fields of one: musevl fields SECTION, or SECTION.FIELD"])
    chosen = [field for field in fields if field.path == path or field.path.startswith(f"{path}.")]
    if not chosen:
        raise ValueError(f"no field of a recipe is called {path!r}; {_suggestion(path, fields)}")
    return "\n".join(map(_text, chosen))


def reference_page(fields: list[FieldDescription]) -> str:
    """Format descriptions as `docs/reference.md`."""
    lines = ["# The fields of a recipe", "", *textwrap.wrap(_ABOUT, _PAGE_WIDTH)]
    top = [field for field in fields if "." not in field.path]
    lines += ["", *_table([field for field in top if not field.type.startswith("section")])]
    for section in (field for field in top if field.type.startswith("section")):
        lines += ["", f"## {section.path}", "", section.meaning, ""]
        lines += _table([field for field in fields if field.path.startswith(f"{section.path}.")])
    return "\n".join(lines) + "\n"


def _text(field: FieldDescription) -> str:
    kinds = f"  (kind {field.kinds})" if field.kinds else ""
    body = [*textwrap.wrap("; ".join(field.facts), _WIDTH - 4), *textwrap.wrap(field.meaning, _WIDTH - 4)]
    return "\n".join([field.path + kinds, *(f"    {line}" for line in body)])


def _table(fields: list[FieldDescription]) -> list[str]:
    rows = ["| field | values | default | key | meaning |", "|---|---|---|---|---|"]
    for field in fields:
        is_section = field.type.startswith("section")
        default = "*required*" if field.required else "" if field.default is None else f"`{field.default}`"
        key = "" if is_section else "yes" if field.identity else "no"
        kinds = f" ({field.kinds})" if field.kinds else ""
        cells = [f"`{field.path}`{kinds}", field.type, default, key, field.meaning]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return rows


def _suggestion(path: str, fields: list[FieldDescription]) -> str:
    section, _, _ = path.partition(".")
    name = path.rpartition(".")[2]
    paths = list(dict.fromkeys(field.path for field in fields))
    same = [one for one in paths if one.rpartition(".")[2] == name]
    near = difflib.get_close_matches(path, paths, n=_MOST_SUGGESTIONS)
    found = [one for one in same if one.startswith(f"{section}.")] or near or same
    if found:
        return f"did you mean {' or '.join(repr(one) for one in found[:_MOST_SUGGESTIONS])}?"
    return f"the sections are {', '.join(one for one in paths if '.' not in one)}"
