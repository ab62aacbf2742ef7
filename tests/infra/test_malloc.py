import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.malloc import MARKER, SETTINGS

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, sys
from infra.malloc import reexec_with_fast_malloc
with open(sys.argv[1], "a") as log:
    log.write("started\\n")
reexec_with_fast_malloc()
print(json.dumps({"argv": sys.argv[2:], "pid": os.getpid(), "env": dict(os.environ)}))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")


def _run(tmp_path: Path, **variables: str) -> tuple[dict, int]:
    (tmp_path / "program.py").write_text(PROGRAM)
    log = tmp_path / "starts"
    log.unlink(missing_ok=True)
    plain = {name: value for name, value in os.environ.items() if name not in SETTINGS and name != MARKER}
    command = [sys.executable, "-B", str(tmp_path / "program.py"), str(log), "--set", "a b=1", ""]
    env = plain | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), len(log.read_text().splitlines())


def test_process_starts_once_more_with_the_settings_and_the_same_arguments(tmp_path: Path) -> None:
    result, starts = _run(tmp_path)
    assert starts == 2
    assert result["argv"] == ["--set", "a b=1", ""]
    assert {name: result["env"][name] for name in SETTINGS} == SETTINGS


def test_settings_in_the_environment_need_no_new_start(tmp_path: Path) -> None:
    assert _run(tmp_path, **SETTINGS)[1] == 1


def test_users_own_setting_stays(tmp_path: Path) -> None:
    result, starts = _run(tmp_path, MALLOC_TOP_PAD_="5")
    assert starts == 2
    assert result["env"]["MALLOC_TOP_PAD_"] == "5"
    assert result["env"]["MALLOC_MMAP_MAX_"] == SETTINGS["MALLOC_MMAP_MAX_"]


def test_marker_switches_it_off(tmp_path: Path) -> None:
    result, starts = _run(tmp_path, **{MARKER: "0"})
    assert starts == 1
    assert "MALLOC_MMAP_MAX_" not in result["env"]
