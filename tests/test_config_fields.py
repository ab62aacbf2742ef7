"""Every field of a recipe says what it is and is read somewhere; every recipe that ships loads."""

import inspect
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from mypy.build import build
from mypy.find_sources import create_source_list
from mypy.nodes import MemberExpr
from mypy.options import Options
from mypy.plugin import AttributeContext, Plugin
from mypy.types import Type
from pydantic import ValidationError

from models.config import Config
from stages.pipeline.recipe import STAGES, Recipe, load_recipe
from stages.pipeline.recipe_files import RecipeError, available_recipes

ROOT = Path(__file__).parents[1]
READ_AS = {"EvaluateConfig": ["stages.evaluate.tasks.TaskConfig"]}
"""Protocols through which a config is read."""
PACKAGES = ("flows", "stages", "models", "storage", "infra")


def config_classes(root: type[Config]) -> list[type[Config]]:
    """A config class and all that its fields can hold, through unions, lists and dicts, and their subclasses.

    Classes that other tests define are left out.
    """
    found: list[type[Config]] = []

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, Config):
            if annotation in found or annotation.__module__.split(".")[0] not in PACKAGES:
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


class ReadAttributes(Plugin):
    """Notes every attribute that is read, by the class that mypy finds to be the owner of its object."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.found: set[str] = set()

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type]:
        def note(context: AttributeContext) -> Type:
            if isinstance(
                context.context, MemberExpr
            ):  # else it is a declaration; configs are frozen, so nothing assigns
                self.found.add(fullname)
            return context.default_attr_type

        return note


def attributes_read(*paths: Path) -> set[str]:
    """`module.Class.name` of every attribute that sources read; what other packages are made of is not looked at."""
    options = Options()
    options.follow_imports, options.ignore_missing_imports = "skip", True
    options.incremental, options.cache_dir = False, os.devnull
    options.check_untyped_defs = True
    reads = ReadAttributes(options)
    build(create_source_list([str(path) for path in paths], options), options, extra_plugins=[reads])
    return reads.found


@pytest.fixture(scope="module")
def read() -> set[str]:
    return attributes_read(*(ROOT / name for name in PACKAGES))


def is_read(config_class: type[Config], name: str, read: set[str]) -> bool:
    """Whether anything reads a field of a class, as one of this class or of one that it inherits from."""
    if config_class is Recipe and name in {stage.section for stage in STAGES.values()}:
        return True  # by `Recipe.section`
    if name == "kind" and len(get_args(config_class.model_fields[name].annotation)) == 1:
        return True  # by pydantic, to tell the classes of a section apart
    owners = [f"{owner.__module__}.{owner.__qualname__}" for owner in config_class.__mro__]
    owners += READ_AS.get(config_class.__name__, [])
    return any(f"{owner}.{name}" in read for owner in owners)


@pytest.mark.parametrize(("config_class", "name"), list(fields()))
def test_field_is_described_and_read(config_class: type[Config], name: str, read: set[str]) -> None:
    assert config_class.model_fields[name].description, "add a one-line docstring below the field"
    assert is_read(config_class, name, read), "nothing reads this field; use it or remove it"


def test_an_attribute_of_the_same_name_on_another_class_is_no_read(tmp_path: Path) -> None:
    (tmp_path / "sample.py").write_text(
        "class Base:\n    seen: int = 1\n    path: str = ''\n"
        "class Config(Base):\n    steps: int = 1\n    kind: str = ''\n    count: int = 2\n"
        "class Other:\n    kind: str = ''\n    steps: int = 3\n    path: str = ''\n"
        "def use(config: Config, other: Other, anything) -> None:\n"
        "    print(config.seen, other.kind, other.path, other.steps, anything.kind, anything.steps)\n"
    )
    found = {name for name in attributes_read(tmp_path) if "sample" in name}
    assert {name.split("sample.")[1] for name in found} == {"Base.seen", "Other.kind", "Other.path", "Other.steps"}


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


FREE_TEXTS = {
    "Recipe.name": "a file name, checked as one",
    "Recipe.description": "prose",
    "DownloadConfig.url_list": "a path, an address or `sample`",
    "DownloadConfig.url_column": "a column of the user's data",
    "DownloadConfig.caption_column": "a column of the user's data",
    "DownloadConfig.extra_columns": "columns of the user's data",
    "DownloadConfig.keep": "columns of the user's data and their values",
    "WebDatasetFiles.path": "a path",
    "ParquetFiles.path": "a path",
    "ParquetFiles.image_column": "a column of the user's data",
    "FolderFiles.path": "a path",
    "FolderFiles.captions": "a path",
    "FolderFiles.file_column": "a column of the user's data",
    "ConversationFiles.path": "a path",
    "ConversationFiles.image_folder": "a path",
    "HttpConfig.private_hosts": "host names with ports, checked as such",
    "HttpConfig.opt_out_directives": "words of a header that others define",
    "HttpConfig.user_agent_token": "a name of the user's own",
    "BackboneTeacherConfig.architecture": "a name of timm, which grows",
    "BackboneTeacherConfig.weights": "a path, or one of two words; anything else is looked for as a file",
    "OpenClipTeacherConfig.name": "a name of open_clip or of a hub",
    "OpenClipTeacherConfig.pretrained": "a tag of open_clip or a path",
    "TransformersTeacherConfig.path": "a name of a hub or a path",
    "LoopConfig.tensorboard": "a path",
    "LossConfig.lpips_vgg_weights": "a path",
    "ExternalCodesConfig.codes": "a path",
    "TrainTokenizerConfig.weights": "a path",
    "TrainTokenizerConfig.inception_weights": "a path",
    "TrainTokenizerConfig.class_name": "a template, checked as one",
    "LlmConfig.base": "`small`, a name of a hub or a path",
    "PretrainConfig.extra_texts": "prose",
    "QuestionTemplate.question": "a template, checked as one",
    "QuestionTemplate.answer": "a template, checked as one",
    "SftConfig.prompts": "templates, checked as such",
    "EvaluateConfig.question": "a template, checked as one",
    "EvaluateConfig.answer": "a template, checked as one",
    "EvaluateConfig.concept": "a template, checked as one",
    "EvaluateConfig.category_column": "a column of the user's data, checked against download.extra_columns",
    "EvaluateConfig.prompt": "a template, checked as one",
    "EvaluateConfig.inception_weights": "a path",
    "EvaluateConfig.lpips_vgg_weights": "a path",
}
"""Fields whose values no list can hold, by the class that declares them, and why. All other text is a choice."""


def declaring(config_class: type[Config], name: str) -> str:
    """A field under the name of the class that declares it last."""
    owner = next(base for base in config_class.__mro__ if name in inspect.get_annotations(base))
    return f"{owner.__name__}.{name}"


def holds_text(annotation: Any) -> bool:
    """Whether a field takes any text: `str`, not the values of a Literal."""
    if get_origin(annotation) is Literal:
        return False
    return annotation is str or any(holds_text(argument) for argument in getattr(annotation, "__args__", ()))


def text_fields() -> set[str]:
    return {
        declaring(config_class, name)
        for config_class in config_classes(Recipe)
        for name, info in config_class.model_fields.items()
        if holds_text(info.annotation)
    }


@pytest.mark.parametrize("field", sorted(text_fields() | set(FREE_TEXTS)))
def test_a_text_is_one_of_listed_choices_unless_it_is_said_why_not(field: str) -> None:
    assert field in text_fields(), "no such field takes any text; take it out of FREE_TEXTS"
    assert field in FREE_TEXTS, "make it a Literal of the values that it can have, or say in FREE_TEXTS why not"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenize.precision=fp16", "input should be 'auto', 'bf16' or 'fp32'"),
        ("tokenizer.loss.perceptual=lpip", "input should be 'lpips', 'backbone' or 'none'"),
        ("evaluate.num_choices=0", "input should be greater than or equal to 2"),
        ("tokenizer.kinds.vila_u.residual.l2_normalised=true", "input should be False"),
        ("tokenizer.conv.channel_multipliers=[]", "should have at least 1 item"),
        ("teacher.model.feature_blocks=[]", "should have at least 1 item"),
        ("tokenizer.semantic_decoder.heads=5", "width=32 cannot be divided equally among heads=5"),
        ("pretrain.visual.heads=5", "width=32 cannot be divided equally among heads=5"),
        ("pretrain.llm.num_heads=5", "hidden_size=64 does not give each of num_heads=5"),
        ("tokenize.gpus_per_worker=1.5", "0 to 1, or a whole number"),
        ("download.http.private_hosts=[localhost]", "input should be a host and its port"),
        ("download.filters={min_caption_characters: 9, max_caption_characters: 3}", "is larger than"),
        ("sft.questions=[]", "questions has none with a weight above 0"),
        ("sft.prompts=[]", "prompts is empty"),
        ("sft={understanding_weight: 0, generation_weight: 0}", "are both 0"),
    ],
)
def test_a_value_that_cannot_work_is_refused_when_the_recipe_is_read(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe("tiny", [override])


@pytest.mark.parametrize("name", available_recipes())
def test_recipe_loads(name: str) -> None:
    assert load_recipe(name).name == name
