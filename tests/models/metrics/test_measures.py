import math

import numpy as np
import pytest
import torch

from models.metrics.measures import (
    SSIM_LLAMAGEN,
    SSIM_WANG,
    SsimRule,
    code_bits,
    codebook_statistics,
    mean_interval,
    psnr,
    ssim,
    wilson_interval,
)


def pictures(seed: int, batch: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, 24, 24), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_psnr_equals_its_formula_for_each_image() -> None:
    a, b = pictures(0), pictures(1)
    expected = [
        10 * math.log10(255**2 / float(((x.double() - y.double()) ** 2).mean())) for x, y in zip(a, b, strict=True)
    ]
    torch.testing.assert_close(psnr(a, b), torch.tensor(expected))


def test_psnr_of_equal_images_is_that_of_the_smallest_error() -> None:
    almost = pictures(0)
    almost[:, 0, 0, 0] += torch.where(almost[:, 0, 0, 0] < 255, 1, -1).byte()
    torch.testing.assert_close(psnr(pictures(0), pictures(0)), psnr(almost, pictures(0)))
    assert psnr(pictures(0), pictures(0)).isfinite().all()


def test_psnr_of_the_largest_error_is_zero() -> None:
    black = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert psnr(black, black + 255).tolist() == [0.0]


def striped_pictures(side: int) -> list[torch.Tensor]:
    """Two uint8 `[1, 3, side, side]` images that any program can make again."""
    rows, columns = np.mgrid[0:side, 0:side]
    first = [rows * 7 + columns * 3, rows * rows + 5 * columns, columns * 11]
    second = [
        rows * 7 + columns * 3 + 9 * (rows % 5),
        rows * rows + 5 * columns + columns % 7 * 6,
        columns * 11 + rows,
    ]
    return [torch.from_numpy((np.stack(image) % 256).astype(np.uint8))[None] for image in (first, second)]


# skimage.metrics.structural_similarity 0.26.0 on the images / 255 with channel_axis=-1 and
# Wang: data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False;
# LlamaGen (tokenizer_image/reconstruction_vq_ddp.py): data_range=2
@pytest.mark.parametrize(
    ("side", "rule", "value"),
    [
        (24, SSIM_WANG, 0.7590521055332843),
        (64, SSIM_WANG, 0.5486620808617736),
        (24, SSIM_LLAMAGEN, 0.7938266979129877),
        (64, SSIM_LLAMAGEN, 0.615585867668885),
    ],
)
def test_ssim_is_scikit_images(side: int, rule: SsimRule, value: float) -> None:
    a, b = striped_pictures(side)
    assert float(ssim(a, b, rule)) == pytest.approx(value, abs=1e-6)


def slow_ssim(a: np.ndarray, b: np.ndarray, rule: SsimRule) -> float:
    """Wang et al. 2004, equation 13, averaged over the windows that lie inside one channel."""
    axis = np.arange(rule.size) - rule.size // 2
    line = np.exp(-(axis**2) / (2 * 1.5**2)) if rule.window == "gaussian" else np.ones(rule.size)
    window = np.outer(line, line) / line.sum() ** 2
    unbiased = rule.size**2 / (rule.size**2 - 1) if rule.sample_covariance else 1
    c1, c2 = (0.01 * rule.data_range) ** 2, (0.03 * rule.data_range) ** 2
    values = []
    for row in range(a.shape[0] - rule.size + 1):
        for column in range(a.shape[1] - rule.size + 1):
            here = np.s_[row : row + rule.size, column : column + rule.size]
            x, y = a[here], b[here]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum() * unbiased, (window * (y - my) ** 2).sum() * unbiased
            vxy = (window * (x - mx) * (y - my)).sum() * unbiased
            values.append((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("rule", [SSIM_WANG, SSIM_LLAMAGEN])
def test_ssim_equals_a_slow_one(rule: SsimRule) -> None:
    a = pictures(0, 2)
    b = ((a.float() + 2 * pictures(1, 2).float()) / 3).to(torch.uint8)
    measured = ssim(a, b, rule)
    assert measured.shape == (2,)
    for index in range(2):
        channels = zip(a[index].numpy() / 255, b[index].numpy() / 255, strict=True)
        expected = np.mean([slow_ssim(x, y, rule) for x, y in channels])
        assert float(measured[index]) == pytest.approx(expected, abs=1e-6)


def test_ssim_says_window_border_and_range() -> None:
    assert SSIM_WANG.settings["window"] == "11x11 Gaussian, sigma 1.5"
    assert SSIM_LLAMAGEN.settings["window"] == "7x7 uniform"
    for rule, margin, data_range in ((SSIM_WANG, 5, 1.0), (SSIM_LLAMAGEN, 3, 2.0)):
        assert f"{margin} pixels from its edge" in rule.settings["border"]
        assert rule.settings["data_range"] == data_range


def test_ssim_with_range_two_is_inflated() -> None:
    a, b = pictures(0), pictures(1)
    assert bool((ssim(a, b, SSIM_LLAMAGEN) > ssim(a, b, SSIM_LLAMAGEN._replace(data_range=1.0))).all())
    torch.testing.assert_close(ssim(a, a), torch.ones(3))


def test_images_below_the_window_have_no_ssim() -> None:
    with pytest.raises(ValueError, match=r"window of 11 pixels does not fit into images of 8 x 24 pixels"):
        ssim(pictures(0)[:, :, :8], pictures(1)[:, :, :8])


def test_uniform_codes_use_the_whole_codebook() -> None:
    statistics = codebook_statistics(torch.arange(64).repeat(3).view(2, 3, 32), 64)
    assert statistics.usage == 1.0
    assert statistics.perplexity == pytest.approx(64)


def test_one_code_has_perplexity_one() -> None:
    statistics = codebook_statistics(torch.full((5, 4), 7), 10)
    assert statistics.usage == pytest.approx(0.1)
    assert statistics.perplexity == pytest.approx(1)


def test_perplexity_is_the_exponential_of_the_entropy() -> None:
    statistics = codebook_statistics(torch.tensor([0, 0, 1, 3]), 4)
    assert statistics.usage == 0.75
    assert statistics.perplexity == pytest.approx(2**1.5)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published_values(successes: int, trials: int, low: float, high: float) -> None:
    interval = wilson_interval(successes, trials)
    assert interval.value == successes / trials
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_interval_is_symmetric_and_needs_trials() -> None:
    few, many = wilson_interval(3, 10), wilson_interval(7, 10)
    assert few.low == pytest.approx(1 - many.high)
    assert wilson_interval(10, 10).high == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least one trial"):
        wilson_interval(0, 0)


def test_mean_interval_equals_its_formula() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    interval = mean_interval(values)
    half = 1.959964 * np.std(values.numpy(), ddof=1) / 2
    assert interval.value == 4.0
    assert (interval.low, interval.high) == pytest.approx((4 - half, 4 + half))
    assert mean_interval(values[:1]) == (1.0, 1.0, 1.0)


def test_bits_of_an_image_are_those_of_all_its_codes() -> None:
    assert code_bits((2, 2, 8, 8), (1024, 1024)) == 2 * 2 * 64 * 10
