import pytest
import torch
from torch import Tensor

from models.language.sampling import SamplingConfig, guided, pick


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(logits: Tensor, config: SamplingConfig, count: int = 4000) -> Tensor:
    """How often each index is drawn."""
    return torch.bincount(pick(logits.expand(count, -1), config, seeded()), minlength=len(logits)) / count


LOGITS = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(0)
    torch.testing.assert_close(draws(LOGITS, SamplingConfig(temperature=temperature)), expected, atol=0.03, rtol=0)


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draws(LOGITS, SamplingConfig(temperature=0), 50).tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("fields", "support"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 3}, 3),
        ({"top_k": 99}, 5),
        ({"top_p": 0.0}, 1),
        ({"top_p": 0.39}, 1),
        ({"top_p": 0.41}, 2),
        ({"top_p": 0.8}, 3),
        ({"top_k": 2, "top_p": 0.99}, 2),
        ({"top_p": 0.5, "top_k": 4}, 2),
    ],
)
def test_support_is_the_expected_one(fields: dict[str, float], support: int) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])  # the likeliest are not the first
    frequencies = draws(LOGITS[order], SamplingConfig(**fields))[order.argsort()]
    expected = LOGITS.exp().clone()
    expected[support:] = 0
    torch.testing.assert_close(frequencies, expected / expected.sum(), atol=0.03, rtol=0)


def test_rows_are_drawn_each_from_its_own_distribution() -> None:
    logits = torch.full((3, 6), -50.0)
    logits[torch.arange(3), torch.tensor([5, 0, 2])] = 50.0
    assert pick(logits, SamplingConfig(top_k=2, top_p=0.9), seeded()).tolist() == [5, 0, 2]


def test_guidance_moves_away_from_the_unconditional_logits() -> None:
    conditional, without = torch.randn(2, 5), torch.randn(2, 5)
    both = torch.cat([conditional, without])
    torch.testing.assert_close(
        guided(both, SamplingConfig(guidance=3.0)), without + 3 * (conditional - without), atol=1e-6, rtol=1e-6
    )
    assert torch.equal(guided(conditional, SamplingConfig(guidance=1.0)), conditional)
