"""Whole stages on an S3 store whose service stumbles all the time: the result is that of a quiet one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from infra.executors import LocalExecutor
from stages.pipeline.execution import run_stage
from stages.pipeline.recipe import load_recipe
from storage.store import Store
from tests.helpers.fault_proxy import FAULTS, FaultProxy
from tests.helpers.light import light_run
from tests.helpers.tiny import CAPTIONS_ONLY

SHARE = 0.15
"""Part of the requests that are spoilt."""


def _stumble(proxy: FaultProxy) -> int:
    """Spoil some of the coming requests, each with a fault of its own; return how many were chosen."""
    generator = random.Random(0)
    faults = {number: generator.choice(FAULTS) for number in range(10_000) if generator.random() < SHARE}
    proxy.spoil([], "500")
    proxy.faults = faults
    return len(faults)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["download", "tokenize"])
def test_a_stage_on_a_store_that_stumbles_gives_what_it_gives_on_a_quiet_one(
    stage: str, proxy: FaultProxy, s3_uri: str, impatient: None, tmp_path: Path
) -> None:
    run = light_run(tmp_path, num_images=12, rows_per_shard=3)
    for path in tmp_path.glob("*.png"):
        path.with_suffix(".txt").write_text(f"image {path.stem}")
    files = f"{{kind: folder, path: {tmp_path}}}"
    overrides = [f"download.files={files}", *CAPTIONS_ONLY]
    recipe = run.recipe if stage == "tokenize" else load_recipe(str(run.recipe_path), overrides)
    quiet = Store(str(tmp_path / "quiet")) if stage == "download" else run.store(str(tmp_path / "quiet"))
    expected = run_stage(stage, recipe, quiet, LocalExecutor()).digest
    direct = Store(s3_uri) if stage == "download" else run.store(s3_uri)
    proxied = Store(s3_uri, endpoint_url=proxy.url)
    chosen, before = _stumble(proxy), proxy.count()
    result = run_stage(stage, recipe, proxied, LocalExecutor())
    met = chosen - len(proxy.faults)
    assert met > 5, f"only {met} of {proxy.count() - before} requests were spoilt"
    proxy.faults = {}
    assert (result.hit, result.digest) == (False, expected)
    assert direct.verify(result.digest) == []
    assert len(dict(direct.work(result.action_key).receipts())) == 4
    assert run_stage(stage, recipe, proxied, LocalExecutor()).hit
