"""A recipe: the configuration of every stage and the seed, in one YAML file, or in what it changes of another."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import NonNegativeInt, ValidationError, field_validator, model_validator

from models.config import Config
from stages.artifacts.templates import CAPTION, names_in, unknown_name
from stages.download import stage as download
from stages.evaluate import stage as evaluate
from stages.pipeline.recipe_files import RecipeError, recipe_path, recipe_values
from stages.prepare_teacher import stage as prepare_teacher
from stages.pretrain import stage as pretrain
from stages.protocol import Stage
from stages.sft import stage as sft
from stages.tokenize import stage as tokenize
from stages.train_tokenizer import stage as train_tokenizer

STAGES: dict[str, Stage[Any]] = {
    module.STAGE.name: module.STAGE
    for module in (download, prepare_teacher, train_tokenizer, tokenize, pretrain, sft, evaluate)
}
"""Every stage by name, each after the stages that feed it."""

_LONGEST_VALUE = 100
"""Characters of a value in an error."""
_LONGEST_NAME = 100


class Recipe(Config):
    """All stage configs and the seed."""

    name: str
    """As in `--recipe NAME`; the report's folder is called by it."""
    description: str = ""
    """What the recipe is for, one line."""
    seed: NonNegativeInt = 0
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

    @field_validator("name")
    @classmethod
    def _is_file_name(cls, name: str) -> str:
        plain = name.isprintable() and not set(name) & set("/\\") and name == name.strip()
        if not plain or not name or name.startswith(".") or len(name.encode()) > _LONGEST_NAME:
            raise ValueError(
                f"give a plain file name of at most {_LONGEST_NAME} bytes, without '/' and '\\' and no '.' in front"
            )
        return name

    def section(self, stage: Stage[Any]) -> Any:
        """The config of a stage."""
        return getattr(self, stage.section)

    @model_validator(mode="after")
    def _check_templates(self) -> Recipe:
        """Here and not in the stages: hours of work come before the one that would find a wrong name."""
        known = [CAPTION, *self.download.columns]
        category = self.evaluate.category_column
        if "category_column" in self.evaluate.model_fields_set and category not in self.download.columns:
            raise ValueError(
                f"field 'evaluate.category_column' has value {category!r}: {unknown_name(category, known[1:])}; "
                "download.extra_columns says which columns are kept of the data"
            )
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


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        name_or_path: a name of `available_recipes()`, or the path of a YAML file. A file with `extends: NAME` holds
            only what it changes of that recipe.
        overrides: `section.field=value` strings; values are read as YAML.

    Raises:
        RecipeError: unknown recipe, unreadable YAML, a field that does not exist or a value that does not fit.
    """
    return validate_recipe(recipe_values(name_or_path, overrides), str(recipe_path(name_or_path)))


def validate_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Build a recipe from plain values.

    Raises:
        RecipeError: naming the first field that does not fit, its value and what was expected.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_explain(error, where)) from error


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
    problem = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    value = repr(first["input"])
    shown = value if len(value) <= _LONGEST_VALUE else value[:_LONGEST_VALUE] + "..."
    return f"{where}: field {field!r} has value {shown}: {problem[:1].lower()}{problem[1:]}"


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
