"""The `musevl` command as its users meet it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flows import cli
from stages.pipeline.command import DEFAULT_STORE
from storage.manifest import Manifest
from storage.store import Store
from storage.tables import metrics_table, write_table
from tests.flows.conftest import ROOT, Command, InProcess
from tests.helpers.misbehaving_server import bomb_png, png

UNKNOWN_DIGEST = "0123456789ab"


def metrics_artifact(store: Store, scratch: Path, value: float, action_key: str) -> str:
    """Commit an evaluation with one metric; return its digest."""
    row = {"model": "sde", "role": "ours", "benchmark": "reconstruction", "split": "test", "metric": "psnr"}
    settings = {"crop": "center", "image_size": 64}
    path = scratch / "metrics.parquet"
    write_table(metrics_table([row | {"qualifier": "", "value": value, "num_samples": 7, "settings": settings}]), path)
    manifest = Manifest(
        kind="evaluation",
        schema_version=1,
        stage="evaluate",
        config={},
        inputs={},
        files=(store.put_file(path, "metrics.parquet"),),
        metrics={},
        metadata={},
    )
    return store.commit(action_key, manifest).digest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def evaluated(store: Store, tmp_path: Path) -> list[str]:
    """Two runs of recipe `mini`, then one of recipe `other`; digests in that order."""
    digests = []
    for recipe, value in (("mini", 20.0), ("mini", 21.5), ("other", 9.0)):
        digest = metrics_artifact(store, tmp_path, value, f"key-{value}")
        store.record_run({"stage": "evaluate", "recipe": recipe, "artifact": digest, "finished": "2026-01-01T00:00:00"})
        digests.append(digest)
    store.record_run({"event": "nondeterminism", "stage": "evaluate", "adopted": digests[0], "discarded": "x"})
    return digests


@pytest.mark.processes
def test_help_needs_no_heavy_library(prefect_environment: dict[str, str]) -> None:
    script = """
import sys
from flows import cli
for arguments in (["--help"], ["run", "--help"], ["artifacts", "--help"]):
    sys.argv = ["musevl", *arguments]
    try:
        cli.app()
    except SystemExit as exit:
        assert not exit.code
