"""Finding and reading recipe files, and applying overrides, as plain values.

This module is light to import; `stages.pipeline.recipe` validates the values of the fields.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from infra.terminal import on_one_line

STAGE_NAMES = ("download", "prepare_teacher", "train_tokenizer", "tokenize", "pretrain", "sft", "evaluate")
"""The names of all stages, each after the stages that make its inputs."""

RECIPE_FOLDER = Path(__file__).parents[1] / "recipes"
_DEEPEST = 16
"""Largest depth of nested lists and mappings; a recipe has five levels."""
_TOO_DEEP = f"lists and mappings stand more than {_DEEPEST} deep in each other"
_MOST_VALUES = 100_000
_MOST_BRACKETS = 200
"""Largest number of brackets that are open at once, some perhaps within a caption; the parser's time grows with its
square."""


class RecipeError(ValueError):
    """Raised for a recipe that cannot be read or an override that does not fit; one line with what and the remedy."""


def check_stage_name(name: str) -> None:
    """Check the name of a stage.

    Raises:
        ValueError: there is no such stage.
    """
    if name not in STAGE_NAMES:
        raise ValueError(f"unknown stage {name!r}; the stages are {', '.join(STAGE_NAMES)}")


def available_recipes() -> list[str]:
    """Return the names of the recipes that ship with the project."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def recipe_values(name_or_path: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """Read a recipe's file, and those that it extends, and apply overrides, without validating the fields.

    Args:
        name_or_path: as in `stages.pipeline.recipe.load_recipe`.
        overrides: as in `stages.pipeline.recipe.load_recipe`.

    Raises:
        RecipeError: the recipe is unknown, the YAML is unreadable, or an override is not `section.field=value`.
    """
    return merged(recipe_layers(name_or_path, overrides))


def recipe_layers(name_or_path: str, overrides: list[str] | None = None) -> list[dict[str, Any]]:
    """Read the layers that `recipe_values` merges: the recipes that are extended, the recipe, then each override.

    Each layer has only what it changes of the layers before it. Arguments and errors as for `recipe_values`.
    """
    path = recipe_path(name_or_path)
    layers = _read(path, ())
    layers[-1] = {"name": path.stem} | layers[-1]
    values = merged(layers)
    for override in overrides or []:
        layers.append(_override(values, override))
        values = merged([values, layers[-1]])
    return layers


def merged(layers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Merge layers field by field; lists and other values are replaced, `{}` empties a mapping."""
    values: dict[str, Any] = {}
    for layer in layers:
        values = _over(values, layer)
    return values


def recipe_path(name_or_path: str) -> Path:
    """Return the path of a recipe's file.

    Raises:
        RecipeError: there is no recipe with that name.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return path
    if name_or_path not in available_recipes():
        raise RecipeError(
            f"unknown recipe {name_or_path!r}; the recipes are {', '.join(available_recipes())}; "
            f"or give the path of a YAML file"
        )
    return RECIPE_FOLDER / f"{name_or_path}.yaml"


class _Whole(dict[str, Any]):
    """Mapping that replaces another one instead of being merged with it, as the value of an override does."""


def _read(path: Path, readers: tuple[Path, ...]) -> list[dict[str, Any]]:
    """Read the values of a recipe file, after those of the recipe that it extends."""
    if path in readers:
        raise RecipeError(f"recipe {path} extends itself; give `extends` the name of another recipe")
    try:
        values = _parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read recipe {path}: {on_one_line(error)}; give a readable YAML file") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path} is not a mapping of sections; see stages/recipes/mini.yaml")
    base = values.pop("extends", None)
    if base is None:
        return [values]
    if not isinstance(base, str):
        raise RecipeError(f"recipe {path}: `extends` is {base!r}; give the name of one recipe, or a path")
    return [*_read(recipe_path(base), (*readers, path)), values]


def _over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge `changes` over `base`, section by section."""
    result = dict(base)
    for name, value in changes.items():
        nested = isinstance(value, dict) and value and not isinstance(value, _Whole)
        result[name] = _over(result[name], value) if nested and isinstance(result.get(name), dict) else value
    return result


def _override(values: dict[str, Any], override: str) -> dict[str, Any]:
    """Parse an override into the layer of what it changes."""
    target, separator, text = override.partition("=")
    if not separator or not target:
        raise RecipeError(
            f"override {_short(override)} is not of the form section.field=value, for example sft.steps=200"
        )
    *parents, leaf = target.split(".")
    node: Any = values
    for parent in parents:
        node = node.get(parent)
        if node is None:
            node = {}
        if not isinstance(node, dict):
            raise RecipeError(f"override {_short(override)}: {parent!r} is a value and has no fields")
    try:
        value = _parsed(text)
    except ValueError as error:
        raise RecipeError(f"override {_short(override)}: {_short(text)} is not a YAML value: {error}") from error
    changes = {leaf: _Whole(value) if isinstance(value, dict) else value}
    for parent in reversed(parents):
        changes = {parent: changes}
    return changes


def _parsed(text: str) -> Any:
    """Parse a YAML text.

    Raises:
        ValueError: it is not YAML, or lists and mappings are nested deeper than any recipe needs.
    """
    depth = accumulate((character in "[{") - (character in "]}") for character in text)
    if max(depth, default=0) > _MOST_BRACKETS:
        raise ValueError(_TOO_DEEP)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(on_one_line(error)) from error
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _count(value, 0)
    return value


def _count(value: Any, depth: int) -> int:
    """Count the values within a value, itself included; what several aliases name counts each time.

    Raises:
        ValueError: there are too many values, or they are nested too deeply.
    """
    if not isinstance(value, (list, dict)):
        return 1
    if depth == _DEEPEST:
        raise ValueError(_TOO_DEEP)
    found = 1
    for part in value.values() if isinstance(value, dict) else value:
        found += _count(part, depth + 1)
        if found > _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES} values")
    return found


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:100] + "...")
