"""`musevl artifacts lineage | diff | pin | forget | gc`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from flows.artifacts import diff_text, lineage_text
from storage.blobs import blob_key
from storage.manifest import FileEntry, Manifest
from storage.store import Store
from tests.flows.conftest import InProcess
from tests.flows.test_cli import metrics_artifact
from tests.helpers.read_only import readable_only
from tests.helpers.tiny import TinyRun


def test_lineage_names_everything_once_in_full(tiny_run: TinyRun) -> None:
    results = tiny_run.results
    lines = lineage_text(tiny_run.store, results["evaluate"].digest).splitlines()
    assert lines[0].startswith(f"evaluate  {results['evaluate'].digest[:12]}  evaluation, ")
    for name, result in results.items():
        full = [line for line in lines if result.digest[:12] in line and "(above)" not in line]
        assert len(full) == 1 and full[0].split()[0] == name
    assert any(line.strip().startswith("download") and line.endswith("(above)") for line in lines)


def test_diff_shows_settings_inputs_files_and_metrics() -> None:
    def made(steps: int, digest: str, value: float) -> Manifest:
        config = {"steps": steps, "optimiser": {"learning_rate": 0.1}}
        return Manifest("vlm", 1, "sft", config, {"pretrain": "a" * 64}, (FileEntry("w", 3, digest),), {"x": value}, {})

    assert diff_text(made(1, "0" * 64, 0.5), made(1, "0" * 64, 0.5)) == ""
    text = diff_text(made(1, "0" * 64, 0.5), made(2, "1" * 64, 0.75))
    assert [line.split() for line in text.splitlines() if line.startswith(("steps", "x", "w "))] == [
        ["steps", "1", "2"],
        ["x", "0.5", "0.75"],
        ["w", "000000000000", "(0.0", "MB)", "111111111111", "(0.0", "MB)"],
    ]
    assert "learning_rate" not in text and "inputs" not in text


def test_commands_on_a_store(command: InProcess, tiny_run: TinyRun, tmp_path: Path) -> None:
    shutil.copytree(tiny_run.store.uri, tmp_path / "store")
    sft, evaluate = (tiny_run.results[name].digest for name in ("sft", "evaluate"))

    def artifacts(*arguments: str) -> tuple[int, str]:
        done = command("artifacts", *arguments, "--store", "store")
        return done.code, done.stdout + done.stderr

    assert artifacts("pin", sft[:8], "--note", "kept") == (0, f"pinned {sft}\n")
    assert sum(line.endswith("pinned") for line in artifacts("ls")[1].splitlines()) == 1
    code, text = artifacts("forget", sft[:8])
    assert code == 2 and "is pinned" in text and len(text.splitlines()) == 1
    assert artifacts("forget", evaluate[:8])[0] == 0
    code, text = artifacts("gc", "--grace-days", "0")
    assert code == 0 and "no artifact, pin or work needs it" in text and "nothing was deleted" in text
    assert artifacts("gc")[1] == "nothing to remove\n", "all of it is younger than a week"
    assert "deleted" in artifacts("gc", "--grace-days", "0", "--delete")[1]
    assert artifacts("gc", "--grace-days", "0")[1] == "nothing to remove\n"
    assert artifacts("verify")[0] == 0
    code, text = artifacts("diff", sft[:8], tiny_run.results["pretrain"].digest[:8])
    assert code == 1 and "settings" in text and "pretrain" in text


@pytest.fixture(scope="module")
def readable(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in a store that others may read."""
    store = tmp_path_factory.mktemp("readable") / "store"
    shutil.copytree(tiny_run.store.uri, store)
    return store


READING = (
    "artifacts ls",
    "artifacts show {sft}",
    "artifacts export {tokenize} exported --only codes",
    "artifacts verify",
    "artifacts lineage {evaluate}",
    "artifacts gc --grace-days 30",
    "results",
    "inspect {download}",
    "inspect {tokenize} --images 2",
    "ask image.png what? --recipe tiny",
    "generate cat --recipe tiny --out drawn.png",
)
WRITING = (
    "artifacts pin {sft}",
    "artifacts unpin {sft}",
    "artifacts forget {sft}",
    "artifacts gc --grace-days 30 --delete",
    "stage sft --recipe tiny --executor local",
)