heavy = {"torch", "prefect", "ray", "transformers", "pyarrow", "fsspec", "numpy", "PIL"}
print("imported:", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], env=prefect_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage") == 3
    assert done.stdout.endswith("imported: []\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run --recipe nosuch", "unknown recipe 'nosuch'"),
        ("run --set sft.setps=3", "did you mean 'sft.steps'?"),
        ("run --store /proc/nowhere", "/proc/nowhere"),
        ("run --store ftp://host/store", "ftp://host/store"),
        ("stage nosuch", "unknown stage 'nosuch'"),
        ("stage tokenize", "run `musevl stage download`"),
        ("results", "run `musevl run --recipe mini` first"),
        (f"artifacts show {UNKNOWN_DIGEST}", UNKNOWN_DIGEST),
        ("artifacts show xyz", "'xyz' is no artifact digest"),
        (f"inspect {UNKNOWN_DIGEST}", UNKNOWN_DIGEST),
        ("ask nosuch.png what?", "no image file nosuch.png"),
        ("ask text.txt what?", "text.txt cannot be read as an image"),
        ("ask image.png what?", "run `musevl stage sft`"),
        ("generate bird --out picture.doc", "picture.doc has no known image suffix"),
        ("generate bird", "run `musevl stage sft`"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(
    arguments: str, words: str, command: InProcess, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / DEFAULT_STORE).mkdir(parents=True)
    done = command(*arguments.split())
    assert done.code == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("musevl: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    ("data", "overrides", "message"),
    [
        (EPS, [], "unsupported format: EPS or PostScript); give one of JPEG, PNG"),
        (bomb_png(), [], "more than 64000000 pixels); raise download.max_bytes or download.max_pixels with --set"),
        (png("red"), ["download.max_bytes=50"], "more than 50 bytes"),
        (png("red")[:60], [], "give one of JPEG, PNG"),
    ],
    ids=["EPS", "900 megapixels", "bytes", "cut"],
)
def test_ask_opens_what_a_download_opens(
    data: bytes, overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "cat.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"cat\.png cannot be read as an image") as raised:
        cli.ask(tmp_path / "cat.png", "What is it?", "tiny", str(tmp_path / "store"), overrides)
    assert message in str(raised.value)
    assert not (tmp_path / "ran").exists()


REFUSED_AT_ONCE: list[tuple[str, list[str]]] = [
    ("unknown recipe 'nosuch'", ["run", "--recipe", "nosuch"]),
    ("'[1' is not a YAML value", ["run", "--set", "sft.steps=[1"]),
    ("stand more than 16 deep", ["compare-tokenizers", "--set", "sft.prompts=" + "[" * 9000]),
    ("unknown stage 'nosuch'", ["stage", "nosuch"]),
    ("Invalid value for '--executor': 'spark'", ["run", "--executor", "spark"]),
    ("No such option", ["run", "--recipee", "mini"]),
    ("Missing argument", ["generate"]),
    ("No such command 'runn'", ["runn"]),
    ("'/nonexistent' holds no .parquet file", ["compare-tokenizers", "--kinds", "vqgan,external=/nonexistent"]),
    ("--kinds names no tokenizer", ["compare-tokenizers", "--kinds", ","]),
    ("--seeds 'one' is not a list of integers", ["compare-tokenizers", "--seeds", "one"]),
    ("CODES: 'nowhere' holds no .parquet file", ["import-codes", "nowhere"]),
    ("there is no checkpoint file nowhere.pt", ["import-tokenizer", "nowhere.pt"]),
    ("'--grace-days': Input should be less", ["artifacts", "gc", "--grace-days", "inf"]),
    ("'--guidance': Input should be less", ["generate", "bird", "--guidance", "nan"]),
    ("'--temperature': Input should be greater", ["generate", "bird", "--temperature", "-1"]),
    ("'--seed': Input should be less", ["generate", "bird", "--seed", "9" * 20]),
    ("'--grace-days': Input should be less", ["artifacts", "gc", "--grace-days", "nan"]),
    ("'--grace-days': Input should be less", ["artifacts", "gc", "--grace-days", "1e300"]),
    ("'--guidance': Input should be less", ["generate", "bird", "--guidance", "inf"]),
    ("'--temperature': Input should be less", ["generate", "bird", "--temperature", "nan"]),
    ("the prompt is not UTF-8", ["generate", "caf\udce9"]),
    ("the prompt has 40000 characters", ["generate", "a" * 40_000]),
    ("there is no image file nosuch.png", ["ask", "nosuch.png", "what?"]),
    ("the question is not UTF-8", ["ask", "image.png", "caf\udce9"]),
    ("the question has 40000 characters", ["ask", "image.png", "a" * 40_000]),
    ("picture.doc has no known image suffix", ["generate", "bird", "--out", "picture.doc"]),
    ("'--images': Input should be less", ["inspect", "0123456789", "--images", "99999999"]),
    ("--codes 'x' is not a list of integers", ["inspect", "0123456789", "--codes", "x"]),
]
"""Words of the message, and the arguments that it is about."""


@pytest.fixture(scope="module")
def refused(prefect_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How each of them ended, all run in one process: exit code, stdout, stderr; and what that process imported."""
    script = """
import contextlib, io, json, sys
from flows import cli
ended = []
for words, arguments in json.load(open("arguments.json")):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.run_command(arguments)
    ended.append([code, out.getvalue(), err.getvalue()])
heavy = {"torch", "prefect", "ray", "transformers"} & set(sys.modules)
print(json.dumps({"ended": ended, "imported": sorted(heavy)}))
"""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "arguments.json").write_text(json.dumps(REFUSED_AT_ONCE))
    done = subprocess.run(
        [sys.executable, "-c", script], env=prefect_environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["arguments.json"], "nothing is made, no store either"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.processes
@pytest.mark.parametrize("number", range(len(REFUSED_AT_ONCE)), ids=[words for words, _ in REFUSED_AT_ONCE])
def test_an_argument_that_cannot_work_is_one_line_and_exit_code_2(number: int, refused: dict[str, Any]) -> None:
    code, printed, said = refused["ended"][number]
    assert (code, printed) == (2, "")
    assert said.startswith("musevl: ") and said.count("\n") == 1 and len(said) < 500
    assert REFUSED_AT_ONCE[number][0] in said


@pytest.mark.processes
def test_arguments_are_checked_before_pytorch_and_prefect_are_imported(refused: dict[str, Any]) -> None:
    assert refused["imported"] == []


def test_debug_shows_the_traceback(musevl: Command) -> None:
    done = musevl("stage", "nosuch", MUSEVL_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "unknown stage 'nosuch'" in done.stderr


def test_results_are_those_of_the_last_completed_run(
    command: InProcess, store: Store, evaluated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = command("results", "--recipe", "mini", "--json", "--store", store.uri)
    assert [(row["metric"], row["value"]) for row in json.loads(done.stdout)] == [("psnr", 21.5)]
    assert json.loads(done.stdout)[0]["settings"] == {"crop": "center", "image_size": 64}
    monkeypatch.setenv("MUSEVL_STORE", store.uri)
    done = command("results")
    assert "recipe other" in done.stdout
    assert evaluated[2][:12] in done.stdout
    assert "psnr" in done.stdout


def test_artifacts_are_listed_and_shown(command: InProcess, store: Store, evaluated: list[str]) -> None:
    listed = command("artifacts", "ls", "--store", store.uri).stdout
    assert all(digest[:12] in listed for digest in evaluated)
    shown = json.loads(command("artifacts", "show", evaluated[1][:10], "--store", store.uri).stdout)
    assert shown["digest"] == evaluated[1]
    assert [file["path"] for file in shown["files"]] == ["metrics.parquet"]


def test_results_take_the_path_of_a_recipe(
    command: InProcess, store: Store, evaluated: list[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "other.yaml"
    recipe.write_text("extends: tiny")
    done = command("results", "--recipe", str(recipe), "--store", store.uri)
    assert evaluated[2][:12] in done.stdout


def test_export_lays_the_files_out(command: InProcess, store: Store, evaluated: list[str], tmp_path: Path) -> None:
    done = command("artifacts", "export", evaluated[0], str(tmp_path / "out"), "--store", store.uri)
    assert done.stdout == f"1 files in {tmp_path / 'out'}\n"
    assert (tmp_path / "out" / "metrics.parquet").is_file()
    done = command("artifacts", "export", evaluated[0], str(tmp_path), "--only", "model", "--store", store.uri)
    assert done.code == 2
    assert "has no folder 'model'; it has metrics.parquet" in done.stderr


def test_verify_finds_damage_sets_it_aside_and_says_what_next(
    command: InProcess, store: Store, evaluated: list[str]
) -> None:
    assert command("artifacts", "verify", "--store", store.uri).code == 0
    sha256 = store.load(evaluated[0]).files[0].sha256
    (blob,) = Path(store.uri).glob(f"cas/**/{sha256}")
    blob.chmod(0o644)
    blob.write_bytes(b"damaged")
    done = command("artifacts", "verify", "--store", store.uri)
    assert done.code == 1
    assert done.stdout.startswith(f"{evaluated[0][:12]}  metrics.parquet: ")
    assert done.stdout.count("\n") == 1
    assert "the next run of these stages rebuilds" in done.stderr
    assert store.lookup("key-20.0") is None


def test_recipes_are_listed_with_what_they_are_for(command: InProcess) -> None:
    lines = command("recipes").stdout.splitlines()
    names = {path.stem for path in (ROOT / "stages" / "recipes").glob("*.yaml")}
    assert names <= {line.split()[0] for line in lines}
    assert all(len(line.split()) > 3 for line in lines[2:])
