import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.metrics.measures import codebook_statistics
from models.tokenizers import quantizers
from models.tokenizers.quantizers import (
    ResidualQuantizer,
    ResidualQuantizerConfig,
    VectorQuantizer,
    VectorQuantizerConfig,
    nearest_codes,
)

ROOT = Path(__file__).parents[3]


def brute_force(vectors: Tensor, codebook: Tensor) -> Tensor:
    return (vectors.double()[:, None] - codebook.double()[None]).square().sum(-1).argmin(1)


def small(**fields: Any) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(VectorQuantizerConfig(**({"codebook_size": 16, "code_dim": 4} | fields)))


def initialised(quantizer: VectorQuantizer) -> VectorQuantizer:
    quantizer.initialised.fill_(True)
    return quantizer


@pytest.mark.parametrize("normalised", [True, False])
def test_nearest_codes_equals_float64_brute_force(normalised: bool) -> None:
    torch.manual_seed(0)
    vectors, codebook = torch.randn(500, 8), torch.randn(300, 8)
    if normalised:
        vectors, codebook = F.normalize(vectors, dim=1), F.normalize(codebook, dim=1)
    assert torch.equal(nearest_codes(vectors, codebook), brute_force(vectors, codebook))


@pytest.mark.parametrize("num_vectors", [0, 1, 3, 4, 5, 9])
def test_chunks_do_not_change_the_codes(num_vectors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vectors, codebook = torch.randn(num_vectors, 8), torch.randn(32, 8)
    monkeypatch.setattr(quantizers, "_CHUNK_ELEMENTS", 4 * 32)
    assert torch.equal(nearest_codes(vectors, codebook), brute_force(vectors, codebook))


def test_a_codebook_larger_than_a_chunk_is_searched_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "_CHUNK_ELEMENTS", 8)
    vectors, codebook = torch.randn(5, 3), torch.randn(40, 3)
    assert torch.equal(nearest_codes(vectors, codebook), brute_force(vectors, codebook))


def test_codes_under_bf16_autocast_are_float32_decisions() -> None:
    torch.manual_seed(0)
    codebook = F.normalize(torch.randn(2000, 8), dim=1)
    vectors = F.normalize(torch.randn(500, 8), dim=1)
    expected = brute_force(vectors, codebook)
    in_bf16 = (vectors.bfloat16() @ codebook.bfloat16().T).argmax(1)
    assert not torch.equal(in_bf16, expected), "bf16 has to be wrong somewhere, or this proves nothing"
    quantizer = initialised(small(codebook_size=2000, code_dim=8)).eval()
    quantizer.codebook.copy_(codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_codes(vectors, codebook), expected)
        assert torch.equal(quantizer(vectors).codes, expected)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_gradient_passes_straight_through(update: str) -> None:
    quantizer = small(update=update, l2_normalised=False, commitment_weight=0.0, codebook_weight=0.0).eval()
    vectors = torch.randn(2, 3, 4, requires_grad=True)
    output = quantizer(vectors)
    upstream = torch.randn_like(output.vectors)
    (output.vectors * upstream).sum().backward()
    torch.testing.assert_close(vectors.grad, upstream)
    torch.testing.assert_close(output.vectors, quantizer.lookup(output.codes))


def test_normalised_gradient_is_that_of_normalisation() -> None:
    quantizer = small(commitment_weight=0.0).eval()
    vectors = torch.randn(6, 4, requires_grad=True)
    upstream = torch.randn(6, 4)
    (quantizer(vectors).vectors * upstream).sum().backward()
    (expected,) = torch.autograd.grad((F.normalize(vectors, dim=1) * upstream).sum(), vectors)
    torch.testing.assert_close(vectors.grad, expected)


