import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_folders_and_stages_import_only_what_the_contracts_in_pyproject_allow() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_of_strangers_are_opened_in_one_place() -> None:
    opening = re.compile(r"\bImage\.open\(|\bcv2\.imdecode\(|\bimread\(")
    folders = ("flows", "stages", "models", "storage")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in files if opening.search(path.read_text(encoding="utf-8"))}
    assert found == {"models/images.py"}, "formats and limits are decided there"
