"""The Fréchet distance against its formula and another library; FID's network from safely read weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.metrics.frechet import InceptionFeatures, frechet_distance
from tests.helpers.inception import random_inception_state


def features(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mixing + torch.rand(width, generator=generator)


def by_formula(a: Tensor, b: Tensor) -> float:
    """Heusel et al., eq. 6, with the root's trace from the eigenvalues of the product."""
    first, second = a.double().numpy(), b.double().numpy()
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    gap = first.mean(0) - second.mean(0)
    return float(gap @ gap + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root)


@pytest.mark.parametrize(("count", "other"), [(200, 200), (300, 40), (8, 12)])
def test_distance_equals_its_formula(count: int, other: int) -> None:
    """Also with fewer images than features, where the covariances have no full rank."""
    a, b = features(count, 16, 0), 1.5 * features(other, 16, 1)
    assert frechet_distance(a, b) == pytest.approx(by_formula(a, b), rel=1e-5)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_distance_equals_torch_fidelitys() -> None:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    a, b = features(200, 16, 2), features(150, 16, 3)
    statistics = [fid_features_to_statistics(values.double()) for values in (a, b)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("count", [100, 5])
def test_a_set_has_no_distance_to_itself_in_any_order(count: int) -> None:
    a = features(count, 16, 4)
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-8 * float(a.square().mean()))


def test_a_shift_costs_its_square() -> None:
    a = features(50, 16, 5)
    assert frechet_distance(a + 2.0, a) == pytest.approx(16 * 4, rel=1e-6)


def test_one_image_has_no_spread() -> None:
    with pytest.raises(ValueError, match="needs at least two images per set, but there are 1 and 3; hold out more"):
        frechet_distance(torch.zeros(1, 4), torch.zeros(3, 4))


@pytest.fixture(scope="module")
def inception_state() -> dict[str, Tensor]:
    return random_inception_state()


def test_features_are_those_of_torch_fidelitys_network(inception_state: dict[str, Tensor], tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save(inception_state, tmp_path / "weights.pth")
    theirs = FeatureExtractorInceptionV3("own", ["2048"], feature_extractor_weights_path=str(tmp_path / "weights.pth"))
    ours = InceptionFeatures(torch.load(tmp_path / "weights.pth", weights_only=True))
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = ours(pixels)
    assert found.shape == (2, 2048)
    assert torch.equal(found, theirs(pixels)[0])


def test_weights_of_another_network_are_refused_by_name(inception_state: dict[str, Tensor]) -> None:
    lacking = {name: value for name, value in inception_state.items() if name != "fc.bias"}
    with pytest.raises(ValueError, match=r"do not fit torch-fidelity's network: .*fc\.bias.*; give its weights"):
        InceptionFeatures(lacking)
