"""Inception weights for tests: random, in the layout of torch-fidelity's checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def random_inception_state() -> dict[str, Tensor]:
    """The state dict of torch-fidelity's network, made without the download that its constructor starts."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = library.FeatureExtractorInceptionV3("random", ["2048"])
    state: dict[str, Tensor] = network.state_dict()
    return state
