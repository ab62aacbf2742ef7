"""Zero-shot classification by image-text similarity (CLIP, arXiv 2103.00020, section 3.1).

Shape legend: B batch, K classes, E channels of the image-text space.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.teachers.teacher import Teacher

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
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    total = torch.zeros(())
    for template in OPENAI_IMAGENET_TEMPLATES:
        total = total + torch.cat(
            [teacher.embed_texts([template(name) for name in part]).float().cpu() for part in parts]
        )
    return F.normalize(total, dim=-1)


def class_ranks(images: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """How many other classes are at least as similar to each image as its own: 0 is right, below 5 in the first five.

    Equal ones count against it, or a decoder that says the same of everything would be right every time.

    Args:
        images: unit vectors `[B, E]`.
        classes: unit vectors `[K, E]`.
        labels: class of each image, `[B]` int64.

    Returns:
        `[B]` int64.

    Raises:
        ValueError: a similarity is not finite.
    """
    similarity = images.float() @ classes.float().T  # [B, K]
    if not similarity.isfinite().all():
        raise ValueError(
            "similarities of images and classes are not finite; the tokenizer's features or the teacher's are"
        )
    own = similarity.gather(1, labels[:, None])
    return (similarity >= own).sum(1) - 1
