"""The benchmarks still run; what they measure is not asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra.executors import LocalExecutor
from stages.pipeline.recipe import load_recipe
from tests.benchmarks import bench_code_table, bench_precision, bench_scaling, bench_tokenize


def lines(printed: str) -> list[dict[str, object]]:
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert all(line.keys() == {"name", "ours", "peer", "unit", "ratio"} for line in found)
    return found


def test_scaling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_scaling", "--rows", "3000", "--store", str(tmp_path / "store")])
    bench_scaling.main()
    assert [line["unit"] for line in lines(capsys.readouterr().out)] == ["s", "s", "s", "MiB"]


def test_code_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_code_table", "--images", "20"])
    bench_code_table.main()
    assert len(lines(capsys.readouterr().out)) == 3


def test_precision(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_precision", "--repeats", "1"])
    monkeypatch.setattr(bench_precision, "native_precision", lambda device: "fp32")
    every = bench_precision._cases(load_recipe("tiny"))
    for case in every.values():
        case()
    monkeypatch.setattr(bench_precision, "_cases", lambda recipe: dict(list(every.items())[:1]))
    bench_precision.main()
    (line,) = lines(capsys.readouterr().out)
    assert str(line["name"]).endswith("auto (fp32) against bf16")


def test_tokenize(tmp_path: Path) -> None:
    """Without Ray, which other tests start."""
    run = bench_tokenize._run(tmp_path, 1, 1, SimpleNamespace(images=8, shard=4))
    assert bench_tokenize._bare_loop(run, tmp_path / "loop") > 0
    assert bench_tokenize._loop_of_the_stages_encoder(run, tmp_path / "own loop") > 0
    assert bench_tokenize._one_file_an_image(run, tmp_path / "files") > 0
    cost, (before, _) = bench_tokenize._stage(run, tmp_path / "store", bench_tokenize._Timed(LocalExecutor()), 1, 4)
    assert cost > 0
    assert before > 0
