"""The environment works without any code of ours: torchvision imports, whatever build of torch stands beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from infra import torchvision_ops

PACKAGES = ("flows", "stages", "models", "storage", "infra")


def plain(code: str, folder: Path) -> str:
    """What a fresh interpreter prints that has the environment's packages and nothing of this process."""
    ended = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.processes
def test_transformers_and_torchvision_work_in_a_plain_interpreter(tmp_path: Path) -> None:
    code = f"""
import sys
from transformers import AutoImageProcessor, AutoModelForCausalLM, Qwen2ForCausalLM, SiglipModel
import torch, torchvision
print(torchvision.transforms.functional.hflip(torch.arange(3)[None]).tolist())
assert not set({PACKAGES!r}) & {{name.split(".")[0] for name in sys.modules}}
"""
    assert plain(code, tmp_path) == "[[2, 1, 0]]\n"


@pytest.mark.processes
def test_a_process_without_torchvision_pays_no_import_of_torch(tmp_path: Path) -> None:
    assert plain("import sys; print('torch' in sys.modules)", tmp_path) == "False\n"


def test_nothing_is_declared_where_the_compiled_operators_load() -> None:
    extension = ModuleType("torchvision.extension")
    extension._has_ops = lambda: True  # type: ignore[attr-defined]
    before = len(torchvision_ops._libraries)
    torchvision_ops.declare_missing(extension)
    assert len(torchvision_ops._libraries) == before


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty site-packages folder in the place of the environment's."""
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"purelib": str(tmp_path)})
    return tmp_path


def test_the_hook_is_installed_where_torchvision_does_not_import_and_removed_where_it_does(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {True: "RuntimeError: operator torchvision::nms does not exist", False: ""}
    for needed in (True, True, False, False):
        monkeypatch.setattr(
            torchvision_ops, "_failure", lambda code, needed=needed: broken[needed and code.startswith("import sys")]
        )
        assert torchvision_ops.main() == 0
        assert sorted(path.suffix for path in site.iterdir()) == ([".pth", ".py"] if needed else [])


def test_an_environment_that_stays_broken_ends_set_up_with_one_line(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torchvision_ops, "_failure", lambda code: "" if "torchvision" in code else "ImportError: why")
    assert torchvision_ops.main() == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "setup: transformers does not work" in said and "ImportError: why" in said and "UV_TORCH_BACKEND" in said
