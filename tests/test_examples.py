"""The examples of the documents run."""

from pathlib import Path

import pytest
from PIL import Image

from docs.examples import tokenizer


def test_the_tokenizer_example_prints_codes_and_draws_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer.main(steps=2)
    *rows, summary = capsys.readouterr().out.splitlines()
    codes = [int(code) for row in rows for code in row.split()]
    assert len(rows) == 8 and len(codes) == 64 and max(codes) < 256
    assert "64 codes of 256" in summary
    assert Image.open("drawn.png").size == (128, 64)
