import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra import malloc
from infra.malloc import GLIBC_SETTINGS, JEMALLOC_CONF, MARKER, missing_settings

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, sys
from infra.malloc import reexec_with_fast_malloc
with open(sys.argv[1], "a") as log:
    log.write("started\\n")
reexec_with_fast_malloc()
with open("/proc/self/maps") as maps:
    mapped = "libjemalloc" in maps.read()
print(json.dumps({"argv": sys.argv[2:], "env": dict(os.environ), "jemalloc": mapped}))
"""
NAMES = {MARKER, "LD_PRELOAD", "MALLOC_CONF", *GLIBC_SETTINGS}

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="the settings are for Linux with glibc"),
]


def _environment(**variables: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in NAMES}
    return plain | {"PYTHONPATH": str(ROOT)} | variables


def _run(tmp_path: Path, **variables: str) -> tuple[dict, int]:
    (tmp_path / "program.py").write_text(PROGRAM)
    log = tmp_path / "starts"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-B", str(tmp_path / "program.py"), str(log), "--set", "a b=1", ""]
    environment = _environment(**variables)
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return json.loads(done.stdout), len(log.read_text().splitlines())


def test_process_starts_once_more_with_jemalloc_and_the_same_arguments(tmp_path: Path) -> None:
    result, starts = _run(tmp_path)
    assert starts == 2
    assert result["argv"] == ["--set", "a b=1", ""]
    assert result["jemalloc"]
    assert result["env"]["MALLOC_CONF"] == JEMALLOC_CONF
    assert result["env"][MARKER] == "1"


def test_users_own_setting_stays(tmp_path: Path) -> None:
    result, starts = _run(tmp_path, MALLOC_CONF="narenas:2")
    assert (starts, result["jemalloc"], result["env"]["MALLOC_CONF"]) == (2, True, "narenas:2")


def test_marker_switches_it_off(tmp_path: Path) -> None:
    result, starts = _run(tmp_path, **{MARKER: "0"})
    assert starts == 1
    assert not result["jemalloc"]


def test_a_preloaded_library_is_left_alone_and_glibc_told_to_keep_buffers() -> None:
    own = {"LD_PRELOAD": "/usr/lib/libtcmalloc.so", "MALLOC_TOP_PAD_": "5"}
    missing = missing_settings(own)
    assert missing == {name: value for name, value in GLIBC_SETTINGS.items() if name not in own} | {MARKER: "1"}
    assert missing_settings(own | missing) == {}


def test_without_rays_library_glibc_is_told_to_keep_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc, "_jemalloc", lambda: None)
    assert missing_settings({}) == GLIBC_SETTINGS | {MARKER: "1"}
    assert missing_settings(dict(GLIBC_SETTINGS)) == {}


def test_the_launcher_runs_any_command_with_the_settings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "infra.malloc", "sh", "-c", 'echo "$LD_PRELOAD $0"', "a b"]
    done = subprocess.run(command, env=_environment(), cwd=tmp_path, capture_output=True, text=True, check=True)
    library, _, argument = done.stdout.strip().partition(" ")
    assert library.endswith("libjemalloc.so") and argument == "a b"
    usage = subprocess.run(command[:3], env=_environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert usage.returncode != 0 and "usage" in usage.stderr


KEEPS_AND_GIVES = """
import sys
from infra.malloc import give_back_freed_memory, reexec_with_fast_malloc
reexec_with_fast_malloc()

def resident():
    with open("/proc/self/statm") as sizes:
        return int(sizes.read().split()[1]) * 4096 // 2**20

buffers = [bytearray(b"1") * (2**15 * size) for size in range(1, 160)]  # up to 5 MB: what training makes
full = resident()
buffers.clear()
kept = resident()
give_back_freed_memory()
print(full, kept, resident())
"""


@pytest.mark.parametrize("allocator", ["jemalloc", "glibc"])
def test_freed_buffers_go_back_to_the_system_when_asked(tmp_path: Path, allocator: str) -> None:
    (tmp_path / "program.py").write_text(KEEPS_AND_GIVES)
    variables = {} if allocator == "jemalloc" else GLIBC_SETTINGS | {MARKER: "1"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        env=_environment(**variables),
        capture_output=True,
        text=True,
        check=True,
    )
    full, kept, given = (int(size) for size in done.stdout.split())
    assert kept > full - 100, "the allocator gave it back by itself, so nothing needs to ask"
    assert given < full - 350, (full, kept, given)