@pytest.mark.parametrize("normalised", [True, False])
def test_ema_equals_a_written_out_ema(normalised: bool) -> None:
    decay = 0.9
    quantizer = initialised(small(l2_normalised=normalised, ema_decay=decay, dead_threshold=0.0)).train()
    counts, sums = [1.0] * 16, quantizer.codebook.double().clone()
    codebook = sums.clone()
    for step in range(5):
        torch.manual_seed(step)
        vectors = torch.randn(2, 5, 4)
        flat = vectors.reshape(-1, 4).double()
        flat = F.normalize(flat, dim=1) if normalised else flat
        codes = brute_force(flat, codebook)
        assert torch.equal(quantizer(vectors).codes.flatten(), codes)
        for code in range(16):
            members = flat[codes == code]
            counts[code] = decay * counts[code] + (1 - decay) * len(members)
            sums[code] = decay * sums[code] + (1 - decay) * members.sum(0)
            mean = sums[code] / counts[code]
            codebook[code] = F.normalize(mean, dim=0) if normalised else mean
        torch.testing.assert_close(quantizer.codebook.double(), codebook, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(quantizer.ema_counts.double(), torch.tensor(counts).double())


def test_first_batch_initialises_the_codebook_from_its_vectors() -> None:
    quantizer = small(l2_normalised=False, ema_decay=1.0, dead_threshold=0.0).train()
    vectors = 5 + torch.randn(40, 4)
    quantizer(vectors)
    assert bool(quantizer.initialised)
    distances = torch.cdist(quantizer.codebook, vectors)
    assert float(distances.min(1).values.max()) < 0.02
    assert len(distances.argmin(1).unique()) == 16, "no vector is drawn twice while there are enough"


def test_dead_codes_become_vectors_of_the_batch() -> None:
    quantizer = initialised(small(l2_normalised=False, ema_decay=0.5, dead_threshold=0.6)).train()
    quantizer.codebook.copy_(100 + torch.randn(16, 4))
    quantizer.codebook[0] = 0.0
    quantizer.ema_sums.copy_(quantizer.codebook)
    vectors = torch.randn(64, 4)
    quantizer(vectors)  # all vectors go to code 0; the counts of the others fall to 0.5
    assert float(torch.cdist(quantizer.codebook[1:], vectors).min(1).values.max()) < 0.02
    torch.testing.assert_close(quantizer.ema_counts[1:], torch.ones(15))
    assert len(quantizer(vectors).codes.unique()) > 8


@pytest.mark.parametrize(("threshold", "restarted"), [(1.0, 15), (0.05, 0)])
def test_a_threshold_of_one_restarts_what_one_batch_does_not_choose(threshold: float, restarted: int) -> None:
    """RQ-VAE's released rule, in the recipes of VILA-U and DualToken, against ours."""
    quantizer = initialised(small(l2_normalised=False, ema_decay=0.99, dead_threshold=threshold)).train()
    before = quantizer.codebook.clone()
    quantizer(before[:1].expand(8, 4).clone())
    assert int(((quantizer.codebook - before).norm(dim=1) > 0.1).sum()) == restarted


def test_more_dead_codes_than_vectors_are_all_replaced() -> None:
    quantizer = initialised(small(l2_normalised=False, ema_decay=0.0, dead_threshold=0.5)).train()
    vectors = torch.randn(3, 4)
    used = len(set(brute_force(vectors, quantizer.codebook).tolist()))
    quantizer(vectors)
    near = torch.cdist(quantizer.codebook, vectors).min(1).values < 0.02
    assert int(near.sum()) >= 16 - used


@pytest.mark.parametrize("normalised", [True, False])
def test_an_idle_code_that_is_never_restarted_stays_where_it_was(normalised: bool) -> None:
    quantizer = initialised(small(l2_normalised=normalised, ema_decay=0.5, dead_threshold=0.0)).train()
    vectors = quantizer.codebook[:1].expand(8, 4).clone()
    before = quantizer.codebook.clone()
    for _ in range(200):  # 0.5 ** 200 is no float32
        quantizer(vectors)
    assert float(quantizer.ema_counts[1:].max()) == 0.0
    torch.testing.assert_close(quantizer.codebook, before)
    quantizer(before[3:4])
    torch.testing.assert_close(quantizer.codebook, before)
    torch.testing.assert_close(quantizer.ema_counts[3], torch.tensor(0.5), msg="a code that is met again comes back")


def test_codebook_losses_equal_their_formulas() -> None:
    quantizer = small(update="gradient", l2_normalised=False, commitment_weight=0.3, codebook_weight=0.7)
    vectors = torch.randn(10, 4, requires_grad=True)
    output = quantizer(vectors)
    chosen = quantizer.codebook[output.codes]
    error = float((vectors - chosen).detach().square().mean())
    assert float(output.loss.detach()) == pytest.approx((0.3 + 0.7) * error, rel=1e-5)
    output.loss.backward()
    size = vectors.numel()
    torch.testing.assert_close(vectors.grad, 0.3 * 2 / size * (vectors - chosen).detach())
    expected = torch.zeros_like(quantizer.codebook)
    expected.index_add_(0, output.codes, 0.7 * 2 / size * (chosen - vectors).detach())
    torch.testing.assert_close(quantizer.codebook.grad, expected)


def test_codebook_learns_only_from_the_codebook_loss() -> None:
    quantizer = small(update="gradient", codebook_weight=0.0)
    output = quantizer(torch.randn(10, 4, requires_grad=True))
    (output.vectors.square().sum() + output.loss).backward()
    gradient = quantizer.codebook.grad
    assert gradient is None or float(gradient.abs().max()) == 0.0


def test_ema_loss_is_the_commitment_loss_alone() -> None:
    quantizer = small(commitment_weight=0.3).eval()
    vectors = torch.randn(10, 4)
    output = quantizer(vectors)
    expected = 0.3 * F.mse_loss(F.normalize(vectors, dim=1), quantizer.codebook[output.codes])
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_evaluation_changes_nothing(update: str) -> None:
    quantizer = small(update=update, dead_threshold=10.0).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    first, second = quantizer(torch.ones(3, 4)), quantizer(torch.ones(3, 4))
    assert torch.equal(first.codes, second.codes)
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_shapes_follow_the_input() -> None:
    output = small().train()(torch.randn(2, 3, 5, 4))
    assert output.vectors.shape == (2, 3, 5, 4)
    assert output.codes.shape == (2, 3, 5)
    assert output.codes.dtype == torch.int64
    assert output.loss.shape == ()


def test_wrong_channels_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="vectors have 5 channels.*code_dim=4"):
        small()(torch.randn(2, 5))


