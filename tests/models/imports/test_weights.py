"""Where checkpoints of trainings keep their weights, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.imports.weights import weights_of

STATE = {"encoder.weight": torch.ones(2), "decoder.module.bias": torch.zeros(1, dtype=torch.long)}


@pytest.mark.parametrize("key", ["", "ema", "model_ema", "state_dict", "model", "generator"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_are_found_under_any_usual_key_and_prefix(key: str, prefix: str) -> None:
    state = {f"{prefix}{name}": value for name, value in STATE.items()}
    beside = {"epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}, "args": object()}
    found = weights_of({key: state, **beside} if key else state)
    assert found.tensors.keys() == STATE.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in STATE.items())
    assert (found.taken, found.others) == (key, ())


@pytest.mark.parametrize(
    ("keys", "taken"),
    [
        (("model", "ema"), "ema"),
        (("state_dict", "state_dict_ema"), "state_dict_ema"),
        (("model", "discriminator"), "model"),
        (("model", "state_dict"), "state_dict"),
    ],
)
def test_averaged_weights_come_before_the_last_ones(keys: tuple[str, ...], taken: str) -> None:
    checkpoint = {key: {"weight": torch.tensor([float(number)])} for number, key in enumerate(keys)}
    found = weights_of(checkpoint)
    assert found.taken == taken and set(found.others) == set(keys) - {taken}
    for number, key in enumerate(keys):
        assert weights_of(checkpoint, which=key).tensors["weight"].item() == number


def test_submodules_that_were_compiled_have_their_own_names() -> None:
    state = {"encoder._orig_mod.weight": torch.ones(2), "n_averaged": torch.tensor(3)}
    assert weights_of(state).tensors.keys() == {"encoder.weight", "n_averaged"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_no_numbers_are_refused(value: float, dtype: torch.dtype) -> None:
    bad = torch.tensor([0, value], dtype=dtype)
    with pytest.raises(
        ValueError, match=r"^holds NaN or infinite values in 1 of 3 tensors \(bad\), .*earlier checkpoint"
    ):
        weights_of({"model": STATE | {"bad": bad}})


@pytest.mark.parametrize(
    ("checkpoint", "which", "message"),
    [
        ([torch.ones(1)], None, "holds a list, no state dict"),
        ({"model": 3}, None, "holds no dict of tensors, only 'model'"),
        ({}, None, "holds no dict of tensors, only an empty dict"),
        ({"a": STATE, "b": STATE}, None, r"holds several networks \(a, b\); .*--which"),
        ({"a": STATE}, "ema", "holds no weights under the key 'ema'; it has a"),
        (STATE, "ema", "holds no weights under the key 'ema'; it has none under any key"),
        ({"w": torch.ones(1), "module.w": torch.ones(1)}, None, "holds 'w' twice, with and without a wrapper's prefix"),
    ],
)
def test_what_has_no_one_set_of_weights_is_refused(checkpoint: Any, which: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        weights_of(checkpoint, which)
