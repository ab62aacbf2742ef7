"""`musevl fields` and `docs/reference.md` say what the config classes hold, without importing them."""

import subprocess
import sys

import pytest

from flows.cli import run_command
from stages.pipeline.describe_fields import PAGE, describe_fields
from stages.pipeline.field_reference import COMMAND, FILE, FieldDescription, fields_json, reference_page
from stages.pipeline.recipe import Recipe
from stages.pipeline.recipe_errors import fields_below


@pytest.fixture(scope="module")
def described() -> list[FieldDescription]:
    return describe_fields()


@pytest.fixture(scope="module")
def by_path(described: list[FieldDescription]) -> dict[str, FieldDescription]:
    return {field.path: field for field in described}


def test_the_written_descriptions_are_those_of_the_classes(described: list[FieldDescription]) -> None:
    assert FILE.read_text(encoding="utf-8") == fields_json(described), f"run `{COMMAND}`"
    assert PAGE.read_text(encoding="utf-8") == reference_page(described), f"run `{COMMAND}`"


def test_every_field_is_described(described: list[FieldDescription]) -> None:
    assert {field.path.replace(".N.", ".") for field in described} == set(fields_below(Recipe))
    assert all(field.meaning and field.type for field in described)


@pytest.mark.parametrize(
    ("path", "type_", "default", "identity"),
    [
        ("seed", "whole number from 0", "0", True),
        ("name", "text", None, False),
        ("sft.optimiser.learning_rate", "number above 0", "0.0001", True),
        ("sft.optimiser.betas", "list of 2: number from 0 and below 1, number from 0 and below 1", "[0.9, 0.95]", True),
        ("sft.optimiser.gradient_clip", "number above 0, or `null`", "1.0", True),
        ("teacher.optimiser.weight_decay", "number from 0", "0.01 (0.0001)", True),
        ("teacher.model.feature_blocks", "list of whole number from 0, at least 1", "[4, 6]", True),
        ("tokenize.precision", "`auto`, `bf16` or `fp32`", '"auto"', True),
        ("tokenize.num_workers", "whole number from 1", "1", False),
        ("tokenize.min_caption_match", "number from -1 to 1, or `null`", "null", True),
        ("tokenizer.transform.background", "list of 3: " + ", ".join(["whole number from 0 to 255"] * 3), None, True),
        ("download.http.max_redirects", "whole number from 0", "5", False),
        ("download.keep", "mapping of text to list of text", "{}", True),
        ("download.files.path", "text", None, False),
        ("sft.questions.N.weight", "number from 0", "1.0", True),
        ("evaluate.sampling.top_p", "number from 0 to 1", "1.0", True),
    ],
)
def test_types_ranges_and_defaults_are_in_plain_words(
    by_path: dict[str, FieldDescription], path: str, type_: str, default: str | None, identity: bool
) -> None:
    field = by_path[path]
    assert (field.type, field.identity) == (type_, identity)
    assert default is None or field.default == default


def test_fields_of_some_kinds_say_of_which(described: list[FieldDescription]) -> None:
    kinds = {field.path: field.kinds for field in described}
    assert kinds["tokenizer.image_weight"] == "sde"
    assert kinds["tokenizer.residual.depth"] == "dualtoken, vila_u"
    assert kinds["teacher.model.pretrained"] == "open_clip"
    assert kinds["tokenizer.steps"] == "all but external"
    layers = [(field.kinds, field.default) for field in described if field.path == "tokenizer.semantic_layer"]
    assert layers == [("dualtoken", "26"), ("vila_u", "null")]
    (kind,) = (field for field in described if field.path == "tokenizer.kind")
    assert kind.kinds == "" and "`vqgan`" in kind.type and "`external`" in kind.type


def test_a_default_that_is_written_means_itself(described: list[FieldDescription]) -> None:
    """Defaults are YAML: 1e-05 would be a text there."""
    import yaml

    for field in described:
        if field.type.startswith("number") and field.default:
            shown = field.default.partition(" ")[0]
            assert yaml.safe_load(shown) is None or isinstance(yaml.safe_load(shown), (int, float)), field


def test_fields_prints_a_field_a_section_and_the_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["fields", "sft.optimiser.learning_rate"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "sft.optimiser.learning_rate",
        "    number above 0; default 0.0001; part of the result's identity",
        "    Peak learning rate.",
    ]
    assert run_command(["fields", "sft.optimiser"]) == 0
    assert "sft.optimiser.warmup_steps" in (shown := capsys.readouterr().out) and "sft.steps" not in shown
    assert run_command(["fields", "tokenizer"]) == 0
    assert "tokenizer.image_weight  (kind sde)" in capsys.readouterr().out
    assert run_command(["fields"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{section}\n" in f"\n{shown}" for section in Recipe.model_fields)
    assert "sft.steps" not in shown


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("sft.learning_rate", "did you mean 'sft.optimiser.learning_rate'?"),
        ("sft.optimizer", "did you mean 'sft.optimiser'"),
        ("qqq", "the sections are "),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest(
    path: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["fields", path]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.processes
def test_fields_imports_neither_pytorch_nor_the_config_classes() -> None:
    code = (
        "import sys; from flows.cli import run_command; code = run_command(['fields', 'sft.optimiser']); "
        "assert not {'torch', 'pyarrow', 'ray', 'stages.pipeline.recipe'} & set(sys.modules), sorted(sys.modules); "
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sft.optimiser.learning_rate" in done.stdout
