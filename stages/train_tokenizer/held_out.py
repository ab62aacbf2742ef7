"""Metrics of a trained tokenizer on the held-out images, which are the metrics of its artifact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.ranks import gather_objects, num_ranks, rank
from models.tokenizers.image_tokenizer import ImageTokenizer
from models.transforms import normalise
from stages.artifacts.images import ImageSource
from stages.metrics.reconstructions import (
    ReconstructionMeasures,
    codebook_rows,
    held_out_rows,
    reconstruction_rows,
)
from stages.runtime.devices import autocast
from stages.runtime.progress import tracked

_BATCH = 32
_CODES = "codes"


@dataclass(frozen=True)
class HeldOut:
    """Held-out images and the measurement of a tokenizer on them."""

    source: ImageSource
    split: str
    """Name of the split of the images."""
    measures: ReconstructionMeasures

    @torch.no_grad()
    def measure(self, tokenizer: ImageTokenizer) -> list[dict[str, Any]]:
        """Encode the images, and return the metric rows of what the codes reconstruct, as evaluation measures them."""
        parts: dict[str, list[Tensor]] = {}
        own = self._own_batches()
        measured = [self._batch(tokenizer, rows) for rows in tracked(iter(own), len(own), "held-out images, batches")]
        for batches in gather_objects(measured):
            for batch in batches:
                for name, value in batch.items():
                    parts.setdefault(name, []).append(value)
        columns = {name: torch.cat(values) for name, values in parts.items()}
        codes = columns.pop(_CODES)
        make = held_out_rows(tokenizer.config.kind, self.split, self.source.transform)
        found = reconstruction_rows(make, columns, self.measures.distance, self.measures.classes)
        return found + codebook_rows(make, codes, tokenizer.book_names, tokenizer.codebook_sizes)

    def _own_batches(self) -> list[list[int]]:
        """Return this rank's batches of the images, in order."""
        every = list(range(len(self.source)))
        batches = [every[start : start + _BATCH] for start in range(0, len(every), _BATCH)]
        each = -(-len(batches) // num_ranks())
        return batches[rank() * each : (rank() + 1) * each]

    def _batch(self, tokenizer: ImageTokenizer, rows: list[int]) -> dict[str, Tensor]:
        """Compute for each row what is averaged or compared later; the tensors are on the CPU."""
        pixels = self.source.pixels(rows)
        with autocast(self.measures.device, self.measures.precision):
            codes = tokenizer.encode(normalise(pixels).to(self.measures.device))
        return self.measures.measure(tokenizer, rows, pixels, codes).columns | {_CODES: codes.cpu()}
