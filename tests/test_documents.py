"""What the documents show works: recipes load, commands and their options exist, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from flows.cli import app
from stages.pipeline.recipe import STAGES, load_recipe

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "infra").rglob("*.md"))]


def found(pattern: str) -> Iterator[Any]:
    for document in DOCUMENTS:
        for match in re.finditer(pattern, document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            yield pytest.param(document, match[1], id=f"{document.name}-{match[1].split()[0][:20]}-{match.start()}")


@pytest.mark.parametrize(("document", "text"), found(r"```yaml\n(.*?)```"))
def test_a_recipe_that_is_shown_loads(document: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    load_recipe(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize(("document", "block"), found(r"```sh\n(.*?)```"))
def test_commands_that_are_shown_exist_with_their_options(document: Path, block: str) -> None:
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["musevl"]:
            check_command(document, words[1:])


def check_command(document: Path, words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands, f"{document.name}: musevl {name}"
        command = command.commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, "--help")}
    assert {word.split("=")[0] for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize(("document", "target"), found(r"\]\(([^)#:]+)(?:#[^)]*)?\)"))
def test_a_link_leads_to_a_file(document: Path, target: str) -> None:
    assert (document.parent / target).exists()


def test_the_changelog_has_the_version_of_each_stage() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("## Stage versions")[1].splitlines()
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert {row[0]: int(row[-1]) for row in cells} == {stage.name: stage.version for stage in STAGES.values()}
