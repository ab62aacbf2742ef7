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
"""`name`: the text of a class is its name; `openai`: the mean over CLIP's 80 templates for ImageNet."""
_BATCH = 256
"""Number of texts per batch; all captions of a large held-out split may be classes."""


def class_embeddings(teacher: Teacher, names: list[str], templates: Templates) -> Tensor:
    """Embed classes as unit vectors `[K, E]` on the CPU.

    Args:
        teacher: a teacher with a text tower.
        names: the names of the K classes.
        templates: the sentences into which a name is inserted.

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
    """Count the other classes that are at least as similar to each image as its own: 0 is correct, below 5 is top-5.

    Ties count as errors; otherwise a decoder whose output is the same for every image would always be correct.

    Args:
        images: unit vectors `[B, E]`.
        classes: unit vectors `[K, E]`.
        labels: index of each image's class, `[B]` int64.

    Returns:
        `[B]` int64.

    Raises:
        ValueError: a similarity is not finite.
    """
    similarity = images.float() @ classes.float().T  # [B, K]
    if not similarity.isfinite().all():
        raise ValueError(
            "similarities of images and classes are not finite; the features of the tokenizer or of the teacher are not"
        )
    own = similarity.gather(1, labels[:, None])
    return (similarity >= own).sum(1) - 1
