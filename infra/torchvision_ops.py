"""Makes torchvision importable in an environment whose build of torch does not fit torchvision's compiled operators.

The package index has only a CUDA build of torchvision. With a CPU build of torch its operators do not load, and
`import torchvision` fails with "operator torchvision::nms does not exist". Then timm, open_clip, lpips and
transformers, which imports torchvision if it is installed, fail as well. None of them calls such an operator;
torchvision only registers metadata for two of them when it is imported. So it is enough to declare those two.

`python infra/torchvision_ops.py` checks whether that is needed, and only then copies this file into the environment,
with a `.pth` file that activates it in every Python process of the environment, even one without code of this project.
It does not import torch; it acts when torchvision is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_NAME = "_torchvision_ops"
"""Module name of the copy in the environment."""
_WAITS_FOR = "torchvision.extension"
"""The module that loads the compiled operators; the modules with their metadata are imported after it."""
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[Any] = []
"""Keeps libraries alive: a torch.library.Library withdraws its declarations when it is garbage-collected."""

_WITHOUT_US = f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, '__module__', 0) != {_NAME!r}]; "
_CHECKS = {
    "import torchvision": "torchvision",
    "from transformers import AutoImageProcessor, AutoModelForCausalLM, Qwen2ForCausalLM": "transformers",
}
"""Statements that must work in a plain Python process of the environment, and the package that each one tests."""


def declare_missing(extension: ModuleType) -> None:
    """Declare the operators for which torchvision registers metadata, unless the compiled ones have been loaded.

    Args:
        extension: the module `torchvision.extension`.
    """
    if extension._has_ops():
        return
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _libraries.append(library)


class _Finder:
    """Import hook that finds `torchvision.extension` as usual and calls `declare_missing` after it is loaded."""

    @staticmethod
    def find_spec(fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _WAITS_FOR:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            load = loader.exec_module

            def load_and_declare(module: ModuleType) -> None:
                load(module)
                declare_missing(module)

            loader.exec_module = load_and_declare
        return spec


def wait_for_torchvision() -> None:
    """Install the import hook; the `.pth` file calls this when a process starts."""
    sys.meta_path.insert(0, _Finder)


def main() -> int:
    """Install the hook into this interpreter's environment, or remove it if it is not needed, and check the result.

    Returns:
        0, or 1 after one line on stderr if torchvision or transformers do not work in the environment.
    """
    import sysconfig  # imported here because this file is loaded at the start of every process
    from pathlib import Path

    folder = Path(sysconfig.get_paths()["purelib"])
    copy, start = folder / f"{_NAME}.py", folder / f"{_NAME}.pth"
    if _failure(f"{_WITHOUT_US}import torchvision"):
        copy.write_bytes(Path(__file__).read_bytes())
        start.write_text(f"import {_NAME}; {_NAME}.wait_for_torchvision()\n")
    else:
        start.unlink(missing_ok=True)
        copy.unlink(missing_ok=True)
    for command, package in _CHECKS.items():
        if failure := _failure(command):
            sys.stderr.write(
                f"setup: {package} does not work in this environment: `{command}` ends with {failure!r}; the versions "
                f"of torch and torchvision must belong together: remove .venv and run `make setup` again, with "
                f"UV_TORCH_BACKEND=cpu (or cu130, ...) where PyTorch's own index is reachable\n"
            )
            return 1
    return 0


def _failure(code: str) -> str:
    """Return the last line of stderr of a new interpreter that runs some code, or '' if it succeeds."""
    import subprocess

    ended = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    said = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
    return said[-1] if ended.returncode else ""


if __name__ == "__main__":
    raise SystemExit(main())
