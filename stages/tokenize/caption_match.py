"""Scoring of how well images match their captions, by the recipe's teacher, to filter image-text data.

The score is the cosine similarity of the image and text embeddings, the CLIP score of LAION-400M (arXiv 2111.02114,
section 2) and DataComp (arXiv 2304.14108, section 5).
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.teachers.teacher import Teacher
from models.transforms import normalise


class CaptionMatch:
    """Scores pairs with a teacher that has a text tower; it can be used by several threads at a time.

    Args:
        teacher: the frozen teacher.
        device: device to which the teacher is moved.
    """

    def __init__(self, teacher: Teacher, device: torch.device) -> None:
        self._teacher, self._device = teacher.to(device), device
        # Hugging Face's tokenizers raise "Already borrowed" if two threads use them
        self._text = threading.Lock()

    @torch.no_grad()
    def scores(self, pixels: npt.NDArray[np.uint8], captions: list[str]) -> Tensor:
        """Return the cosine similarities `[b]`, float32 in -1..1, of images `[b, 3, H, W]` and their captions."""
        with self._text:
            texts = self._teacher.embed_texts(captions)
        images = self._teacher.embed_images(normalise(torch.from_numpy(pixels).to(self._device)))
        return (images.float() * texts.float()).sum(1)
