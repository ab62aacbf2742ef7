from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.language.decoding import answer_tokens, draw_codes
from models.language.sampling import SamplingConfig
from models.language.vlm import LlmConfig, UnifiedVlm, build_small_llm
from models.language.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    pad=0, eos=1, user=2, assistant=3, soi=4, eoi=5, first_code=20, codebook_sizes=(12,), code_shape=(1, 1, 2, 3)
)
PROMPTS = [[2, 10, 11, 12, 3, 4], [2, 13, 3, 4], [2, 7, 8, 9, 14, 15, 16, 3, 4]]
UNCONDITIONAL = [2, 3, 4]


@pytest.fixture(scope="module")
def vlm() -> UnifiedVlm:
    torch.manual_seed(0)
    config = LlmConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, max_positions=64)
    made = build_small_llm(config, VOCABULARY).eval()
    for parameter in made.parameters():  # larger weights: a context that matters, and no near-ties
        parameter.data.mul_(6.0)
    return UnifiedVlm(made, VOCABULARY)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def code_logits(vlm: UnifiedVlm, row: list[int]) -> Tensor:
    with torch.no_grad():
        return vlm.llm(torch.tensor([row])).logits[0, -1, 20:32]


@pytest.mark.parametrize("guidance", [1.0, 0.0, 3.0])
def test_greedy_codes_equal_a_loop_without_cache_or_padding(vlm: UnifiedVlm, guidance: float) -> None:
    drawn = draw_codes(vlm, PROMPTS, UNCONDITIONAL, SamplingConfig(guidance=guidance, temperature=0), seeded())
    assert drawn.shape == (3, 1, 1, 2, 3)
    for prompt, codes in zip(PROMPTS, drawn, strict=True):
        conditional, without = list(prompt), list(UNCONDITIONAL)
        for code in codes.flatten().tolist():
            u = code_logits(vlm, without)
            logits = u + guidance * (code_logits(vlm, conditional) - u)
            assert code == int(logits.argmax())
            conditional.append(20 + code)
            without.append(20 + code)


def test_the_seed_decides_the_draw(vlm: UnifiedVlm) -> None:
    config = SamplingConfig(temperature=2.0)
    first, again, other = (draw_codes(vlm, PROMPTS, UNCONDITIONAL, config, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert int(first.min()) >= 0 and int(first.max()) < 12


def test_answers_equal_a_loop_without_cache(vlm: UnifiedVlm) -> None:
    prompt = [2, 4, *range(20, 26), 5, 9, 10, 3]
    answer = answer_tokens(vlm, prompt, None, max_tokens=8)
    row = list(prompt)
    allowed = torch.full((32,), float("-inf"))
    allowed[[VOCABULARY.eos, *range(6, 20)]] = 0.0
    for token in answer:
        with torch.no_grad():
            assert token == int((vlm.llm(torch.tensor([row])).logits[0, -1] + allowed).argmax())
        row.append(token)
    assert answer


class Favouring(torch.nn.Module):
    """A causal LM whose next token is always the first of a list that is allowed to be one."""

    def __init__(self, favourites: list[int], size: int = 32) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(size, 4)
        self.logits = torch.zeros(size)
        for rank, token in enumerate(favourites):
            self.logits[token] = 100.0 - rank

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def forward(self, inputs_embeds: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(1, 1, -1).clone(), past_key_values=None)


def answer_of(
    favourites: list[int], vocabulary: Vocabulary = VOCABULARY, *, size: int = 32, **options: Any
) -> list[int]:
    model: Any = Favouring(favourites, size)
    return answer_tokens(UnifiedVlm(model, vocabulary), [2, 3], None, max_tokens=4, **options)


def test_answers_hold_no_codes_and_no_markers() -> None:
    favourites = [*range(20, 32), VOCABULARY.pad, VOCABULARY.user, VOCABULARY.assistant, VOCABULARY.soi, VOCABULARY.eoi]
    assert answer_of([*favourites, 9]) == [9] * 4


def test_answers_hold_no_control_token_of_a_published_tokenizer() -> None:
    assert answer_of([7, 8, 9], control_ids={7, 8, VOCABULARY.eos, 25}) == [9] * 4
    assert answer_of([VOCABULARY.eos, 9], control_ids={VOCABULARY.eos}) == [], "the end stays what it is"


def test_answers_hold_no_row_beyond_the_vocabulary() -> None:
    assert answer_of([35, 9], size=40) == [9] * 4


def test_the_end_ends_an_answer() -> None:
    assert answer_of([VOCABULARY.eos]) == []


def test_the_end_ends_an_answer_where_it_is_the_padding_too() -> None:
    fields = VOCABULARY.__dict__ | {"pad": VOCABULARY.eos}
    assert answer_of([VOCABULARY.eos], Vocabulary(**fields)) == []
