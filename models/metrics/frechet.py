"""Fréchet distance between two sets of images in a network's feature space, and the InceptionV3 that FID uses.

Shape legend: B batch, N images, F features, H W pixels.
"""

from __future__ import annotations

import io
from importlib import metadata

import torch
from torch import Tensor, nn

from models.published import on_one_line

INCEPTION_FEATURES = 2048
"""Width of InceptionV3's last pooling, the features that FID compares (arXiv 1706.08500, section on FID)."""


def frechet_distance(features: Tensor, references: Tensor) -> float:
    """Compute `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))` of two sets (FID, arXiv 1706.08500, eq. 6), in float64.

    With `S = R^T R` the trace of the root is the sum of the singular values of `R1 R2^T`, so no root of a singular
    matrix is taken: sets with fewer images than features are no numerical problem. Few images still bias the distance,
    so the number of images should be reported with it.

    Args:
        features: `[N, F]` features of one set.
        references: `[M, F]` features of the other set.

    Raises:
        ValueError: a set has fewer than two images.
    """
    if min(len(features), len(references)) < 2:
        raise ValueError(
            f"a Fréchet distance needs at least two images per set, but there are {len(features)} and "
            f"{len(references)}; hold out more images"
        )
    (mean, root), (other_mean, other_root) = _moments(features), _moments(references)
    shared = torch.linalg.svdvals(root @ other_root.T).sum()
    spread = root.square().sum() + other_root.square().sum() - 2 * shared
    return max(0.0, float((mean - other_mean).square().sum() + spread))  # equal sets may round below 0


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean `[F]` and an upper triangular `R` such that `R^T R` is the covariance."""
    values = features.double().cpu()
    mean = values.mean(0)
    root = torch.linalg.qr((values - mean) / (len(values) - 1) ** 0.5, mode="r").R
    return mean, root


class InceptionFeatures(nn.Module):
    """torch-fidelity's InceptionV3 with the weights of the original FID; maps uint8 images to FID's features."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        """
        Args:
            state: the state dict of torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`.

        Raises:
            ValueError: keys or shapes do not fit; the message names them.
        """
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity unpickles the file that it is given, so it is given a copy of tensors that were read safely
        copy = io.BytesIO()
        torch.save(state, copy)
        copy.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception", [str(INCEPTION_FEATURES)], feature_extractor_weights_path=copy
            )
        except (RuntimeError, TypeError) as error:
            reason = on_one_line(error, 300)
            raise ValueError(
                f"the Inception weights do not fit torch-fidelity's network: {reason}; give its "
                f"weights-inception-2015-12-05-6726825d.pth"
            ) from error

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Map uint8 images `[B, 3, H, W]` to features `[B, 2048]`; they are resized to 299 px as in TensorFlow 1."""
        (features,) = self.network(pixels)
        assert isinstance(features, Tensor), "one layer was asked for"
        return features

    @staticmethod
    def library() -> str:
        """Return the name and version of the library, which should be reported with an FID."""
        return f"torch-fidelity {metadata.version('torch-fidelity')}"
