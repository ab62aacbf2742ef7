"""One finished run of the tiny recipe for the whole session, and stores that hold only a part of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.executors import LocalExecutor
from stages.pipeline.execution import StageResult, run_stage
from stages.pipeline.recipe import STAGES, Recipe, load_recipe
from storage.store import Store
from tests.helpers.session.once import made_once

ROOT = Path(__file__).parents[2]
CAPTIONS_ONLY = (
    "download.extra_columns=[]",
    "download.keep={}",
    'tokenizer.class_name="{caption}"',
    'sft.questions=[{question: "What is it?", answer: "{caption}"}]',
    'evaluate.concept="{caption}"',
)
"""What a recipe changes of `tiny` for images that have a caption and no other column."""


@dataclass(frozen=True)
class TinyRun:
    """The uninterrupted run that others are compared with."""

    recipe: Recipe
    store: Store
    results: dict[str, StageResult]

    def store_before(self, stage: str, folder: Path) -> Store:
        """A new store with the artifacts of every stage before `stage`, and nothing else."""
        copied = Store(str(folder))
        for name, result in self.results.items():
            if name == stage:
                break
            for entry in result.manifest.files:
                copied.put_file(self.store.fetch(entry), entry.path)
            copied.commit(result.action_key, result.manifest)
        return copied


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """One run of the tiny recipe for all processes of the test run; each has a copy of its store."""
    recipe = load_recipe("tiny")

    def results(folder: Path) -> dict[str, StageResult]:
        return {name: run_stage(name, recipe, Store(str(folder)), LocalExecutor()) for name in STAGES}

    copied = tmp_path_factory.mktemp("tiny") / "store"
    shutil.copytree(made_once(tmp_path_factory, "tiny", results), copied)
    return TinyRun(recipe, Store(str(copied)), results(copied))


def start_stage(name: str, store: Store, *overrides: str) -> subprocess.Popen[str]:
    """`python -m stages.NAME --recipe tiny` as a process group of its own."""
    command = [sys.executable, "-m", f"stages.{name}", "--recipe", "tiny", "--store", store.uri, "--executor", "local"]
    for override in overrides:
        command += ["--set", override]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
