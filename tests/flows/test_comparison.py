"""`musevl compare-tokenizers`: real pipelines of the tiny recipe, and the tables made of their metrics; every kind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.report.comparison import VARIANTS, Comparison, Run, column_of, overrides_of, spread
from infra.executors import LocalExecutor
from models.tokenizers.kinds import KINDS
from stages.metrics.catalogue import CATALOGUE, Metric, metric_of
from stages.pipeline.execution import run_stage
from stages.pipeline.recipe import load_recipe
from storage.code_table import read_code_table
from storage.manifest import Manifest
from storage.store import Store
from storage.tables import read_table
from tests.flows.conftest import Command, InProcess
from tests.helpers.external import write_codes
from tests.helpers.tiny import TinyRun


def run_of(kind: str, seed: int, accuracy: float) -> Run:
    own: dict[str, Any] = {"model": kind, "role": "ours", "benchmark": "understanding", "split": "test"}
    own |= {"metric": "accuracy", "qualifier": "same_category", "num_samples": 10, "settings": {}}
    other = own | {"model": "teacher", "role": "ceiling", "value": 0.99}
    manifest = Manifest(
        kind="evaluation",
        schema_version=1,
        stage="evaluate",
        config={},
        inputs={},
        files=(),
        metrics={},
        metadata={"kind": kind, "seed": seed},
    )
    return Run(kind, seed, manifest, [other, own | {"value": accuracy}])


def test_the_gap_is_taken_seed_by_seed() -> None:
    scores = {("vqgan", 0): 0.5, ("sde", 0): 0.6, ("vqgan", 1): 0.7, ("sde", 1): 0.9}
    runs = [run_of(kind, seed, score) for (kind, seed), score in scores.items()]
    comparison = Comparison("mini", ["vqgan", "sde"], [0, 1], runs)
    header, (vqgan, sde) = comparison.header, comparison.tables()[0][1]
    assert dict(zip(header, vqgan, strict=True)) | {"same category %": "60.0 ± 14.1", "over vqgan": ""} == dict(
        zip(header, vqgan, strict=True)
    )
    cells = dict(zip(header, sde, strict=True))
    assert (cells["same category %"], cells["over vqgan"], cells["published"]) == ("75.0 ± 21.2", "+15.0 ± 7.1", "60.8")
    assert len(header) == 4, "no column shows what was not measured"
    assert len(comparison.tables()) == 1, "without the semantic branch alone there is no ablation"


def test_a_metric_that_has_a_heading_in_the_catalogue_has_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    new = Metric("mae", "Mean absolute error.", direction="lower", form=".3f", columns={"": "MAE"})
    monkeypatch.setitem(CATALOGUE, "mae", new)  # type: ignore[arg-type]
    run = run_of("sde", 0, 0.5)
    run.rows.append(run.rows[1] | {"benchmark": "reconstruction", "metric": "mae", "qualifier": "", "value": 0.25})
    comparison = Comparison("mini", ["sde"], [0], [run])
    (line,) = comparison.tables()[0][1]
    assert (comparison.header[-1], line[-1]) == ("MAE", "0.250")


def test_published_numbers_are_rows_of_their_own_role(tmp_path: Path) -> None:
    comparison = Comparison("mini", ["sde-image", "semantic", "sde"], [0], [run_of("sde", 0, 0.6)])
    (shown,) = [lines for title, lines in comparison.tables() if title.startswith("image branch")]
    assert [(line[0], line[3]) for line in shown] == [
        ("image only", "43.1"),
        ("semantic only", "62.7"),
        ("both (SDE)", "63.6"),
    ]
    comparison.save(tmp_path / "comparison.parquet")
    rows = read_table(tmp_path / "comparison.parquet").to_pylist()
    quoted = [(row["kind"], row["value"], row["num_samples"]) for row in rows if row["role"] == "published"]
    assert ("sde", 0.608, None) in quoted and ("sde-image", 0.431, None) in quoted
    assert [(row["kind"], row["seed"]) for row in rows if row["role"] == "ours"] == [("sde", 0)]


def test_an_ablation_is_shown_where_all_its_rows_were_compared() -> None:
    kinds = ["sde-image", "semantic", "sde", "dualtoken-deep", "dualtoken-reconstruction"]
    comparison = Comparison("mini", kinds, [0], [run_of(kind, 0, 0.5) for kind in kinds])
    (_, every), (title, ablation) = comparison.tables()
    assert [line[0] for line in every] == kinds
    assert title.startswith("image branch, semantic branch")
    assert [line[0] for line in ablation] == ["image only", "semantic only", "both (SDE)"]
    whole = Comparison("mini", [*kinds, "dualtoken"], [0], [])
    title, ablation = whole.tables()[2]
    assert title.startswith("where the two losses stand")
    assert [line[0] for line in ablation] == ["both deep", "reconstruction only", "split layers"]


@pytest.mark.parametrize(("values", "text"), [([], "-"), ([0.01], "+1.0"), ([0.01, -0.03], "-1.0 ± 2.8")])
def test_spread(values: list[float], text: str) -> None:
    assert spread(values, metric_of("accuracy"), "+") == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "sde,vqvae"], "tokenizer.kind"),
        (["--kinds", ","], "--kinds names no tokenizer"),
        (["--seeds", "one"], "--seeds 'one' is not a list of integers"),
    ],
)
def test_wrong_arguments_are_named_before_anything_starts(
    command: InProcess, arguments: list[str], message: str
) -> None:
    done = command("compare-tokenizers", "--recipe", "tiny", "--store", "store", *arguments)
    assert done.code == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_kinds_and_given_codes_are_compared_and_a_second_comparison_trains_nothing(
    musevl: Command, prefect_server: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    shutil.copytree(tiny_run.store.uri, tmp_path / "store")
    table = tiny_run.results["tokenize"].manifest
    given = read_code_table([tiny_run.store.fetch(entry) for entry in table.files_under("codes")])
    write_codes(given, tmp_path / "theirs")
    kinds = ["vqgan", "sde", "external=theirs"]
    command = ["compare-tokenizers", "--recipe", "tiny", "--store", "store", "--executor", "local"]
    for setting in ("tokenizer.steps=2", "pretrain.steps=2", "sft.steps=2"):
        command += ["--set", setting]
    command += ["--kinds", ",".join(kinds)]
    first = musevl(*command, PREFECT_API_URL=prefect_server)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    (place,) = [at for at, line in enumerate(lines) if line.startswith("same language model")]
    assert [line.split("  ")[0] for line in lines[place + 3 : place + 3 + len(kinds)]] == kinds

    rows = read_table(tmp_path / ".musevl/report/tiny-tokenizers/comparison.parquet").to_pylist()
    assert {row["kind"] for row in rows if row["role"] == "ours"} == set(kinds)
    page = (tmp_path / ".musevl/report/tiny-tokenizers/index.html").read_text()
    assert page.count("<img") > 4 * len(kinds) and 'src="http' not in page

    store = Store(str(tmp_path / "store"))
    made = len(store.artifacts())
    second = musevl(*command, PREFECT_API_URL=prefect_server)
    assert second.stdout.splitlines()[: len(lines) - 3] == lines[: len(lines) - 3]
    assert len(store.artifacts()) == made
    assert all(record["hit"] for record in store.runs()[: 7 * len(kinds)]), "run records are newest first"


NOT_MEASURED = {
    "vqgan": {"semantic_cosine", "zero_shot_accuracy"},
    "sde-image": {"semantic_cosine", "zero_shot_accuracy"},
    "dualtoken-reconstruction": {"semantic_cosine", "zero_shot_accuracy"},
    "vila_u": {"semantic_cosine"},  # its codes are aligned with captions, and predict no features
}
"""Metrics that a kind has no value for: it does not predict the teacher's features."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*KINDS, *VARIANTS} - {"sde"}))  # which the tiny run is of
def test_every_kind_runs_end_to_end_and_is_measured_in_all_that_it_can_do(
    kind: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    few = ["tokenizer.steps=2", "pretrain.steps=2", "sft.steps=2", "evaluate.max_rows=4"]
    recipe = load_recipe("tiny", overrides_of(kind, tiny_run.recipe.seed, few))
    store = tiny_run.store_before("train_tokenizer", tmp_path / "store")
    for name in ("train_tokenizer", "tokenize", "pretrain", "sft"):
        run_stage(name, recipe, store, LocalExecutor())
    evaluated = run_stage("evaluate", recipe, store, LocalExecutor()).manifest
    rows = read_table(store.fetch(evaluated.file("metrics.parquet"))).to_pylist()
    measured = {column_of(row)[1:] for row in rows if row["role"] == "ours"}
    lacking = {"rfid"} | NOT_MEASURED.get(kind, set())  # Inception's weights are not given
    shown = {(metric.name, qualifier) for metric in CATALOGUE.values() for qualifier in metric.columns}
    assert shown - measured == {column for column in shown if column[0] in lacking}
