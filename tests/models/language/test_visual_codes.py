"""Several codes a position: likelihoods and draws against loops that are written out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.language.decoding import answer_tokens, draw_codes
from models.language.sampling import SamplingConfig
from models.language.visual_codes import VisualCodes, VisualCodesConfig
from models.language.vlm import IGNORED, ImageCodes, LlmConfig, UnifiedVlm, build_small_llm, mean_log_likelihood
from models.language.vocabulary import Vocabulary, extend_tokenizer, train_bpe
from stages.language.sequences import SequenceBuilder

BOOKS, DEPTH, SIZE, DIM = 2, 3, 7, 4


@pytest.fixture(params=["shared", "own"])
def vlm(request: pytest.FixtureRequest) -> UnifiedVlm:
    """A small model over 2 x 2 positions of 2 books and 3 depths, with codebooks shared by depths or not."""
    torch.manual_seed(0)
    tokenizer = train_bpe(["a red fox", "What is it?"], 280)
    vocabulary = extend_tokenizer(tokenizer, (SIZE,) * BOOKS, (BOOKS, DEPTH, 2, 2))
    config = LlmConfig(hidden_size=36, num_layers=2, num_heads=2, intermediate_size=48, max_positions=64)
    codebooks = [torch.randn(1 if request.param == "shared" else DEPTH, SIZE, DIM) for _ in range(BOOKS)]
    visual = VisualCodes(VisualCodesConfig(width=16, layers=2, heads=2), 36, codebooks, DEPTH)
    made = UnifiedVlm(build_small_llm(config, vocabulary), vocabulary, visual).eval()
    for parameter in made.parameters():
        parameter.data.mul_(3.0)
    made.builder = SequenceBuilder(tokenizer, vocabulary, 64)
    return made


def image(seed: int = 0) -> Tensor:
    return torch.randint(SIZE, (BOOKS, DEPTH, 2, 2), generator=torch.Generator().manual_seed(seed))


def log_probabilities(vlm: UnifiedVlm, hidden: Tensor, codes: Tensor, book: int) -> Tensor:
    """`[D, K]` for one position, each depth from a pass over the depths before it alone."""
    head: Any = vlm.visual.heads[book]
    rows = []
    for depth in range(DEPTH):
        vectors = [head.codebook[min(d, len(head.codebook) - 1)][codes[d]] for d in range(depth)]
        tokens = [head.from_hidden(hidden)] + [head.from_code(sum(vectors[: d + 1])) for d in range(depth)]
        stacked = torch.stack(tokens)[None] + head.positions[: depth + 1]
        rows.append(head.classify(head.norm(head.blocks(stacked)))[0, -1].log_softmax(-1))
    return torch.stack(rows)


def inputs_of(vlm: UnifiedVlm, token_ids: list[int], codes: Tensor) -> Tensor:
    """`[1, T, H]`, position by position."""
    table, visual = vlm.llm.get_input_embeddings().weight, vlm.visual
    rows, position = [], 0
    for token in token_ids:
        if token != vlm.vocabulary.first_code:
            rows.append(table[token])
            continue
        parts = []
        for book in range(BOOKS):
            head: Any = visual.heads[book]
            own = codes[book, :, position // 2, position % 2]
            total = sum(head.codebook[min(d, len(head.codebook) - 1)][own[d]] for d in range(DEPTH))
            parts.append(visual.inputs[book](total))
        rows.append(torch.cat(parts))
        position += 1
    return torch.stack(rows)[None]


@torch.no_grad()
def test_the_likelihood_of_an_image_is_that_of_all_its_codes(vlm: UnifiedVlm) -> None:
    builder, codes, other = vlm.builder, image(1), image(2)
    sequence = builder.generation("a red fox", codes, seen=other)
    batch = builder.batch([sequence, builder.pretraining("a", codes, image_first=True)])
    measured = mean_log_likelihood(vlm, *batch)[0]
    hidden = vlm.llm.base_model(inputs_embeds=inputs_of(vlm, sequence.token_ids, other)).last_hidden_state[0]
    total, count, position = torch.zeros(()), 0, 0
    for at, label in enumerate(sequence.labels):
        if label == IGNORED:
            continue
        count += 1
        if label != vlm.vocabulary.first_code:
            total = total + vlm.llm.get_output_embeddings()(hidden[at - 1]).log_softmax(-1)[label]
            continue
        for book in range(BOOKS):
            own = codes[book, :, position // 2, position % 2]
            known = log_probabilities(vlm, hidden[at - 1], own, book)
            total = total + sum(known[depth, own[depth]] for depth in range(DEPTH))
        position += 1
    assert (count, position) == (6, 4)
    torch.testing.assert_close(measured, total / count, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_likelihood_of_an_answer_depends_on_the_codes_shown(vlm: UnifiedVlm) -> None:
    sequences = [vlm.builder.understanding(image(seed), "What is it?", "a red fox") for seed in (1, 1, 2)]
    first, same, other = mean_log_likelihood(vlm, *vlm.builder.batch(sequences)).tolist()
    assert first == pytest.approx(same, abs=1e-5)
    assert abs(first - other) > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_greedy_codes_equal_a_loop_without_cache_or_padding(vlm: UnifiedVlm, guidance: float) -> None:
    builder = vlm.builder
    prompts, nothing = [builder.drawing_prompt(text) for text in ("a red fox", "a")], builder.drawing_prompt("")
    config = SamplingConfig(guidance=guidance, temperature=0)
    drawn = draw_codes(vlm, prompts, nothing, config, torch.Generator())
    assert drawn.shape == (2, BOOKS, DEPTH, 2, 2)
    visual = [vlm.vocabulary.first_code]
    for prompt, codes in zip(prompts, drawn, strict=True):
        for position in range(4):
            hidden = [
                vlm.llm.base_model(inputs_embeds=inputs_of(vlm, asked + visual * position, codes)).last_hidden_state[
                    0, -1
                ]
                for asked in (prompt, nothing)
            ]
            for book in range(BOOKS):
                own = codes[book, :, position // 2, position % 2]
                conditional, without = (log_probabilities(vlm, state, own, book) for state in hidden)
                wanted = (without + guidance * (conditional - without)).argmax(-1)
                assert torch.equal(own, wanted)


def test_answers_are_text_alone(vlm: UnifiedVlm) -> None:
    prompt = vlm.builder.question(image(), "What is it?")
    assert prompt.codes is not None
    answer = answer_tokens(vlm, prompt.token_ids, prompt.codes.shown, max_tokens=6)
    markers = {vlm.vocabulary.pad, vlm.vocabulary.user, vlm.vocabulary.soi, vlm.vocabulary.eoi}
    assert all(token < vlm.vocabulary.first_code and token not in markers for token in answer)


def test_every_part_learns_and_codebooks_do_not(vlm: UnifiedVlm) -> None:
    batch = vlm.builder.batch([vlm.builder.pretraining("a red fox", image(), image_first=True)])
    losses, _ = vlm.train().losses(*batch)
    losses.sum().backward()
    for name, parameter in vlm.visual.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name
    assert not any("codebook" in name for name, _ in vlm.named_parameters())


def test_the_sum_over_the_layers_begins_in_full_precision_under_autocast(vlm: UnifiedVlm) -> None:
    codes = image().flatten(2).permute(2, 0, 1)
    positions = torch.full((1, len(codes)), vlm.vocabulary.first_code)
    with torch.autocast("cpu", torch.bfloat16):
        assert vlm.embed(positions, codes).dtype == torch.float32
        assert vlm.embed_codes(codes).dtype == torch.float32


def test_a_batch_without_images_has_a_text_loss(vlm: UnifiedVlm) -> None:
    token_ids = torch.tensor([vlm.builder.text("a red fox")])
    losses, rows = vlm.losses(
        token_ids, token_ids, torch.ones_like(token_ids), ImageCodes(*[torch.zeros(0, BOOKS, DEPTH).long()] * 2)
    )
    expected = vlm.llm(token_ids, labels=token_ids).loss
    torch.testing.assert_close(losses.mean(), expected)
    assert len(rows) == token_ids.shape[1] - 1


def test_visual_parts_and_vocabulary_must_fit(vlm: UnifiedVlm) -> None:
    with pytest.raises(ValueError, match="several"):
        UnifiedVlm(vlm.llm, vlm.vocabulary)
    fields = vlm.vocabulary.__dict__ | {"codebook_sizes": (SIZE,), "code_shape": (1, 1, 2, 2)}
    with pytest.raises(ValueError, match="several"):
        UnifiedVlm(vlm.llm, Vocabulary(**fields), vlm.visual)
