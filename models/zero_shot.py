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


def class_embeddings(teacher: Teacher, names: list[str], templates: Templates) -> Tensor:
    """Unit vectors `[K, E]` of classes.

    Args:
        teacher: with a text tower.
        names: of the classes, K of them.
        templates: in which sentences a name stands.

    Raises:
        ValueError: the teacher has no text tower.
    """
    if templates == "name":
        return teacher.embed_texts(names).float()
    make_torchvision_importable()
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    sentences = [[template(name) for template in OPENAI_IMAGENET_TEMPLATES] for name in names]
    return torch.stack([F.normalize(teacher.embed_texts(texts).float().mean(0), dim=0) for texts in sentences])


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