@pytest.mark.parametrize("arguments", READING)
def test_commands_that_read_take_no_right_to_write_to_the_store(
    arguments: str, command: InProcess, readable: Path, tiny_run: TinyRun, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    digests = {name: result.digest[:12] for name, result in tiny_run.results.items()}
    with readable_only(readable):
        done = command(*arguments.format(**digests).split(), "--store", str(readable))
    assert done.code == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("arguments", WRITING)
def test_commands_that_write_say_in_one_line_that_the_store_cannot_be_written(
    arguments: str, command: InProcess, readable: Path, tiny_run: TinyRun
) -> None:
    digests = {name: result.digest[:12] for name, result in tiny_run.results.items()}
    with readable_only(readable):
        done = command(*arguments.format(**digests).split(), "--store", str(readable))
    assert (done.code, done.stdout) == (2, "")
    assert (
        f"musevl: cannot write to the store folder {readable}: Permission denied; choose a folder that" in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1


def test_verify_reports_damage_in_a_store_that_it_cannot_write(command: InProcess, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    key = blob_key(store.put_bytes(b"data", "a").sha256)
    store.commit("key", Manifest("thing", 1, "stage", {}, {}, (FileEntry("a", 4, key[-64:]),), {}, {}))
    store.objects.put(key, b"dada")
    with readable_only(tmp_path / "store"):
        done = command("artifacts", "verify", "--store", store.uri)
    assert done.code == 1
    assert "damaged" in done.stdout and "it stays there, for it could not be set aside" in done.stdout
    assert len(done.stdout.splitlines()) == 1 and store.objects.list("quarantine/") == []


@pytest.mark.parametrize(
    "arguments",
    ["artifacts ls", "artifacts show 0123456", "artifacts export 0123456 x", "artifacts verify", "results",
     "artifacts lineage 0123456", "artifacts diff 0123456 1234567", "artifacts pin 0123456", "artifacts unpin 0123456",
     "artifacts forget 0123456", "artifacts gc --delete", "inspect 0123456", "generate cat"],
)  # fmt: skip
def test_a_store_that_is_not_there_is_named_and_not_made(arguments: str, command: InProcess, tmp_path: Path) -> None:
    done = command(*arguments.split(), "--store", "nowhere")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == (
        f"musevl: there is no store in {tmp_path / 'nowhere'}: No such file or directory; name another with --store or "
        "MUSEVL_STORE, or make one with `musevl run`\n"
    )
    assert not (tmp_path / "nowhere").exists()


def test_one_damaged_record_of_a_run_does_not_stop_results(command: InProcess, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    digest = metrics_artifact(store, tmp_path, 20.0, "key")
    run = {"stage": "evaluate", "recipe": "mini", "artifact": digest, "finished": "2026-01-01"}
    store.record_run(run)
    damaged = store.record_run(run | {"finished": "2026-01-02"})
    store.objects.put(f"runs/{damaged}.json", b'{"stage":"evaluate"')
    done = command("results", "--store", store.uri)
    assert done.code == 0 and "finished 2026-01-01" in done.stdout and "psnr" in done.stdout
    assert f"skipped runs/{damaged}.json, the damaged record of a run: " in done.stderr
    done = command("artifacts", "verify", "--store", store.uri)
    assert done.code == 1 and f"record  runs/{damaged}.json: damaged" in done.stdout


def test_gc_says_what_keeps_it_from_deleting_blobs_and_ends_with_1(command: InProcess, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    store.put_bytes(b"an orphan", "a")
    store.objects.put("actions/key.json", b"{")
    (tmp_path / "store" / "tmp").mkdir(exist_ok=True)
    (tmp_path / "store" / "tmp" / "half").write_bytes(b"half")
    done = command("artifacts", "gc", "--grace-days", "0", "--delete", "--store", store.uri)
    assert done.code == 1
    first, second, *rest = done.stdout.splitlines()
    assert first == "every blob is kept, for it is not known what these need:"
    assert second.startswith(
        "actions/key.json is no action record: run its stage again, or `musevl artifacts forget key`"
    )
    assert rest[-1].startswith("deleted ") and "never finished" in done.stdout
    assert len(store.objects.list("cas/")) == 1
    assert command("artifacts", "forget", "key", "--store", store.uri).code == 0
    assert command("artifacts", "gc", "--grace-days", "0", "--delete", "--store", store.uri).code == 0
    assert store.objects.list("cas/") == []
