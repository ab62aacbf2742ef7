"""Recipes: each that ships loads, overrides reach their field, and mistakes are named with a way out."""

import json
from pathlib import Path

import pytest

from stages.pipeline.recipe import STAGES, load_recipe
from stages.pipeline.recipe_errors import RENAMED
from stages.pipeline.recipe_files import STAGE_NAMES, RecipeError, available_recipes


@pytest.mark.parametrize("name", available_recipes())
def test_shipped_recipes_load_and_say_what_they_are_for(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert all(recipe.section(stage) is not None for stage in STAGES.values())


def test_every_stage_comes_after_those_that_feed_it() -> None:
    seen: set[str] = set()
    for name, stage in STAGES.items():
        assert set(stage.inputs) <= seen
        seen.add(name)


def test_the_names_of_the_stages_are_known_without_importing_them() -> None:
    assert tuple(STAGES) == STAGE_NAMES


def test_an_override_changes_its_field_and_nothing_else() -> None:
    plain, changed = load_recipe("mini"), load_recipe("mini", ["tokenizer.quantizer.codebook_size=77", "seed=5"])
    assert changed.tokenizer.quantizer.codebook_size == 77
    assert changed.seed == 5
    quantizer = changed.tokenizer.quantizer.model_copy(
        update={"codebook_size": plain.tokenizer.quantizer.codebook_size}
    )
    tokenizer = changed.tokenizer.model_copy(update={"quantizer": quantizer})
    assert changed.model_copy(update={"tokenizer": tokenizer, "seed": plain.seed}) == plain


def test_override_values_are_yaml() -> None:
    recipe = load_recipe("mini", ["download.keep={category: [flags]}", "tokenize.views.flip=false"])
    assert recipe.download.keep == {"category": ("flags",)}
    assert recipe.tokenize.views.flip is False


def test_a_recipe_can_be_a_file_and_takes_its_name_from_it(tmp_path: Path) -> None:
    source = Path(__file__).parents[3] / "stages" / "recipes" / "mini.yaml"
    lines = [line for line in source.read_text().splitlines() if not line.startswith("name:")]
    (tmp_path / "mine.yaml").write_text("\n".join(lines))
    assert load_recipe(str(tmp_path / "mine.yaml")).name == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.setps=3", "unknown field 'sft.setps'; did you mean 'sft.steps'?"),
        ("tokenizer.quantizer.codebok_size=3", "did you mean 'tokenizer.quantizer.codebook_size'?"),
        ("sft.learning_rate=1", "unknown field 'sft.learning_rate'; did you mean 'sft.optimiser.learning_rate'?"),
        (
            "tokenizer.learning_rate=1",
            "did you mean 'tokenizer.optimiser.learning_rate' or 'tokenizer.discriminator_optimiser.learning_rate'?",
        ),
        ("sft.optimiser.steps=3", "unknown field 'sft.optimiser.steps'; did you mean 'sft.steps'?"),
        ("sft.codebook_size=3", "did you mean 'tokenizer.quantizer.codebook_size' or 'tokenizer.residual."),
        ("temprature=1", "unknown field 'temprature'; did you mean 'evaluate.sampling.temperature'?"),
        ("teacher.model.heads=3", "unknown field 'teacher.model.heads'; did you mean 'teacher.model.head'?"),
        ("teacher.model.pretrained=x", "kind 'backbone' has no such field, it is one of 'open_clip'"),
        ("teacher.model={kind: open_clop}", "field 'teacher.model.kind' has value 'open_clop': input should be "),
        ("teacher.model={kind: open_clop}", "; did you mean 'open_clip'?"),
        ("teacher.model={}", "field 'teacher.model.kind' is missing; it is one of 'backbone', "),
        ("sft.questions=[{question: a, anser: b}]", "did you mean 'sft.questions.0.answer'?"),
        ("tokenizr.steps=3", "unknown field 'tokenizr'; did you mean 'tokenizer'?"),
        ("sft.zzz=3", "unknown field 'sft.zzz'; the fields are "),
        ("sft.steps=many", "field 'sft.steps' has value 'many'"),
        ("sft.steps", "not of the form section.field=value"),
        ("=3", "not of the form section.field=value"),
        ("seed.deeper=3", "'seed' is a value and has no fields"),
        ("sft.steps=[1", "'[1' is not a YAML value"),
        ("sft.prompts=" + "[" * 5000, "stand more than 16 deep in each other"),
        ("sft.prompts=" + "[" * 17 + "]" * 17, "stand more than 16 deep in each other"),
        ("sft.steps=" + "9" * 4300, "field 'sft.steps' has value"),
    ],
)
def test_a_wrong_override_is_named_in_one_line(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("mini", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_field_that_was_renamed_is_answered_with_its_new_name(old: str, new: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown field '{old}'; its name is '{new}' now"):
        load_recipe("mini", [f"{old}=2"])
    load_recipe("mini", [f"{new}=2"])


@pytest.mark.parametrize(
    "name", ["../../x", "/tmp/x", "a/b", "a\\b", "..", ".hidden", "", " a", "a\nb", "a\x1b[2J", "a\u202eb", "x" * 101]
)
def test_the_name_of_a_recipe_is_a_file_name(name: str, tmp_path: Path) -> None:
    """The report's folder is called by it."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"extends: mini\nname: {json.dumps(name)}")
    with pytest.raises(
        RecipeError, match="field 'name' has value .*give a plain file name of at most 100 bytes"
    ) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match="field 'name'"):
        load_recipe("mini", [f"name={json.dumps(name)}"])


@pytest.mark.parametrize("name", ["my recipe (2)", "größe", "猫", "v1.5_a-b", "x" * 100])
def test_a_recipe_may_have_any_file_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_text("extends: mini")
    assert load_recipe(str(path)).name == name


@pytest.mark.parametrize("name", ["../recipes/mini", "../../stages/recipes/mini", "./mini", "mini\0"])
def test_the_name_of_a_recipe_to_read_is_no_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown recipe"):
        load_recipe(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"extends: {json.dumps(name)}")
    with pytest.raises(RecipeError, match="unknown recipe"):
        load_recipe(str(path))


def test_an_unknown_recipe_lists_those_that_exist() -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe 'minni'.*mini"):
        load_recipe("minni")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read recipe"),
        ("a: [1", "cannot read recipe"),
        ("- 1", "not a mapping"),
        ("sft: {}", "field 'download' is missing"),
        ("[" * 5000, "stand more than 16 deep in each other"),
        ("sft: " + "[" * 50 + "]" * 50, "stand more than 16 deep in each other"),
        ("sft: &a [*a]", "stand more than 16 deep in each other"),
        (
            "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"{x}: &{x} [{', '.join(['*' + chr(ord(x) - 1)] * 9)}]\n" for x in "bcdefg"),
            "holds more than 100000 values",
        ),
        (b"name: caf\xe9", "can't decode byte 0xe9"),
    ],
)
def test_a_broken_recipe_file_is_named_in_one_line(content: str | bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(str(path))
    assert "broken" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "sft.steps=0",
        "sft.batch_size=-1",
        "sft.generation_code_dropout=1.5",
        "sft.optimiser.learning_rate=0",
        "tokenize.num_workers=0",
        "tokenize.views.zoom=[0, 1]",
        "tokenize.views.count=-1",
        "evaluate.sampling.temperature=-1",
        "evaluate.sampling.guidance=-1",
        "evaluate.num_choices=1",
        "evaluate.max_rows=0",
        "sft.optimiser.betas=[0.9, 1]",
        "seed=-1",
    ],
)
def test_a_number_out_of_range_is_named_with_what_was_expected(override: str) -> None:
    field = override.partition("=")[0]
    with pytest.raises(RecipeError, match=rf"field '{field}.*' has value .*: input should be (greater|less) than"):
        load_recipe("tiny", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.device=tpu", "field 'sft.device' has value 'tpu': input should be 'auto', 'cpu' or 'cuda'"),
        ("teacher.device=gpu", "input should be 'auto', 'cpu' or 'cuda'"),
        ("evaluate.device=mps", "input should be 'auto', 'cpu' or 'cuda'"),
        ("sft.optimiser.learning_rate=.inf", "has value inf: input should be a finite number"),
        ("tokenizer.loss.l2_weight=.nan", "has value nan: input should be a finite number"),
        ("tokenizer.loss.l2_weight=1e39", "input should be a number that fits"),
        ("tokenizer.loss.adversarial_clamp=[2, 1]", "input should be the smaller and then the larger number"),
        ("tokenizer.loss.perceptual=vgg", "input should be 'lpips', 'backbone' or 'none'"),
        ("evaluate.sampling.temperature=1e-9", "input should be 0, or at least 0.001"),
        ("seed=99999999999999999999999", "field 'seed' has value 99999999999999999999999: input should be a number"),
    ],
)
def test_a_value_that_cannot_work_is_refused_when_the_recipe_is_read(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("mini", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_holds_what_it_changes_of_another(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: tiny\nsft: {steps: 7, prompts: [Paint.]}\n")
    (tmp_path / "again.yaml").write_text(f"extends: {tmp_path}/mine.yaml\nseed: 4\n")
    plain, mine, again = (load_recipe(str(name)) for name in ("tiny", tmp_path / "mine.yaml", tmp_path / "again.yaml"))
    assert mine.sft == plain.sft.model_copy(update={"steps": 7, "prompts": ("Paint.",)})
    assert mine.name == "mine" and mine.tokenizer == plain.tokenizer
    assert again.sft == mine.sft and again.seed == 4
    assert load_recipe(str(tmp_path / "again.yaml"), ["sft.steps=9"]).sft.steps == 9
    (tmp_path / "all.yaml").write_text("extends: tiny\ndownload: {keep: {}}\n")
    assert plain.download.keep and load_recipe(str(tmp_path / "all.yaml")).download.keep == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: nothing", "unknown recipe 'nothing'"),
        ("extends: [mini, tiny]", "give the name of one recipe"),
        ("extends: SELF", "extends itself"),
    ],
)
def test_a_recipe_that_extends_nothing_sound_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("SELF", str(path)))
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(path))
