"""Every field of a recipe says what it is and is read somewhere; every recipe that ships loads."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.config import Config
from stages.recipe import Recipe, available_recipes, load_recipe

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


@pytest.mark.parametrize("name", available_recipes())
def test_recipe_loads(name: str) -> None:
    assert load_recipe(name).name == name
