"""Templates name columns, and are no other language."""

from __future__ import annotations

import pytest

from stages.artifacts.templates import fill, fill_row, names_in
from stages.pipeline.recipe import RecipeError, load_recipe
from tests.helpers.tiny import CAPTIONS_ONLY

FIELDS = {"text": "a fox", "Image Size": "large", "a.b": "ab", "braces": "{caption} {0}"}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Draw {caption}.", "Draw a fox."),
        ("{Image Size}, {a.b}", "large, ab"),
        ("{{caption}} is {caption}", "{caption} is a fox"),
        ("{braces}", "{caption} {0}"),
        ("no names", "no names"),
    ],
)
def test_a_template_is_filled_with_columns(template: str, expected: str) -> None:
    assert fill_row(template, FIELDS) == expected


@pytest.mark.parametrize("name", ["caption.foo", "caption:999999999", "caption!r", "caption[0]", "0", "captions"])
def test_nothing_but_a_columns_name_stands_in_braces(name: str) -> None:
    with pytest.raises(ValueError, match=r"there is no column .*it can name Image Size, a.b"):
        fill(f"Draw {{{name}}}.", FIELDS)


@pytest.mark.parametrize(
    ("template", "message"), [("a {b", "is unmatched"), ("a }", "is unmatched"), ("{}", "names no")]
)
def test_a_template_that_cannot_be_read_says_what_to_write(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*write"):
        names_in(template)


CASES = [
    ("tokenizer.class_name", "{}"),
    ("evaluate.question", "{}"),
    ("evaluate.concept", "{}"),
    ("evaluate.prompt", "{}"),
    ("sft.prompts", "[{}]"),
    ("sft.questions", "[{{question: {}, answer: x}}]"),
    ("sft.questions", "[{{question: x, answer: {}}}]"),
]


@pytest.mark.parametrize(("field", "shape"), CASES)
@pytest.mark.parametrize("name", ["caption.foo", "caption:999999999", "nosuch"])
def test_a_wrong_template_is_refused_when_the_recipe_is_read(field: str, shape: str, name: str) -> None:
    template = f'"Draw {{{name}}}."'
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny", [f"{field}={shape.format(template)}"])
    message = str(caught.value)
    assert f"field '{field}" in message and repr(template[1:-1]) in message and f"no column '{name}'" in message
    assert "it can name caption, category, concept, split, style, subcategory; download.extra_columns says" in message
    assert "\n" not in message


@pytest.mark.parametrize("template", ["{choice.foo}", "{choice:99}", "{caption}", "{choice"])
def test_an_answer_names_its_choice_alone(template: str) -> None:
    with pytest.raises(RecipeError, match=r"field 'evaluate.answer' has value .*(it can name choice|write \{\{)"):
        load_recipe("tiny", [f'evaluate.answer="{template}"'])


def test_a_wrong_category_column_is_refused_and_the_usual_one_may_lack() -> None:
    with pytest.raises(RecipeError, match=r"'evaluate.category_column' has value 'catgory': there is no column"):
        load_recipe("tiny", ["evaluate.category_column=catgory"])
    assert load_recipe("tiny", list(CAPTIONS_ONLY)).evaluate.category_column == "category"


def test_columns_of_any_name_are_known_to_the_recipe() -> None:
    columns = "download.extra_columns=[concept, category, split, style, subcategory, Image Size, a.b]"
    recipe = load_recipe("tiny", [columns, 'sft.prompts=["{Image Size} {a.b} {{x}}"]'])
    assert recipe.sft.prompts == ("{Image Size} {a.b} {{x}}",)
    without = [columns.replace("split, ", ""), "download.held_out_fraction=0.5", 'evaluate.prompt="{split}"']
    assert load_recipe("tiny", without).evaluate.prompt == "{split}"
