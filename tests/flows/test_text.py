"""Text of any source in tables and commands: one row a line, and nothing that a terminal would obey."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from flows.artifacts import diff_text, garbage_text, lineage_text
from flows.inspection import _cell, _facts, _first_rows, _Found, _histogram, _usage
from flows.report.page import _render
from flows.text import text_table
from stages.pipeline.errors import report
from stages.pipeline.execution import StageResult
from storage.code_table import CodeTable, CodeTableInfo
from storage.garbage import Collection
from storage.manifest import Manifest
from storage.store import Store
from tests.flows.conftest import InProcess

HOSTILE = "cat\x1b[2J\x1b]52;c;Y3VybA==\x07\n\u202egpj.exe\r\x9bhidden"
FORBIDDEN = set("\x1b\x07\x9b\r\u202e")


def hostile_manifest(store: Store) -> Manifest:
    manifest = Manifest(
        HOSTILE, 1, HOSTILE, {HOSTILE: HOSTILE}, {}, (store.put_bytes(b"1", "a"),), {HOSTILE: HOSTILE}, {}
    )
    store.commit("key", manifest)
    return manifest


def test_cells_are_on_one_line_and_columns_stay_aligned() -> None:
    first, _, *rows = text_table(["key", "caption"], [[HOSTILE, HOSTILE], ["b", "dog"]]).splitlines()
    assert len(rows) == 2 and rows[0].index("cat", 5) == first.index("caption") == rows[1].index("dog")
    assert not FORBIDDEN & set(rows[0]) and r"\x1b[2J" in rows[0] and r"\u202e" in rows[0]


def test_a_cell_is_cut_after_it_is_spelled_out() -> None:
    assert len(_cell("\x1b" * 100)) == len(_cell("x" * 100)) == 48


def test_inspect_shows_the_captions_of_a_table_and_obeys_none_of_them() -> None:
    info = CodeTableInfo((1, 1, 1, 1), (HOSTILE,), (4,), HOSTILE, {"text": HOSTILE})
    table = CodeTable(info, [HOSTILE], {HOSTILE: [HOSTILE], "caption": [None]}, np.zeros((1, 1, 1, 1, 1), np.uint8))
    found = _Found(pa.schema([pa.field(HOSTILE, pa.string())]), info, np.ones((1, 1, 4), np.int64), table, 1)
    manifest = Manifest("code_table", 1, "tokenize", {}, {}, (), {}, {})
    texts = [_first_rows(table), _facts(found, manifest), _usage(found), _histogram(found)]
    assert [len(text.splitlines()) for text in texts] == [3, 4, 3, 4]
    assert all("cat\\x1b[2J" in text and not FORBIDDEN & set(text) for text in texts)


@pytest.mark.parametrize("arguments", ["artifacts ls", "artifacts lineage {}", "artifacts show {}"])
def test_no_command_prints_what_a_terminal_obeys(arguments: str, command: InProcess, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    digest = hostile_manifest(store).digest
    done = command(*arguments.format(digest).split(), "--store", store.uri)
    assert done.code == 0 and digest[:12] in done.stdout
    assert not FORBIDDEN & set(done.stdout), done.stdout
    assert len(done.stdout.splitlines()) in (1, 3) or json.loads(done.stdout)["stage"] == HOSTILE


def test_the_recipe_in_the_record_of_a_run_is_printed_on_its_line(command: InProcess, tmp_path: Path) -> None:
    from tests.flows.test_cli import metrics_artifact

    store = Store(str(tmp_path / "store"))
    digest = metrics_artifact(store, tmp_path, 20.0, "key")
    store.record_run({"stage": "evaluate", "recipe": HOSTILE, "artifact": digest, "finished": HOSTILE})
    done = command("results", "--store", store.uri)
    assert done.code == 0 and done.stdout.startswith(r"recipe cat\x1b[2J") and not FORBIDDEN & set(done.stdout)
    assert digest[:12] in done.stdout.splitlines()[0]


def test_texts_about_artifacts_hold_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    from flows.stage_task import summary_markdown  # here: it loads Prefect, which the other tests do without

    store = Store(str(tmp_path / "store"))
    manifest = hostile_manifest(store)
    other = Manifest("thing", 1, "stage", {}, {}, (), {}, {})
    texts = [
        lineage_text(store, manifest.digest),
        diff_text(manifest, other),
        garbage_text(Collection([], [f"actions/{HOSTILE} is no action record"]), deleted=False),
        summary_markdown(StageResult("tokenize", "key", manifest, True, 0.25)),
    ]
    for text in texts:
        assert not FORBIDDEN & set(text), text
    assert len(texts[0].splitlines()) == 1 and len(texts[2].splitlines()) == 4


def test_an_error_about_somebodys_text_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(ValueError(f"sample {HOSTILE} cannot be used")) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and not FORBIDDEN & set(line) and line.startswith("musevl: sample cat\\x1b[2J")


def test_a_page_escapes_markup_and_spells_out_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.report.page._TEMPLATES", tmp_path)
    (tmp_path / "page.j2").write_text('<p title="{{ caption }}">{{ caption }}</p>{{ svg }}')
    from markupsafe import Markup

    page = _render("page.j2", caption=f'<script>"{HOSTILE}', svg=Markup("<svg></svg>"))
    assert "&lt;script&gt;&#34;cat" in page and "<script" not in page and page.endswith("<svg></svg>")
    assert not FORBIDDEN & set(page)
