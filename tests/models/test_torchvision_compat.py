import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_torchvision_imports_after_the_call() -> None:
    code = (
        "from models.torchvision_compat import make_torchvision_importable as make\n"
        "make(); make()\n"
        "import torch, torchvision\n"
        "from torchvision.transforms.functional import hflip\n"
        "print(hflip(torch.arange(3)[None]).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[2, 1, 0]]"
