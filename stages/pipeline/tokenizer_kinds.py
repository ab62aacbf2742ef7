"""The section `tokenizer` of a recipe, whose fields depend on its kind: which values apply after a change of the kind.

A recipe is read in layers: what it extends, itself, then each `--set` in order. The last layer that sets
`tokenizer.kind` decides. Fields of earlier layers that this kind lacks and another kind has are left out; in that layer
and in later ones they are an error. `tokenizer.kinds.KIND` in any layer applies if KIND is chosen, over what this layer
sets for all kinds.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from models.config import Config, configs_in
from stages.pipeline.recipe_errors import explain, kind_of
from stages.pipeline.recipe_files import RecipeError, merged
from stages.train_tokenizer.stage import TokenizerSection

_SECTION, _KIND, _KINDS = "tokenizer", "kind", "kinds"
CLASSES: dict[str, type[Config]] = {kind_of(found): found for found in configs_in(TokenizerSection)}
"""The config class of each kind."""


def with_kind_resolved(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the layers of a recipe, with the fields of the tokenizer kind that they choose."""
    stating = [number for number, layer in enumerate(layers) if _KIND in _mapping(layer, _SECTION)]
    kind = _mapping(layers[stating[-1]], _SECTION)[_KIND] if stating else None
    values: dict[str, Any] = {}
    for number, layer in enumerate(layers):
        if stating and number == stating[-1] and isinstance(kind, str) and kind in CLASSES:
            values = _without_other_kinds(values, kind)
        values = merged([values, *_parts(layer, kind)])
    return values


def check_kinds(layers: list[dict[str, Any]], where: str) -> None:
    """Check the fields in `tokenizer.kinds`, also those of kinds that are not chosen.

    Raises:
        RecipeError: naming the first field.
    """
    sections = _mapping(merged(layers), _SECTION).get(_KINDS, {})
    if not isinstance(sections, dict):
        raise RecipeError(f"{where}: {_SECTION}.{_KINDS} is {sections!r}; give a mapping of kinds to their fields")
    for kind, given in sections.items():
        if kind not in CLASSES:
            close = difflib.get_close_matches(str(kind), CLASSES, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the kinds are {', '.join(CLASSES)}"
            raise RecipeError(f"{where}: {_SECTION}.{_KINDS} names {kind!r}, which is no kind of tokenizer; {hint}")
        if not isinstance(given, dict):
            raise RecipeError(f"{where}: {_SECTION}.{_KINDS}.{kind} is {given!r}; give a mapping of its fields")
        others = with_kind_resolved([*layers, {_SECTION: {_KIND: kind}}])
        values = merged([others, {_SECTION: given}])[_SECTION]
        try:
            CLASSES[kind].model_validate(values)
        except ValidationError as error:
            for problem in error.errors():
                if problem["loc"] and problem["loc"][0] in given:
                    place = f"{where}, {_SECTION}.{_KINDS}.{kind}"
                    raise RecipeError(explain(problem, CLASSES[kind], place)) from error


def _mapping(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a nested mapping, or an empty one if there is none."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _parts(layer: dict[str, Any], kind: Any) -> Iterator[dict[str, Any]]:
    """Yield a layer without `tokenizer.kinds`, then the fields that it has there for a kind."""
    section = _mapping(layer, _SECTION)
    if _KINDS not in section:
        yield layer
        return
    common = type(section)({name: value for name, value in section.items() if name != _KINDS})
    yield {name: value for name, value in layer.items() if name != _SECTION} | ({_SECTION: common} if common else {})
    if isinstance(kind, str) and (own := _mapping(_mapping(section, _KINDS), kind)):
        yield {_SECTION: own}


def _without_other_kinds(values: dict[str, Any], kind: str) -> dict[str, Any]:
    """Leave out the tokenizer's fields that a kind lacks and another kind has."""
    others = [found for name, found in CLASSES.items() if name != kind]
    section = _mapping(values, _SECTION)
    return values | {_SECTION: _known(section, CLASSES[kind], others)} if section else values


def _known(values: dict[str, Any], own: type[Config], others: list[type[Config]]) -> dict[str, Any]:
    """Leave out fields that only other classes have. Fields of no class are kept, so that validation names them."""
    known: dict[str, Any] = {}
    for name, value in values.items():
        if name not in own.model_fields:
            if not any(name in other.model_fields for other in others):
                known[name] = value
            continue
        below = configs_in(own.model_fields[name].annotation)
        if isinstance(value, dict) and len(below) == 1:
            fields = [other.model_fields[name] for other in others if name in other.model_fields]
            value = _known(value, below[0], [found for info in fields for found in configs_in(info.annotation)])
        known[name] = value
    return known