def residual(depth: int, *, shared: bool = True, **fields: Any) -> ResidualQuantizer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"codebook_size": 16, "code_dim": 4, "depth": depth, "shared": shared}
    config = ResidualQuantizerConfig(**(sizes | fields))
    quantizer = ResidualQuantizer(config)
    if config.update == "ema":
        for depth_index in range(depth):
            initialised(quantizer.book(depth_index))
    return quantizer


@pytest.mark.parametrize("shared", [True, False])
def test_each_depth_takes_the_nearest_code_of_what_is_left(shared: bool) -> None:
    quantizer, vectors = residual(3, shared=shared).eval(), torch.randn(2, 5, 4)
    quantized = quantizer(vectors)
    left = vectors.view(-1, 4)
    for depth in range(3):
        codebook = quantizer.book(depth).codebook
        expected = brute_force(left, codebook)
        assert torch.equal(quantized.codes[..., depth].flatten(), expected)
        left = left - codebook[expected]
    assert quantized.codes.shape == (2, 5, 3)
    torch.testing.assert_close(quantized.vectors.view(-1, 4), vectors.view(-1, 4) - left)
    torch.testing.assert_close(quantizer.lookup(quantized.codes), quantized.vectors)
    torch.testing.assert_close(quantizer.lookup_depths(quantized.codes).sum(-2), quantized.vectors)
    assert len(quantizer.books) == (1 if shared else 3)


def test_residual_commitment_compares_with_each_partial_sum() -> None:
    quantizer, vectors = residual(3, commitment_weight=0.5).eval(), torch.randn(7, 4)
    quantized = quantizer(vectors)
    sums = quantizer.lookup_depths(quantized.codes).cumsum(-2)  # [V, D, C]
    expected = 0.5 * torch.stack([F.mse_loss(vectors, sums[:, depth]) for depth in range(3)]).mean()
    torch.testing.assert_close(quantized.loss, expected)


def test_a_residual_gradient_codebook_learns_from_every_depth() -> None:
    quantizer, vectors = residual(2, shared=False, update="gradient").train(), torch.randn(7, 4, requires_grad=True)
    quantized = quantizer(vectors)
    (quantized.loss + quantized.vectors.sum()).backward()
    for depth in range(2):
        gradient = quantizer.book(depth).codebook.grad
        used = torch.zeros(16, dtype=torch.bool).index_fill_(0, quantized.codes[:, depth], True)
        assert gradient is not None
        assert torch.equal(gradient.abs().sum(1) > 0, used)
    assert vectors.grad is not None


