from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.sampling import SamplingConfig, answer_tokens, draw_codes, pick
from models.vlm import LlmConfig, build_small_llm
from models.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    pad=0, eos=1, user=2, assistant=3, soi=4, eoi=5, first_code=20, codebook_size=12, code_rows=2, code_columns=3
)
PROMPTS = [[2, 10, 11, 12, 3, 4], [2, 13, 3, 4], [2, 7, 8, 9, 14, 15, 16, 3, 4]]
UNCONDITIONAL = [2, 3, 4]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlmConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, max_positions=64)
    made = build_small_llm(config, VOCABULARY).eval()
    for parameter in made.parameters():  # larger weights: a context that matters, and no near-ties
        parameter.data.mul_(6.0)
    return made


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def code_logits(model: Any, row: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0, -1, 20:32]


@pytest.mark.parametrize("guidance", [1.0, 0.0, 3.0])
def test_greedy_codes_equal_a_loop_without_cache_or_padding(model: Any, guidance: float) -> None:
    drawn = draw_codes(
        model, VOCABULARY, PROMPTS, UNCONDITIONAL, SamplingConfig(guidance=guidance, temperature=0), seeded()
    )
    assert drawn.shape == (3, 2, 3)
    for prompt, codes in zip(PROMPTS, drawn, strict=True):
        conditional, without = list(prompt), list(UNCONDITIONAL)
        for code in codes.flatten().tolist():
            u = code_logits(model, without)
            logits = u + guidance * (code_logits(model, conditional) - u)
            assert code == int(logits.argmax())
            conditional.append(20 + code)
            without.append(20 + code)


def test_the_seed_decides_the_draw(model: Any) -> None:
    config = SamplingConfig(temperature=2.0)
    first, again, other = (
        draw_codes(model, VOCABULARY, PROMPTS, UNCONDITIONAL, config, seeded(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert int(first.min()) >= 0 and int(first.max()) < 12


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


def test_answers_equal_a_loop_without_cache(model: Any) -> None:
    prompt = [2, 4, *range(20, 26), 5, 9, 10, 3]
    answer = answer_tokens(model, VOCABULARY, prompt, max_tokens=8)
    row = list(prompt)
    allowed = torch.full((32,), float("-inf"))
    allowed[[VOCABULARY.eos, *range(6, 20)]] = 0.0
    for token in answer:
        with torch.no_grad():
            assert token == int((model(torch.tensor([row])).logits[0, -1] + allowed).argmax())
        row.append(token)
    assert answer


class Favouring(torch.nn.Module):
    """A causal LM whose next token is always the first of a list that is allowed to be one."""

    def __init__(self, favourites: list[int], size: int = 32) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.logits = torch.zeros(size)
        for rank, token in enumerate(favourites):
            self.logits[token] = 100.0 - rank

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(1, 1, -1).clone(), past_key_values=None)


def test_answers_hold_no_codes_and_no_markers() -> None:
    favourites = [*range(20, 32), VOCABULARY.pad, VOCABULARY.user, VOCABULARY.assistant, VOCABULARY.soi, VOCABULARY.eoi]
    assert answer_tokens(Favouring([*favourites, 9]), VOCABULARY, [2, 3], max_tokens=4) == [9] * 4


def test_answers_hold_no_row_beyond_the_vocabulary() -> None:
    assert answer_tokens(Favouring([35, 9], size=40), VOCABULARY, [2, 3], max_tokens=2) == [9, 9]


def test_the_end_ends_an_answer() -> None:
    assert answer_tokens(Favouring([VOCABULARY.eos]), VOCABULARY, [2, 3], max_tokens=4) == []


def test_the_end_ends_an_answer_where_it_is_the_padding_too() -> None:
    fields = VOCABULARY.__dict__ | {"pad": VOCABULARY.eos}
    assert answer_tokens(Favouring([VOCABULARY.eos]), Vocabulary(**fields), [2, 3], max_tokens=4) == []
