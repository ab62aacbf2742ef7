import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_images_of_strangers_are_opened_in_one_place() -> None:
    opening = re.compile(r"\bImage\.open\(|\bcv2\.imdecode\(|\bimread\(")
    folders = ("flows", "stages", "models", "storage")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in files if opening.search(path.read_text(encoding="utf-8"))}
    assert found == {"models/images.py"}, "formats and limits are decided there"
