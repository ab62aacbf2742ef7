"""Every field of a recipe says what it is and is read somewhere; every recipe that ships loads."""

import ast
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from models.config import Config
from stages.pipeline.recipe import Recipe, load_recipe
from stages.pipeline.recipe_files import available_recipes

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "stages", "models", "storage", "infra")


def config_classes(root: type[Config]) -> list[type[Config]]:
    """A config class and all that its fields can hold, through unions, lists and dicts, and their subclasses."""
    found: list[type[Config]] = []

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, Config):
            if annotation in found:
                return
            found.append(annotation)
            for info in annotation.model_fields.values():
                visit(info.annotation)
            for subclass in annotation.__subclasses__():
                visit(subclass)
        for argument in getattr(annotation, "__args__", ()):
            visit(argument)

    visit(root)
    return found


def fields() -> Iterator[Any]:
    for config_class in config_classes(Recipe):
        for name in config_class.model_fields:
            yield pytest.param(config_class, name, id=f"{config_class.__name__}.{name}")


@pytest.fixture(scope="module")
def attributes_read() -> set[str]:
    """Every attribute that the sources read, and the sections of the recipe that the stages name."""
    read: set[str] = set()
    for path in (path for name in PACKAGES for path in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.keyword) and node.arg == "section" and isinstance(node.value, ast.Constant):
                read.add(str(node.value.value))
    return read


@pytest.mark.parametrize(("config_class", "name"), list(fields()))
def test_field_is_described_and_read(config_class: type[Config], name: str, attributes_read: set[str]) -> None:
    assert config_class.model_fields[name].description, "add a one-line docstring below the field"
    assert name in attributes_read, "nothing reads this field; use it or remove it"


def numbers(kind: type, annotation: Any) -> bool:
    """Whether a field holds numbers of a kind, by itself or in a collection."""
    return annotation is kind or any(numbers(kind, argument) for argument in getattr(annotation, "__args__", ()))


def numeric_fields(kind: type) -> list[tuple[type[Config], str]]:
    """Classes of a recipe with the names of their fields that hold numbers of a kind."""
    return [
        (config_class, name)
        for config_class in config_classes(Recipe)
        for name, info in config_class.model_fields.items()
        if numbers(kind, info.annotation)
    ]


def takes(config_class: type[Config], name: str, number: float) -> bool:
    """Whether a field takes a number, its default's place in a collection."""
    default = config_class.model_fields[name].default
    value = [number, *default[1:]] if isinstance(default, tuple) and default else number
    try:
        config_class.model_validate({name: value})
    except ValidationError as error:
        return not any(problem["loc"][0] == name for problem in error.errors())
    return True


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 1e300, -1e300])
def test_no_field_takes_a_number_that_is_not_finite(number: float) -> None:
    fields = numeric_fields(float)
    assert len(fields) > 30
    assert [f"{config.__name__}.{name}" for config, name in fields if takes(config, name, number)] == []


@pytest.mark.parametrize("number", [-(10**30), 10**30])
def test_no_field_takes_an_integer_that_is_out_of_range(number: int) -> None:
    fields = numeric_fields(int)
    assert len(fields) > 30
    assert [f"{config.__name__}.{name}" for config, name in fields if takes(config, name, number)] == []


def test_every_number_says_how_small_it_may_be() -> None:
    schemas = {config_class: config_class.model_json_schema() for config_class in config_classes(Recipe)}
    unbounded = [
        f"{config_class.__name__}.{name}"
        for config_class, name in numeric_fields(int) + numeric_fields(float)
        if "inimum" not in str(schemas[config_class]["properties"][name])
    ]
    assert unbounded == [], "give the field a bound: PositiveInt, NonNegativeFloat, Fraction, Field(ge=...)"


@pytest.mark.parametrize("name", available_recipes())
def test_recipe_loads(name: str) -> None:
    assert load_recipe(name).name == name
