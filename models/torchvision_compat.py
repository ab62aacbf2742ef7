"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

The torchvision wheel of the package index is a CUDA build. Beside a CPU-only torch its compiled operators do not
load, and `import torchvision` fails on registering a meta kernel for an operator that does not exist. Declaring the two
schemas that it looks for is enough for everything that needs no compiled operator (timm, open_clip, lpips).
"""

from __future__ import annotations

import functools

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[torch.library.Library] = []  # a Library withdraws its declarations when it is collected


@functools.cache
def make_torchvision_importable() -> None:
    """Declare torchvision's missing operator schemas; does nothing where the compiled operators load.

    Call it before the first import of torchvision or of a package that imports it.
    """
    if torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _libraries.append(library)
