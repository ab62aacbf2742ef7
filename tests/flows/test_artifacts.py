"""`musevl artifacts lineage | diff | pin | forget | gc`."""

from __future__ import annotations

import shutil
from pathlib import Path

from flows.artifacts import diff_text, lineage_text
from storage.manifest import FileEntry, Manifest
from storage.store import Store
from tests.flows.conftest import Command
from tests.tiny import TinyRun


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


def test_commands_on_a_store(musevl: Command, tiny_run: TinyRun, tmp_path: Path) -> None:
    shutil.copytree(tiny_run.store.uri, tmp_path / "store")
    sft, evaluate = (tiny_run.results[name].digest for name in ("sft", "evaluate"))

    def artifacts(*arguments: str) -> tuple[int, str]:
        done = musevl("artifacts", *arguments, "--store", "store")
        return done.returncode, done.stdout + done.stderr

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


def test_gc_says_what_keeps_it_from_deleting_blobs_and_ends_with_1(musevl: Command, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    store.put_bytes(b"an orphan", "a")
    store.objects.put("actions/key.json", b"{")
    (tmp_path / "store" / "tmp").mkdir(exist_ok=True)
    (tmp_path / "store" / "tmp" / "half").write_bytes(b"half")
    done = musevl("artifacts", "gc", "--grace-days", "0", "--delete", "--store", store.uri)
    assert done.returncode == 1
    first, second, *rest = done.stdout.splitlines()
    assert first == "every blob is kept, for it is not known what these need:"
    assert second.startswith(
        "actions/key.json is no action record: run its stage again, or `musevl artifacts forget key`"
    )
    assert rest[-1].startswith("deleted ") and "never finished" in done.stdout
    assert len(store.objects.list("cas/")) == 1
    assert musevl("artifacts", "forget", "key", "--store", store.uri).returncode == 0
    assert musevl("artifacts", "gc", "--grace-days", "0", "--delete", "--store", store.uri).returncode == 0
    assert store.objects.list("cas/") == []
