"""log Z agrees with quadrature, its standard error with its errors, the ESS with its definition."""

import math

import numpy as np
import pytest
import torch
from helpers import normal, seeded
from scipy import integrate, stats

from sk_ebm._log_normalizer import effective_sample_size, estimate_log_normalizer

WIDTH = 1.5


def quartic(x):
    return -0.25 * x**4 + x


def quartic_log_weight(noise):
    return quartic(WIDTH * noise) + 0.5 * noise**2 + math.log(WIDTH * math.sqrt(2 * math.pi))


LOG_Z = math.log(integrate.quad(lambda x: math.exp(quartic(x)), -10, 10)[0])


def quartic_log_weight_with_control(noise, is_wide):
    """Weights of draws from half a standard normal and half a wide one, and the wide one's share of the proposal."""
    x = torch.where(is_wide, WIDTH, 1.0) * noise
    narrow, wide = (-0.5 * (x / width) ** 2 - math.log(width * math.sqrt(2 * math.pi)) for width in (1.0, WIDTH))
    log_proposal = torch.logaddexp(narrow, wide) - math.log(2)
    return quartic(x) - log_proposal, (wide - log_proposal).exp().unsqueeze(0)


def slow_effective_sample_size(log_weight):
    weight = np.exp(np.asarray(log_weight))
    return weight.sum() ** 2 / (len(weight) * (weight**2).sum())


def test_log_normalizer_agrees_with_quadrature():
    estimate = estimate_log_normalizer(quartic_log_weight(normal(200_000)))
    assert estimate.std_error < 0.01
    assert abs(estimate.value - LOG_Z) < 4 * estimate.std_error


def test_standard_error_is_that_of_the_errors():
    estimates = [estimate_log_normalizer(quartic_log_weight(noise)) for noise in normal(200, 2000)]
    score = np.array([(estimate.value - LOG_Z) / estimate.std_error for estimate in estimates])
    assert (np.abs(score) <= 3).mean() >= 0.95
    # Neither too small nor too large: the sum of 200 squared scores is chi-squared.
    assert 1e-3 < stats.chi2.cdf((score**2).sum(), len(score)) < 1 - 1e-3


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 3.0])
def test_ess_and_standard_error_agree_with_their_definition(spread):
    log_weight = spread * normal(500)
    weight = log_weight.exp().numpy()
    estimate = estimate_log_normalizer(log_weight)
    assert estimate.effective_sample_size == pytest.approx(slow_effective_sample_size(log_weight), rel=1e-9)
    assert estimate.value == pytest.approx(math.log(weight.mean()), abs=1e-12)
    assert estimate.std_error == pytest.approx(stats.sem(weight) / weight.mean(), rel=1e-6, abs=1e-8)


def test_ess_is_one_for_equal_weights_and_one_draw_for_one_weight():
    one_weight = torch.full((40,), -math.inf).double()
    one_weight[7] = 3.0
    assert float(effective_sample_size(torch.full((40,), -2.5).double())) == pytest.approx(1)
    assert float(effective_sample_size(one_weight)) == pytest.approx(1 / 40)


def test_ess_is_taken_along_the_last_dimension():
    log_weight = normal(2, 3, 50)
    expected = [[slow_effective_sample_size(row) for row in rows] for rows in log_weight]
    np.testing.assert_allclose(effective_sample_size(log_weight), expected, rtol=1e-12)


@pytest.mark.parametrize("constant", [-1e4, -800.0, 800.0, 1e4])
def test_a_constant_shifts_the_value_only(constant):
    log_weight = normal(1000)
    plain, shifted = estimate_log_normalizer(log_weight), estimate_log_normalizer(log_weight + constant)
    assert shifted.value - constant == pytest.approx(plain.value, abs=1e-9)
    assert shifted[1:] == pytest.approx(plain[1:], rel=1e-8)


def test_zero_weights_count_as_draws():
    log_weight = quartic_log_weight(normal(500))
    with_zeros = torch.cat([log_weight, torch.full((500,), -math.inf)])
    half, whole = estimate_log_normalizer(with_zeros), estimate_log_normalizer(log_weight)
    assert half.value == pytest.approx(whole.value - math.log(2))
    assert half.effective_sample_size == pytest.approx(whole.effective_sample_size / 2)
    assert math.isfinite(half.std_error)


def test_all_zero_weights_give_no_precision_and_no_effective_draw():
    estimate = estimate_log_normalizer(torch.full((50,), -math.inf))
    assert estimate == (-math.inf, math.inf, 0.0)


def test_one_draw_has_no_standard_error_to_trust():
    assert estimate_log_normalizer(torch.tensor([3.0])).std_error == math.inf


@pytest.mark.parametrize("level", [-1e4, 0.0, 777.7])
def test_single_precision_weights_lose_nothing_in_the_sums(level):
    log_weight = (0.01 * torch.randn(1000, generator=seeded()) + level).float()
    single, double = estimate_log_normalizer(log_weight), estimate_log_normalizer(log_weight.double())
    assert single.effective_sample_size <= 1
    assert tuple(single) == pytest.approx(tuple(double), rel=1e-6)


def test_weights_that_are_a_mix_of_the_controls_leave_no_error():
    controls = torch.stack([normal(400, seed=k).exp() / math.exp(0.5) for k in (1, 2)])
    log_weight = (0.3 * controls[0] + 0.7 * controls[1]).log() + 5
    estimate = estimate_log_normalizer(log_weight, controls)
    assert estimate.value == pytest.approx(5, abs=1e-9)
    assert estimate.std_error == pytest.approx(0, abs=1e-9)
    assert estimate.effective_sample_size == estimate_log_normalizer(log_weight).effective_sample_size


def test_standard_error_with_controls_is_that_of_the_errors_and_smaller():
    scores, gains = [], []
    for noise, coin in zip(normal(200, 2000), normal(200, 2000, seed=1), strict=True):
        log_weight, controls = quartic_log_weight_with_control(noise, coin > 0)
        estimate = estimate_log_normalizer(log_weight, controls)
        scores.append((estimate.value - LOG_Z) / estimate.std_error)
        gains.append(estimate_log_normalizer(log_weight).std_error / estimate.std_error)
    assert np.min(gains) >= 1 and np.mean(gains) > 1.03
    assert 1e-3 < stats.chi2.cdf(np.square(scores).sum(), len(scores)) < 1 - 1e-3


def test_controls_are_left_out_where_draws_are_too_few_to_regress_on_them():
    log_weight, controls = normal(20), normal(3, 20).exp()
    assert estimate_log_normalizer(log_weight, controls) == estimate_log_normalizer(log_weight)


def test_equal_controls_do_no_harm():
    log_weight, controls = quartic_log_weight_with_control(normal(2000), normal(2000, seed=1) > 0)
    once, twice = (estimate_log_normalizer(log_weight, controls.expand(k, -1)) for k in (1, 2))
    assert tuple(twice) == pytest.approx(tuple(once), rel=1e-2)


def test_controls_that_differ_where_hardly_any_draw_lies_do_no_harm():
    errors = []
    for seed in range(30):
        x = torch.randn(16_384, generator=seeded(seed), dtype=torch.float64)
        # Two components of the proposal: one is as good as all of it, the other has 1e-4 of its mass six widths away.
        controls = torch.stack([torch.ones_like(x), 1 - 1e-4 + 1e-4 * (6 * x - 18).exp()])
        estimate = estimate_log_normalizer(0.3 * x - 0.045, controls)
        errors.append(estimate.value / estimate.std_error)
    assert np.sqrt(np.mean(np.square(errors))) < 1.4
