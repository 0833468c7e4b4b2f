"""Splines are those of normflows, both ways, and stay finite where they are steep."""

import math

import pytest
import torch
from helpers import normal
from normflows.utils.splines import unconstrained_rational_quadratic_spline

from sk_ebm._spline import evaluate_splines, splines_of

BOUND = 4.0


def parameters(spread, dtype=torch.float64):
    """Parameters of splines of 8 bins for 3 features and 400 rows."""
    return spread * normal(3, 23, 400).to(dtype)


def values(dtype=torch.float64):
    """Values within the bound and beyond, some of them on it."""
    return (3 * normal(3, 400, seed=1)).clamp(min=-BOUND).to(dtype)


@pytest.mark.parametrize("inverse", [False, True])
def test_they_are_those_of_normflows(inverse):
    free, x = parameters(1.0), values()
    expected = unconstrained_rational_quadratic_spline(
        x, *free.movedim(1, -1).split([8, 8, 7], dim=-1), inverse=inverse, tail_bound=BOUND
    )
    torch.testing.assert_close(evaluate_splines(splines_of(free, BOUND), x, inverse=inverse), expected)


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_are_those_of_differences(inverse):
    def evaluate(free, x):
        return evaluate_splines(splines_of(free, BOUND), x, inverse=inverse)

    free, x = parameters(1.0)[..., :10].requires_grad_(), values()[:, :10].clamp(max=3.9, min=-3.9).requires_grad_()
    assert torch.autograd.gradcheck(evaluate, (free, x))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-10)])
def test_they_lead_there_and_back(dtype, tolerance):
    splines, x = splines_of(parameters(1.0, dtype), BOUND), values(dtype)
    out, log_slope = evaluate_splines(splines, x)
    back, log_slope_back = evaluate_splines(splines, out, inverse=True)
    torch.testing.assert_close(back, x, atol=tolerance, rtol=0)
    torch.testing.assert_close(log_slope_back, -log_slope, atol=tolerance, rtol=0)


def test_steep_splines_stay_finite_in_single_precision():
    # Of so many, a hundred discriminants are negative by rounding.
    splines = splines_of(10 * normal(1, 23, 200_000).float(), BOUND)
    out, log_slope = evaluate_splines(splines, values().float().flatten().repeat(200)[None, :200_000])
    back, log_slope_back = evaluate_splines(splines, out, inverse=True)
    assert bool(torch.stack([out, log_slope, back, log_slope_back]).isfinite().all())


@pytest.mark.parametrize("inverse", [False, True])
def test_values_outside_are_left_as_they_are(inverse):
    x = torch.tensor([[-1e9, -4.001, 4.001, math.inf, math.nan]])
    out, log_slope = evaluate_splines(splines_of(parameters(1.0)[:1, :, :5], BOUND), x.double(), inverse=inverse)
    torch.testing.assert_close(out, x.double(), equal_nan=True)
    assert bool((log_slope == 0).all())
