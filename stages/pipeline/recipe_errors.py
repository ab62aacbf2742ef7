"""Error messages about a recipe, in one line: the field, its value, what is expected, and the nearest field."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from models.config import Config, configs_in

RENAMED = {
    "download.threads_per_worker": "download.connections_per_worker",
    "evaluate.threads_per_worker": "evaluate.cpu_threads",
    "tokenizer.num_workers": "tokenizer.num_processes",
    "pretrain.num_workers": "pretrain.num_processes",
    "sft.num_workers": "sft.num_processes",
}
"""Former names of fields and their present names."""

_LONGEST_VALUE = 100
"""Characters of a value in an error."""
_MOST_SUGGESTIONS = 3
_TOO_MANY_NAMES = 40


@dataclass(frozen=True)
class _Place:
    """A place in a recipe."""

    path: str
    """Names with points between, as in `--set`."""
    classes: tuple[type[Config], ...]
    """The config classes that can stand there."""
    others: tuple[type[Config], ...]
    """Those of other kinds, where `kind` has chosen among several."""


def worst(error: ValidationError) -> ErrorDetails:
    """Choose the error to report: an unknown field before others, since a misspelt one is also reported as missing."""
    found = error.errors()
    return next((one for one in found if one["type"] == "extra_forbidden"), found[0])


def explain(error: ErrorDetails, root: type[Config], where: str) -> str:
    """Describe one of pydantic's errors in one line.

    Args:
        error: the error.
        root: the config class that was validated.
        where: where the values come from, such as the recipe's file; the message begins with it.
    """
    place = _place(error["loc"], root)
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown field {place.path!r}; {_hint(place, root)}"
    if error["type"] == "missing":
        return f"{where}: field {place.path!r} is missing; add it to the recipe"
    if error["type"] in ("union_tag_not_found", "union_tag_invalid"):
        return f"{where}: {_wrong_kind(error, place)}"
    return f"{where}: {_wrong_value(error, place)}"


def fields_below(root: type[Config], path: str = "") -> Iterator[str]:
    """Yield the paths of all fields of a config class, including those of its sections and of all their kinds."""
    for name, info in root.model_fields.items():
        below = f"{path}.{name}" if path else name
        yield below
        for config_class in configs_in(info.annotation):
            yield from fields_below(config_class, below)


def _place(location: Iterable[str | int], root: type[Config]) -> _Place:
    """Resolve a location of pydantic, which contains the kind of a section, although it is not part of the path."""
    path: list[str] = []
    classes: tuple[type[Config], ...] = (root,)
    others: tuple[type[Config], ...] = ()
    for part in map(str, location):
        chosen = tuple(one for one in classes if kind_of(one) == part)
        if chosen:
            classes, others = chosen, tuple(one for one in classes if one not in chosen)
            continue
        path.append(part)
        below = [one.model_fields[part].annotation for one in classes if part in one.model_fields]
        nested = tuple(dict.fromkeys(found for annotation in below for found in configs_in(annotation)))
        if nested:
            classes, others = nested, ()
    return _Place(".".join(path), classes, others)


def kind_of(config_class: type[Config]) -> str:
    """Return the value of `kind` that selects a config class; empty if it is not one of several."""
    info = config_class.model_fields.get("kind")
    return str(get_args(info.annotation)[0]) if info and get_origin(info.annotation) is Literal else ""


def _hint(place: _Place, root: type[Config]) -> str:
    """Suggest a field for an unknown one: its new name, other kinds, the same section, then the whole recipe."""
    parents, _, name = place.path.rpartition(".")
    if place.path in RENAMED:
        return f"its name is {RENAMED[place.path]!r} now"
    kinds = [kind_of(one) for one in place.others if name in one.model_fields]
    if kinds:
        own = kind_of(place.classes[0])
        return f"kind {own!r} has no such field, it is one of {_listed(kinds, 'and')}"
    names = sorted({field for one in place.classes for field in one.model_fields})
    section = parents.partition(".")[0]
    found = _deeper(name, place.classes, parents) or _near(name, names, parents)
    if not found and section:
        found = _deeper(name, configs_in(root.model_fields[section].annotation), section)
    if not found:
        found = _deeper(name, [root], "") or _near_anywhere(name, root)
    if found:
        return f"did you mean {_listed(found[:_MOST_SUGGESTIONS], 'or')}?"
    return f"the fields are {', '.join(names[:_TOO_MANY_NAMES])}"


def _deeper(name: str, classes: Iterable[type[Config]], path: str) -> list[str]:
    """Find the fields of exactly this name below some config classes."""
    paths = (below for one in classes for below in fields_below(one, path))
    return list(dict.fromkeys(below for below in paths if below.rpartition(".")[2] == name))


def _near(name: str, names: list[str], parents: str) -> list[str]:
    close = difflib.get_close_matches(name, names, n=1)
    return [f"{parents}.{one}" if parents else one for one in close]


def _near_anywhere(name: str, root: type[Config]) -> list[str]:
    paths = list(dict.fromkeys(fields_below(root)))
    close = difflib.get_close_matches(name, {path.rpartition(".")[2] for path in paths}, n=1)
    return [path for path in paths if path.rpartition(".")[2] in close]


def _wrong_kind(error: ErrorDetails, place: _Place) -> str:
    kinds = [kind_of(one) for one in place.classes]
    field = f"{place.path}.kind" if place.path else "kind"
    if error["type"] == "union_tag_not_found":
        return f"field {field!r} is missing; it is one of {_listed(kinds, 'or')}"
    given = str(error["input"].get("kind") if isinstance(error["input"], dict) else error["input"])
    close = difflib.get_close_matches(given, kinds, n=1)
    nearest = f"; did you mean {close[0]!r}?" if close else ""
    return f"field {field!r} has value {_short(given)}: input should be {_listed(kinds, 'or')}{nearest}"


def _wrong_value(error: ErrorDetails, place: _Place) -> str:
    context = error.get("ctx", {})
    if not place.path:  # of several sections, which it names itself
        return str(context.get("error", error["msg"]))
    if isinstance(error["input"], dict) and "error" in context:  # of several fields, which it names itself
        return f"section {place.path!r}: {context['error']}"
    problem = str(context["error"]) if error["type"] == "value_error" else error["msg"]
    return f"field {place.path!r} has value {_short(error['input'])}: {problem[:1].lower()}{problem[1:]}"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _LONGEST_VALUE else shown[:_LONGEST_VALUE] + "..."


def _listed(names: list[str], word: str) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {word} {quoted[-1]}"
