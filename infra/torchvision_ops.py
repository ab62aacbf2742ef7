"""Makes torchvision importable in an environment whose build of torch its compiled operators do not fit.

The package index has only a CUDA build of torchvision. Beside a CPU build of torch its operators do not load, and
`import torchvision` fails with "operator torchvision::nms does not exist". With it fail timm, open_clip, lpips and
transformers, which imports torchvision where it is installed. None of them calls such an operator; torchvision
only describes two of them when it is imported. So it is enough to declare those two.

`python infra/torchvision_ops.py` finds out whether that is needed, and only then copies this file into the environment
beside a `.pth` file, through which every Python process of the environment knows it, also one without any code of ours.
It costs no import of torch: it waits for torchvision.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_NAME = "_torchvision_ops"
"""Of the copy in the environment."""
_WAITS_FOR = "torchvision.extension"
"""The module that loads the compiled operators; those that describe them are imported after it."""
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[Any] = []
"""A torch.library.Library withdraws its declarations when it is collected."""

_WITHOUT_US = f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, '__module__', 0) != {_NAME!r}]; "
_CHECKS = {
    "import torchvision": "torchvision",
    "from transformers import AutoImageProcessor, AutoModelForCausalLM, Qwen2ForCausalLM": "transformers",
}
"""What must work in a plain Python process of the environment, and what it is about."""


def declare_missing(extension: ModuleType) -> None:
    """Declare the operators that torchvision describes, unless its compiled ones are there.

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
    """Finds that one module as usual, and has declared what is missing once it is loaded."""

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
    """What the `.pth` file calls when a process starts."""
    sys.meta_path.insert(0, _Finder)


def main() -> int:
    """Install the hook into this interpreter's environment, or remove one that is not needed, and check the result.

    Returns:
        0, or 1 after one line on stderr where torchvision or transformers do not work in the environment.
    """
    import sysconfig  # here and not above: this file is read at the start of every process
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
    """The last line that a fresh interpreter says where it cannot run some code; empty where it can."""
    import subprocess

    ended = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    said = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
    return said[-1] if ended.returncode else ""


if __name__ == "__main__":
    raise SystemExit(main())
