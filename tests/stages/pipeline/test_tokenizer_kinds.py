"""The section `tokenizer` has the fields of its kind; a recipe's kind can be changed over another recipe."""

from pathlib import Path

import pytest

from flows.report.comparison import VARIANTS, overrides_of
from models.tokenizers.kinds import KINDS
from stages.pipeline.recipe import load_recipe
from stages.pipeline.recipe_files import RecipeError, available_recipes
from stages.pipeline.tokenizer_kinds import CLASSES
from stages.protocol import normalised_config


def test_every_kind_has_a_section_and_all_but_given_codes_a_tokenizer() -> None:
    assert set(CLASSES) == {*KINDS, "external"}
    for kind, tokenizer in KINDS.items():
        assert issubclass(CLASSES[kind], tokenizer.config_class)


@pytest.mark.parametrize("recipe", available_recipes())
@pytest.mark.parametrize("kind", [*KINDS, *VARIANTS, "external=folder"])
def test_a_comparison_can_take_any_kind_of_any_recipe(recipe: str, kind: str) -> None:
    given = ["tokenizer.residual.commitment_weight=0.5", "tokenizer.image_weight=0.5", "sft.steps=9"]
    loaded = load_recipe(recipe, overrides_of(kind, 3, given))
    assert (loaded.seed, loaded.sft.steps) == (3, 9)
    assert loaded.tokenizer.kind == kind.partition("=")[0].partition("-")[0]
    key = normalised_config(loaded.tokenizer)
    assert ("residual" in key) == (loaded.tokenizer.kind in ("dualtoken", "vila_u"))
    assert key.get("image_weight") == (0.5 if loaded.tokenizer.kind == "sde" else None)
    if "residual" in key:
        assert key["residual"]["commitment_weight"] == 0.5


def test_what_a_recipe_says_of_a_kind_holds_where_it_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "extends: mini\ntokenizer: {kinds: {dualtoken: {residual: {depth: 3}}, vila_u: {steps: 5}}}"
    )
    mine = str(tmp_path / "mine.yaml")
    assert load_recipe(mine).tokenizer == load_recipe("mini").tokenizer
    dualtoken = load_recipe(mine, ["tokenizer.kind=dualtoken"]).tokenizer
    assert (dualtoken.residual.depth, dualtoken.residual.code_dim) == (3, 16), "over the one of `mini`"
    assert dualtoken.pixel_layers == (4, 3) and dualtoken.steps == 900
    assert load_recipe(mine, ["tokenizer.kind=vila_u"]).tokenizer.steps == 5
    later = ["tokenizer.residual.depth=4", "tokenizer.kind=dualtoken"]
    assert load_recipe(mine, later).tokenizer.residual.depth == 4, "a later layer counts, whatever stands in it"
    later = ["tokenizer.kind=dualtoken", "tokenizer.kinds.dualtoken.residual.depth=5"]
    assert load_recipe(mine, later).tokenizer.residual.depth == 5
    later = ["tokenizer.kinds.vqgan={steps: 6}", "tokenizer.kind=vqgan"]
    assert load_recipe(mine, later).tokenizer.steps == 6


def test_of_an_earlier_kind_nested_fields_are_left_out_too() -> None:
    pooled = "tokenizer.loss.pooled_weight=1"
    assert load_recipe("mini", [pooled]).tokenizer.loss.pooled_weight == 1
    loss = load_recipe("mini", [pooled, "tokenizer.loss.l1_weight=2", "tokenizer.kind=vqgan"]).tokenizer.loss
    assert loss.l1_weight == 2 and not hasattr(loss, "pooled_weight")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["tokenizer.residual.depth=3"],
            "unknown field 'tokenizer.residual'; kind 'sde' has no such field, it is one ",
        ),
        (["tokenizer.residual.depth=3"], "one of 'dualtoken' and 'vila_u'"),
        (["tokenizer.kind=vqgan", "tokenizer.image_weight=1"], "kind 'vqgan' has no such field, it is one of 'sde'"),
        (["tokenizer.kind=vqgan", "tokenizer.loss.pooled_weight=1"], "unknown field 'tokenizer.loss.pooled_weight'"),
        (
            ["tokenizer.setps=3", "tokenizer.kind=vqgan"],
            "unknown field 'tokenizer.setps'; did you mean 'tokenizer.steps'",
        ),
        (["tokenizer.kind=vqgam"], "field 'tokenizer.kind' has value 'vqgam': input should be 'vqgan', "),
        (["tokenizer.kind=vqgam"], "; did you mean 'vqgan'?"),
        (["tokenizer.kind=[vqgan]"], "field 'tokenizer.kind' has value"),
        (["tokenizer={steps: 3}"], "field 'tokenizer.kind' is missing; it is one of 'vqgan', "),
        (["tokenizer=3"], "'tokenizer"),
        (["tokenizer.kind=external"], "field 'tokenizer.codes' is missing"),
        (["tokenizer.kinds=3"], "tokenizer.kinds is 3; give a mapping"),
        (["tokenizer.kinds.vqgan=3"], "tokenizer.kinds.vqgan is 3; give a mapping"),
        (["tokenizer.kinds.vqgam={}"], "names 'vqgam', which is no kind of tokenizer; did you mean 'vqgan'?"),
        (["tokenizer.kinds.dualtoken.residul={}"], "tokenizer.kinds.dualtoken: unknown field 'residul'; did you mean "),
        (
            ["tokenizer.kinds.dualtoken.residual.depth=0"],
            "tokenizer.kinds.dualtoken: field 'residual.depth' has value 0",
        ),
        (["tokenizer.kinds.vqgan.residual={}"], "tokenizer.kinds.vqgan: unknown field 'residual'"),
    ],
)
def test_a_field_of_another_kind_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("mini", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_kind_is_not_refused_for_what_all_kinds_are_told() -> None:
    load_recipe("mini", ["tokenizer.kinds.tokenflow={semantic_code_dim: 4}", "tokenizer.quantizer.l2_normalised=false"])
