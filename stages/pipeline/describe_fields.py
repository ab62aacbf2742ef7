"""Writes the descriptions of a recipe's fields from the config classes: `python -m stages.pipeline.describe_fields`.

They go to `stages/pipeline/fields.json`, which `musevl fields` reads, and to `docs/reference.md`.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from models.config import Config, configs_in
from stages.pipeline.field_reference import FILE, FieldDescription, fields_json, reference_page
from stages.pipeline.recipe import Recipe
from stages.pipeline.recipe_errors import kind_of
from stages.protocol import DoesNotAffectResult

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"
_SECTION = "section"


def main() -> None:
    """Write both files."""
    fields = describe_fields()
    FILE.write_text(fields_json(fields), encoding="utf-8")
    PAGE.write_text(reference_page(fields), encoding="utf-8")


def describe_fields() -> list[FieldDescription]:
    """Describe all fields of a recipe; each section precedes its fields."""
    return list(_fields(Recipe, "", None, identity=True))


def _fields(
    config_class: type[Config], path: str, default: Config | None, *, identity: bool
) -> Iterator[FieldDescription]:
    """Describe the fields of a config class and those of its sections.

    Args:
        config_class: the class.
        path: path of the section.
        default: default of the section, if it is of this class.
        identity: whether the section enters the action key.
    """
    for name, info in config_class.model_fields.items():
        below = f"{path}.{name}" if path else name
        counts = identity and DoesNotAffectResult not in info.metadata
        own = info.get_default(call_default_factory=True) if not info.is_required() else PydanticUndefined
        held = getattr(default, name) if default is not None else own
        yield FieldDescription(
            path=below,
            kinds="",
            type=_type(Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation),
            default=_default(held, own),
            required=info.is_required(),
            identity=counts,
            meaning=" ".join((info.description or "").split()),
        )
        yield from _below(info, below, held, identity=counts)


def _below(info: FieldInfo, path: str, held: Any, *, identity: bool) -> Iterator[FieldDescription]:
    """Describe the fields of a section; a field that several kinds have in the same way is described once."""
    classes = configs_in(info.annotation)
    if _holds_list(info.annotation):
        path = f"{path}.N"
    if len(classes) == 1:
        yield from _fields(classes[0], path, held if isinstance(held, classes[0]) else None, identity=identity)
        return
    kinds: dict[FieldDescription, list[str]] = {}
    for config_class in classes:
        default = held if type(held) is config_class else None
        for field in _fields(config_class, path, default, identity=identity):
            if field.path == f"{path}.kind":
                field = replace(field, type=_choices([kind_of(one) for one in classes]), default=None, required=True)
                field = replace(field, meaning="Which of them it is; the others' fields are then unknown.")
            kinds.setdefault(field, []).append(kind_of(config_class))
    for field, having in kinds.items():
        lacking = [kind for kind in map(kind_of, classes) if kind not in having]
        yield replace(
            field, kinds=f"all but {lacking[0]}" if len(lacking) == 1 else ", ".join(having if lacking else [])
        )


def _type(annotation: Any) -> str:
    """Describe a type in words."""
    bounds: list[Any] = []
    if get_origin(annotation) is Annotated:
        annotation, *bounds = get_args(annotation)
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            bounds += more
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _union(arguments)
    if origin is Literal:
        return _choices([value if isinstance(value, str) else _yaml(value) for value in arguments])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            least = next((found.min_length for found in bounds if hasattr(found, "min_length")), 0)
            return f"list of {_type(arguments[0])}" + (f", at least {least}" if least else "")
        return f"list of {len(arguments)}: " + ", ".join(_type(argument) for argument in arguments)
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return _SECTION
    if annotation is bool:
        return "`true` or `false`"
    words = {int: "whole number", float: "number", str: "text"}[annotation]
    return " ".join([words, _range(annotation, bounds)]).strip()


def _union(arguments: tuple[Any, ...]) -> str:
    optional = type(None) in arguments
    others = [argument for argument in arguments if argument is not type(None)]
    classes = [found for argument in others for found in configs_in(argument)]
    if len(classes) > 1:
        text = f"{_SECTION} of one kind: {_choices([kind_of(one) for one in classes])}"
    else:
        (only,) = others
        text = _type(only)
    return f"{text}, or `null`" if optional else text


def _range(kind: type, bounds: list[Any]) -> str:
    """Describe the bounds of a number; those of whole numbers as the smallest and the largest value."""
    found: dict[str, Any] = {}
    for bound in bounds:
        constraints = getattr(bound, "metadata", None) or [bound]
        for constraint in constraints:
            for name in ("gt", "ge", "lt", "le"):
                if (value := getattr(constraint, name, None)) is not None:
                    found[name] = value
    if kind is int:
        if "gt" in found:
            found["ge"] = found.pop("gt") + 1
        if "lt" in found:
            found["le"] = found.pop("lt") - 1
    low = f"from {_yaml(found['ge'])}" if "ge" in found else f"above {_yaml(found['gt'])}" if "gt" in found else ""
    high = f"to {_yaml(found['le'])}" if "le" in found else f"and below {_yaml(found['lt'])}" if "lt" in found else ""
    return " ".join(part for part in (low, high) if part)


def _default(held: Any, own: Any) -> str | None:
    """Format the default; in parentheses the one that applies if the section is given without the field."""
    if held is PydanticUndefined or isinstance(held, Config):
        return None
    if own is PydanticUndefined or isinstance(own, Config) or held == own:
        return _yaml(held)
    return f"{_yaml(held)} ({_yaml(own)})"


def _yaml(value: Any) -> str:
    """Format a value as YAML on one line."""
    if isinstance(value, Config):
        return _yaml(value.model_dump())
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_yaml(one)}' for name, one in value.items())}}}"
    if isinstance(value, float) and math.isfinite(value):
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    return json.dumps(value, ensure_ascii=False)


def _choices(values: list[str]) -> str:
    quoted = [f"`{value}`" for value in values]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _holds_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


if __name__ == "__main__":
    main()
