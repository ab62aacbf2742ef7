"""A recipe: the configuration of every stage and the seed, in one YAML file that may extend another recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, ValidationError, field_validator, model_validator

from models.config import Config
from stages.artifacts.templates import CAPTION, names_in, unknown_name
from stages.download import stage as download
from stages.evaluate import stage as evaluate
from stages.pipeline.recipe_errors import explain, worst
from stages.pipeline.recipe_files import RecipeError, recipe_layers, recipe_path
from stages.pipeline.tokenizer_kinds import check_kinds, with_kind_resolved
from stages.prepare_teacher import stage as prepare_teacher
from stages.pretrain import stage as pretrain
from stages.protocol import RuntimeStr, Stage
from stages.sft import stage as sft
from stages.tokenize import stage as tokenize
from stages.train_tokenizer import stage as train_tokenizer

STAGES: dict[str, Stage[Any]] = {
    module.STAGE.name: module.STAGE
    for module in (download, prepare_teacher, train_tokenizer, tokenize, pretrain, sft, evaluate)
}
"""Every stage by name, each after the stages that feed it."""

_LONGEST_NAME = 100


class Recipe(Config):
    """The configs of all stages, and the seed."""

    name: RuntimeStr
    """Name of the recipe, as in `--recipe NAME`; the report's folder has the same name."""
    description: RuntimeStr = ""
    """Purpose of the recipe, on one line."""
    seed: NonNegativeInt = 0
    """Seed of all random choices, which enters every action key."""
    download: download.DownloadConfig
    """The source of the images, and how they are fetched and filtered."""
    teacher: prepare_teacher.PrepareTeacherConfig
    """The frozen semantic encoder."""
    tokenizer: Annotated[train_tokenizer.TokenizerSection, Field(discriminator="kind")]
    """The image tokenizer and its training."""
    tokenize: tokenize.TokenizeConfig
    """The encoding of images into code tables."""
    pretrain: pretrain.PretrainConfig
    """The language model and its pretraining on image-text pairs."""
    sft: sft.SftConfig
    """Fine-tuning on understanding and generation."""
    evaluate: evaluate.EvaluateConfig
    """The evaluation's questions, prompts and metrics."""

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
        """Return the config of a stage."""
        return getattr(self, stage.section)

    @model_validator(mode="after")
    def _check_templates(self) -> Recipe:
        """Check the names in templates before any stage runs, since the stage that uses them may come hours later."""
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
        """Yield the field and the value of each template over the columns of the data."""
        if isinstance(self.tokenizer, train_tokenizer.TrainTokenizerConfig):
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
    layers, where = recipe_layers(name_or_path, overrides), str(recipe_path(name_or_path))
    recipe = validate_recipe(with_kind_resolved(layers), where)
    check_kinds(layers, where)
    return recipe


def validate_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Build a recipe from plain values.

    Raises:
        RecipeError: naming the first field that does not fit, its value and what was expected.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(explain(worst(error), Recipe, where)) from error
