"""A recipe: the configuration of every stage and the seed, in one YAML file, or in what it changes of another."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from models.config import Config
from stages import download, evaluate, prepare_teacher, pretrain, sft, tokenize, train_tokenizer
from stages.stage import Stage
from stages.templates import CAPTION, names_in, unknown_name

STAGES: dict[str, Stage[Any]] = {
    module.STAGE.name: module.STAGE
    for module in (download, prepare_teacher, train_tokenizer, tokenize, pretrain, sft, evaluate)
}
"""Every stage by name, each after the stages that feed it."""

RECIPE_FOLDER = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be read, or an override that does not fit; one line that says what and what to do."""


class Recipe(Config):
    """All stage configs and the seed."""

    name: str
    """As in `--recipe NAME`."""
    description: str = ""
    """What the recipe is for, one line."""
    seed: int = 0
    """Seed of every random choice; part of every action key."""
    download: download.DownloadConfig
    """Where images come from."""
    teacher: prepare_teacher.PrepareTeacherConfig
    """The frozen semantic encoder."""
    tokenizer: train_tokenizer.TrainTokenizerConfig
    """The image tokenizer and its training."""
    tokenize: tokenize.TokenizeConfig
    """Images to code tables."""
    pretrain: pretrain.PretrainConfig
    """The language model and its pretraining on both modalities."""
    sft: sft.SftConfig
    """Fine-tuning on understanding and generation."""
    evaluate: evaluate.EvaluateConfig
    """What is measured."""

    def section(self, stage: Stage[Any]) -> Any:
        """The config of a stage."""
        return getattr(self, stage.section)

    @model_validator(mode="after")
    def _check_templates(self) -> Recipe:
        """Here and not in the stages: hours of work come before the one that would find a wrong name."""
        known = [CAPTION, *self.download.columns]
        for field, template in self._templates():
            for name in names_in(template):
                if name not in known:
                    raise ValueError(
                        f"field {field!r} has value {template!r}: {unknown_name(name, known)}; download.extra_columns "
                        "says which columns are kept of the data"
                    )
        return self

    def _templates(self) -> Iterator[tuple[str, str]]:
        """Field and value of each template over the columns of the data."""
        yield "tokenizer.class_name", self.tokenizer.class_name
        for number, question in enumerate(self.sft.questions):
            yield f"sft.questions.{number}.question", question.question
            yield f"sft.questions.{number}.answer", question.answer
        for number, prompt in enumerate(self.sft.prompts):
            yield f"sft.prompts.{number}", prompt
        for name in ("question", "concept", "prompt"):
            yield f"evaluate.{name}", getattr(self.evaluate, name)


def available_recipes() -> list[str]:
    """Names of the recipes that ship with the project."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        name_or_path: a name of `available_recipes()`, or the path of a YAML file. A file with `extends: NAME` holds
            only what it changes of that recipe.
        overrides: `section.field=value` strings; values are read as YAML.

    Raises:
        RecipeError: unknown recipe, unreadable YAML, a field that does not exist or a value that does not fit.
    """
    path = _recipe_path(name_or_path)
    values = _read(path, ())
    values.setdefault("name", path.stem)
    for override in overrides or []:
        _apply(values, override)
    return validate_recipe(values, str(path))


def _recipe_path(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return path
    path = RECIPE_FOLDER / f"{name_or_path}.yaml"
    if not path.exists():
        raise RecipeError(
            f"unknown recipe {name_or_path!r}; the recipes are {', '.join(available_recipes())}; "
            f"or give the path of a YAML file"
        )
    return path


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a recipe file over those of the recipe that it extends."""
    if path in readers:
        raise RecipeError(f"recipe {path} extends itself; give `extends` the name of another recipe")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(
            f"cannot read recipe {path}: {' '.join(str(error).split())}; give a readable YAML file"
        ) from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path} is not a mapping of sections; see stages/recipes/mini.yaml")
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise RecipeError(f"recipe {path}: `extends` is {base!r}; give the name of one recipe, or a path")
    inherited = _read(_recipe_path(base), (*readers, path))
    inherited.pop("name", None)
    return _merged(inherited, values)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, section by section; lists and other values are replaced whole, `{}` empties a mapping."""
    merged = dict(base)
    for name, value in changes.items():
        nested = isinstance(value, dict) and value and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if nested else value
    return merged


def validate_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Build a recipe from plain values.

    Raises:
        RecipeError: naming the first field that does not fit, its value and what was expected.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_explain(error, where)) from error


def _apply(values: dict[str, Any], override: str) -> None:
    target, separator, text = override.partition("=")
    if not separator or not target:
        raise RecipeError(f"override {override!r} is not of the form section.field=value, for example sft.steps=200")
    *parents, leaf = target.split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"override {override!r}: {parent!r} is a value and has no fields")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: {text!r} is not a YAML value") from error


def _explain(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    field = ".".join(location)
    if first["type"] == "extra_forbidden":
        names = _field_names(location[:-1])
        close = difflib.get_close_matches(location[-1], names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(names)}"
        return f"{where}: unknown field {field!r}; {hint}"
    if first["type"] == "missing":
        return f"{where}: field {field!r} is missing; add it to the recipe"
    if not location:  # of several sections, which it names itself
        return f"{where}: {first['ctx']['error'] if 'error' in first.get('ctx', {}) else first['msg']}"
    if isinstance(first["input"], dict) and "error" in first.get("ctx", {}):  # of several fields, which it names itself
        return f"{where}: section {field!r}: {first['ctx']['error']}"
    reason = first["ctx"]["error"] if "error" in first.get("ctx", {}) else first["msg"].lower()
    return f"{where}: field {field!r} has value {first['input']!r}: {reason}"


def _field_names(location: list[str]) -> list[str]:
    """Fields of the config class at a location; a union's tag stands in the location as its own part."""
    classes: list[type[Config]] = [Recipe]
    for part in location:
        nested: list[type[Config]] = []
        for config_class in classes:
            info = config_class.model_fields.get(part)
            nested += _config_classes(info.annotation) if info else []
        classes = nested or classes
    return sorted({name for config_class in classes for name in config_class.model_fields})


def _config_classes(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [found for argument in getattr(annotation, "__args__", ()) for found in _config_classes(argument)]
