"""Stand-ins for the stages' work: the pipeline's machinery is real, and each stage takes milliseconds.

`python -m tests.flows.stubs ARGUMENTS` is the `musevl` command with them.
"""

import builtins
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import flows.report.report
import stages.pipeline.execution
import stages.pipeline.recipe
from flows import cli
from stages.protocol import Outcome, Stage, StageContext
from storage.tables import metrics_table, write_table


def work(item: dict[str, Any]) -> dict[str, Any]:
    """What a worker does with an item."""
    return {"number": item["number"] * 2}


def run(context: StageContext[Any]) -> Outcome:
    """Map a few items and store what came back, together with the inputs' digests."""
    fail_as_asked(context)
    mapped = context.executor.map(lambda: work, [{"number": n} for n in range(3)], num_workers=1)
    total = sum(item["number"] for item in mapped)
    inputs = {name: manifest.digest for name, manifest in context.inputs.items()}
    files = [context.store.put_bytes(json.dumps({"total": total, "inputs": inputs}).encode(), "result.json")]
    row = {"model": "stub", "role": "ours", "benchmark": "stub", "split": "test", "metric": "total", "qualifier": ""}
    row |= {"value": total, "num_samples": 3}
    path = context.scratch / "metrics.parquet"
    write_table(metrics_table([row | {"settings": {"crop": None}}]), path)
    files.append(context.store.put_file(path, "metrics.parquet"))
    return Outcome("stub", files, metrics={"total": total, "nested": {"share": 0.5}, "curve": [1, 2]})


def fail_as_asked(context: StageContext[Any]) -> None:
    """Raise what STUB_FAILURE=INPUTS:ERROR:TIMES asks of the stage with so many inputs; count in STUB_COUNTER.

    STUB_SECONDS is how long each stage takes.
    """
    time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
    if not (wish := os.environ.get("STUB_FAILURE")):
        return
    num_inputs, error, times = wish.split(":")
    if len(context.inputs) == int(num_inputs):
        counter = Path(os.environ["STUB_COUNTER"])
        tries = int(counter.read_text()) + 1 if counter.exists() else 1
        counter.write_text(str(tries))
        if tries <= int(times):
            raise getattr(builtins, error)(f"stub failure {tries}")


def install() -> None:
    """Put the stand-ins in the place of all stages, in this process."""
    for name, stage in stages.pipeline.recipe.STAGES.items():
        stages.pipeline.recipe.STAGES[name] = stubbed(stage)


def stubbed(stage: Stage[Any]) -> Stage[Any]:
    """A stage with the same name, config and inputs, but another `run`."""
    return dataclasses.replace(stage, run=run, external_inputs=None)


def _write_report(recipe: Any, store: Any, folder: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "index.html"


if __name__ == "__main__":
    install()
    flows.report.report.write_report = _write_report
    cli.main()
