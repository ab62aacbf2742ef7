"""Zero-shot classification by image-text similarity (CLIP, arXiv 2103.00020, section 3.1).

Shape legend: B batch, K classes, E channels of the image-text space.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.teachers import Teacher
from models.torchvision_compat import make_torchvision_importable

Templates = Literal["name", "openai"]
"""`name`: a class is its name; `openai`: the mean over the 80 sentences of CLIP's ImageNet evaluation."""
_BATCH = 256
"""Texts at a time; the captions of a large held-out split may all be classes."""


def class_embeddings(teacher: Teacher, names: list[str], templates: Templates) -> Tensor:
    """Unit vectors `[K, E]` of classes, on the CPU.

    Args:
        teacher: with a text tower.
        names: of the classes, K of them.
        templates: in which sentences a name stands.

    Raises:
        ValueError: the teacher has no text tower.
    """
    parts = [names[start : start + _BATCH] for start in range(0, len(names), _BATCH)]
    if templates == "name":
        return torch.cat([teacher.embed_texts(part).float().cpu() for part in parts])
    make_torchvision_importable()
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    total = torch.zeros(())
    for template in OPENAI_IMAGENET_TEMPLATES:
        total = total + torch.cat(
            [teacher.embed_texts([template(name) for name in part]).float().cpu() for part in parts]
        )
    return F.normalize(total, dim=-1)


def class_ranks(images: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """How many classes are more similar to each image than its own: 0 is right, below 5 is among the first five.

    Args:
        images: unit vectors `[B, E]`.
        classes: unit vectors `[K, E]`.
        labels: class of each image, `[B]` int64.

    Returns:
        `[B]` int64.
    """
    similarity = images.float() @ classes.float().T  # [B, K]
    own = similarity.gather(1, labels[:, None])
    return (similarity > own).sum(1)