@pytest.mark.parametrize("shared", [True, False])
def test_residual_ema_equals_a_written_out_ema(shared: bool) -> None:
    quantizer = residual(2, shared=shared, ema_decay=0.9, dead_threshold=0.0).train()
    vectors = torch.randn(50, 4)
    books = [quantizer.book(depth).codebook.clone() for depth in range(2)]
    sums, counts = [book.clone() for book in books], [torch.ones(16) for _ in books]
    seen_sums, seen_counts = [torch.zeros(16, 4) for _ in books], [torch.zeros(16) for _ in books]
    left = vectors
    for depth in range(2):
        for vector, code in zip(left, brute_force(left, books[depth]).tolist(), strict=True):
            for book in range(2) if shared else [depth]:
                seen_sums[book][code] += vector
                seen_counts[book][code] += 1
        left = left - books[depth][brute_force(left, books[depth])]
    quantizer(vectors)
    for depth in range(2):
        total = 0.9 * sums[depth] + 0.1 * seen_sums[depth]
        count = 0.9 * counts[depth] + 0.1 * seen_counts[depth]
        torch.testing.assert_close(quantizer.book(depth).codebook, total / count[:, None])


def test_residual_codes_stay_in_use_on_data_of_one_cluster() -> None:
    quantizer = residual(4, codebook_size=64, ema_decay=0.8).train()
    for _ in range(100):
        quantizer(5 + 0.1 * torch.randn(256, 4))
    codes = quantizer.eval()(5 + 0.1 * torch.randn(4096, 4)).codes
    assert len(codes.unique()) > 0.8 * 64


def test_a_normalised_residual_quantizer_is_refused() -> None:
    with pytest.raises(ValueError, match="l2_normalised"):
        residual(2, l2_normalised=True)
    with pytest.raises(ValueError, match="5 channels.*code_dim=4"):
        residual(2)(torch.zeros(3, 5))


_RANK = """
import json
import sys
import torch
import torch.distributed as dist
from models.metrics.measures import codebook_statistics
from tests.models.tokenizers.test_quantizers import MODES, batches_of, made

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
for mode in MODES:
    quantizer = made(mode)
    batches = batches_of(mode)
    torch.manual_seed(100 + rank)  # only the first rank's draws may count
    for batch in batches:
        codes = quantizer(batch[:16] if rank == 0 else batch[16:]).codes  # ranks need not have the same number
    torch.save(quantizer.state_dict(), f"{folder}/{mode}.{rank}")
    with open(f"{folder}/{mode}.{rank}.json", "w") as file:
        json.dump(codebook_statistics(codes, 40), file)
dist.destroy_process_group()
"""
MODES = {
    "plain": {"dead_threshold": 0.0},
    "drawn": {"dead_threshold": 0.3},
    "more codes than vectors": {"dead_threshold": 0.3, "codebook_size": 40},
    "residual": {"dead_threshold": 0.0, "depth": 3},
    "residual drawn": {"dead_threshold": 0.3, "depth": 3},
    "residual drawn apart": {"dead_threshold": 0.3, "depth": 3, "shared": False},
}
"""Fields of a quantizer by mode; what is `drawn` also starts from its first batch, and restarts codes."""


def made(mode: str) -> VectorQuantizer | ResidualQuantizer:
    fields = {"ema_decay": 0.5} | MODES[mode]
    quantizer = residual(**fields) if "depth" in fields else small(**fields)
    for module in quantizer.modules():
        if isinstance(module, VectorQuantizer):
            module.initialised.fill_("dead_threshold" in fields and fields["dead_threshold"] == 0.0)
    return quantizer.train()


def batches_of(mode: str) -> Tensor:
    """Batches that leave most codes idle after the first two, so that codes die."""
    batches = torch.randn(6, 24, 4, generator=torch.Generator().manual_seed(len(mode)))
    batches[2:] = batches[2:] * 0.1 + 1
    return batches


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quantizer of each of two processes that saw parts of every batch, `MODE.RANK`, and what they measured."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([sys.executable, "-c", _RANK, str(rank), str(folder)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=500) for process in processes] == [0, 0]
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_end_as_one_process_on_the_whole_batch(
    mode: str, two_processes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, drawn = VectorQuantizer._draw, list[int]()
    monkeypatch.setattr(VectorQuantizer, "_draw", lambda *given: drawn.append(given[2]) or draw(*given))
    quantizer, batches = made(mode), batches_of(mode)
    torch.manual_seed(100)
    for batch in batches:
        codes = quantizer(batch).codes
    assert len(drawn) > 3 or not MODES[mode]["dead_threshold"], "codes have to die, or this proves little"
    first, second = (torch.load(two_processes / f"{mode}.{rank}", weights_only=True) for rank in range(2))
    for name, value in quantizer.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value)
    measured = [json.loads((two_processes / f"{mode}.{rank}.json").read_text()) for rank in range(2)]
    assert measured == [list(codebook_statistics(codes, 40))] * 2, "use is that of the codes of all ranks"
