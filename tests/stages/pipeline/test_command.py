"""`python -m stages.NAME`: what a shell or a Ray job runs."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stages.pipeline import command as standalone
from stages.pipeline import recipe
from stages.pipeline.errors import DiskFull, named_full_disk, one_line, report
from stages.pipeline.recipe_files import STAGE_NAMES
from stages.protocol import Outcome, StageContext
from storage.errors import UnknownArtifact

ROOT = Path(__file__).parents[3]


def empty_outcome(context: StageContext[object]) -> Outcome:
    return Outcome("stub", [context.store.put_bytes(b"made", "file.txt")])


pytestmark = pytest.mark.usefixtures("fresh_loggers")


@pytest.fixture
def stub_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """A download stage that downloads nothing."""
    stage = dataclasses.replace(recipe.STAGES["download"], run=empty_outcome, external_inputs=None)
    monkeypatch.setitem(recipe.STAGES, "download", stage)


def run(*arguments: str) -> int:
    return standalone.run_standalone("download", [*arguments, "--executor", "local"])


@pytest.mark.usefixtures("stub_download")
def test_the_first_call_makes_and_the_second_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--store", str(tmp_path)) == 0
    name, result, digest, *_ = capsys.readouterr().out.split()
    assert (name, result, len(digest)) == ("download", "made", 64)
    assert run("--store", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert out.split()[:3] == ["download", "hit", digest]
    assert out.count("\n") == 1


@pytest.mark.usefixtures("stub_download")
def test_an_override_makes_another_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--store", str(tmp_path))
    assert run("--store", str(tmp_path), "--set", "seed=9", "--set", "download.rows_per_shard=7") == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[1] == "made"


@pytest.mark.usefixtures("stub_download")
def test_the_store_of_the_environment_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(standalone.STORE_VARIABLE, str(tmp_path / "elsewhere"))
    assert run() == 0
    assert (tmp_path / "elsewhere" / "actions").is_dir()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "nosuch"], "unknown recipe 'nosuch'"),
        (["--set", "download.rows_per_shrd=7"], "did you mean 'download.rows_per_shard'?"),
        (["--store", "/proc/nowhere"], "/proc/nowhere"),
        (["--executor", "spark"], "argument --executor: invalid choice: 'spark'"),
        (["--stor", "x", "--sett", "y"], "unrecognized arguments: --sett y; see `python -m stages.download --help`"),
        (["--set", "sft.device=tpu"], "input should be 'auto', 'cpu' or 'cuda'"),
        (["--set", "download.files={kind: webdataset, path: /nonexistent}"], "/nonexistent"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--store", str(tmp_path), *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("musevl: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


@pytest.mark.processes
def test_a_stage_module_is_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stages.tokenize", "--recipe", "mini", "--store", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("musevl: tokenize needs the artifact of download")
    assert done.stderr.count("\n") == 1


@pytest.mark.processes
def test_every_stage_checks_its_arguments_before_pytorch_is_imported() -> None:
    script = """
import runpy, sys
sys.argv[1:], names = ["--recipe", "nosuch"], sys.argv[1:]
for name in names:
    try:
        runpy.run_module(f"stages.{name}", run_name="__main__")
    except SystemExit as exit:
        print(name, exit.code, "torch" in sys.modules)
"""
    environment = os.environ | {"MUSEVL_FAST_MALLOC": "0"}
    command = [sys.executable, "-c", script, *STAGE_NAMES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name} 2 False" for name in STAGE_NAMES]
    said = done.stderr.splitlines()
    assert len(said) == len(STAGE_NAMES) and all(line.startswith("musevl: unknown recipe 'nosuch'") for line in said)


def test_debug_and_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        report(ZeroDivisionError("a defect"))
    monkeypatch.setenv("MUSEVL_DEBUG", "1")
    with pytest.raises(ValueError, match="bad field"):
        report(ValueError("bad field"))


def test_an_error_of_a_library_says_its_type_and_how_to_see_where() -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    assert one_line(caught.value).startswith("JSONDecodeError: ")
    assert one_line(caught.value).endswith("(MUSEVL_DEBUG=1 shows where)")
    assert one_line(UnknownArtifact("no artifact\nbegins so")) == "no artifact begins so"


def raised_by_torch() -> None:
    torch.save({"weights": torch.zeros(10)}, "/dev/full")


def raised_by_python() -> None:
    Path("/dev/full").write_bytes(b"0" * 10_000_000)


def raised_by_rust() -> None:
    raise Exception("No space left on device (os error 28)")  # as tokenizers and safetensors say it


def raised_in_a_row() -> None:
    try:
        raised_by_python()
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598") from None


@pytest.mark.parametrize("write", [raised_by_torch, raised_by_python, raised_by_rust, raised_in_a_row])
def test_a_full_scratch_disk_is_one_line_that_names_it(
    write: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, store = tmp_path / "scratch", tmp_path / "store"
    scratch.mkdir()
    store.mkdir()
    free = {scratch: 3000, store: 10**9}
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    with pytest.raises(DiskFull) as caught, named_full_disk(scratch, f"file://{store}"):
        write()
    said = one_line(caught.value)
    assert f"no space left on the disk of {scratch} (0.0 MB free): set MUSEVL_SCRATCH (or TMPDIR)" in said
    free[store] = 0
    with pytest.raises(DiskFull, match=f"no space left on the disk of {store}"), named_full_disk(scratch, str(store)):
        write()


def test_another_error_on_a_full_disk_stays_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(ZeroDivisionError), named_full_disk(tmp_path, "s3://bucket"):
        raise ZeroDivisionError


def test_a_stage_says_which_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = dataclasses.replace(recipe.STAGES["download"], run=lambda context: raised_by_torch(), external_inputs=None)
    monkeypatch.setitem(recipe.STAGES, "download", stage)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    assert run("--store", str(tmp_path)) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("musevl: no space left on the disk of ")
