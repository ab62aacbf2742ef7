import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_folders_and_stages_import_only_what_the_contracts_in_pyproject_allow() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
