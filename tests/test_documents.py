"""What the documents show works: recipes load, commands and options exist, links lead somewhere, drawings are true."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from flows.cli import app
from stages.pipeline.recipe import STAGES, load_recipe

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "infra").rglob("*.md"))]


def found(pattern: str) -> list[Any]:
    return [
        pytest.param(document, match[1], id=f"{document.name}-{match[1].split()[0][:20]}-{match.start()}")
        for document in DOCUMENTS
        for match in re.finditer(pattern, document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    ]


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


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_folders_and_modules_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"`((?:flows|stages|models|storage|infra|tests)/[^`]*)`", text)
    assert named and [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("folder", ["stages", "models"])
def test_the_architecture_names_every_package(folder: str) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = [path.parent.name for path in (ROOT / folder).glob("*/__init__.py")]
    assert packages and [name for name in packages if f"| `{folder}/{name}/` |" not in text] == []


def drawing(number: int) -> tuple[dict[str, str], set[tuple[str, str]]]:
    """Labels by node, and the arrows, of a drawing in the architecture."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = re.findall(r"```mermaid\nflowchart TD\n(.*?)```", text, re.DOTALL)[number].splitlines()
    node = r"(\w+)(?:\W*\"([^\"]*)\"\W*)?"
    found = [match for line in lines if (match := re.fullmatch(rf"\s*{node} --> {node}\s*", line))]
    assert len(found) == len(lines), "every line is one arrow"
    labels = {match[at]: match[at + 1] for match in found for at in (1, 3) if match[at + 1]}
    return labels, {(match[1], match[3]) for match in found}


def imports(folder: str, also: tuple[str, ...] = ()) -> set[tuple[str, str]]:
    """Which package or module directly in a folder, or folder beside it, imports which of that folder."""
    found = set[tuple[str, str]]()
    for path in (path for name in (folder, *also) for path in (ROOT / name).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        importer = parts[1] if parts[0] == folder else parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == folder:
                names = [*node.module.split(".")[1:2]] or [alias.name for alias in node.names]
                found |= {(importer, name) for name in names if name != importer}
    return found


@pytest.mark.parametrize(("number", "folder", "also"), [(0, "stages", ("flows",)), (1, "models", ())])
def test_arrows_between_packages_are_imports_and_all_imports_follow_them(
    number: int, folder: str, also: tuple[str, ...]
) -> None:
    labels, arrows = drawing(number)
    boxes = {name: node for node, label in labels.items() for name in re.findall(r"\w+", label.replace("<br>", " "))}
    found = {(boxes.get(one, one), boxes.get(other, other)) for one, other in imports(folder, also)}
    assert arrows <= found
    reached = set(arrows)
    for _ in range(len(arrows)):
        reached |= {(one, third) for one, other in reached for start, third in arrows if start == other}
    assert found <= reached


def test_the_way_of_an_image_has_the_inputs_of_each_stage() -> None:
    _, arrows = drawing(2)
    maker = {artifact: stage for stage, artifact in arrows if stage in STAGES}
    drawn = {name: {maker[one] for one, other in arrows if other == name and one in maker} for name in STAGES}
    assert drawn == {stage.name: set(stage.inputs) for stage in STAGES.values()}
