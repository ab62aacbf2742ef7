"""How well images fit their captions, by the recipe's teacher: the score that image-text data are filtered by.

Cosine similarity of the two towers' embeddings, the CLIP score of LAION-400M (arXiv 2111.02114, section 2) and DataComp
(arXiv 2304.14108, section 5).
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
    """Scores pairs with a teacher that has a text tower; several threads may use it at a time.

    Args:
        teacher: frozen.
        device: of the teacher, to which it is moved.
    """

    def __init__(self, teacher: Teacher, device: torch.device) -> None:
        self._teacher, self._device = teacher.to(device), device
        # Hugging Face's tokenizers refuse a second thread ("Already borrowed")
        self._text = threading.Lock()

    @torch.no_grad()
    def scores(self, pixels: npt.NDArray[np.uint8], captions: list[str]) -> Tensor:
        """Cosine similarities `[b]`, -1 to 1 in float32, of images `[b, 3, H, W]` and their captions."""
        with self._text:
            texts = self._teacher.embed_texts(captions)
        images = self._teacher.embed_images(normalise(torch.from_numpy(pixels).to(self._device)))
        return (images.float() * texts.float()).sum(1)
