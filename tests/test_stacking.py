"""Stacking finds the mixture of candidates that makes held-out rows most likely."""

import math

import pytest
import torch

from sk_ebm._stacking import gain_by_chance, mixture_shares, shares_with_prior, stacking_shares

# Nats per row that each candidate must add.
TOL = 1e-3


def log_normal(z, mean, scale=1.0):
    return torch.distributions.Normal(mean, scale).log_prob(z)


def test_shares_maximise_the_held_out_likelihood_on_a_grid():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2000, generator=generator) + 3 * (torch.rand(2000, generator=generator) < 0.3)
    held_out = torch.stack([log_normal(z, 0.0), log_normal(z, 3.0)])
    share = float(mixture_shares(held_out, torch.ones(2000))[0])
    grid = torch.linspace(0.01, 0.99, 99).unsqueeze(-1)
    likelihood = torch.logaddexp(grid.log() + held_out[0], (1 - grid).log() + held_out[1]).mean(-1)
    assert abs(share - float(grid[likelihood.argmax()])) < 0.01


def test_weights_are_repetitions():
    log_density = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    weight = torch.arange(50) % 3
    repeated = mixture_shares(log_density.repeat_interleave(weight, dim=1), torch.ones(int(weight.sum())))
    torch.testing.assert_close(mixture_shares(log_density, weight), repeated, rtol=0, atol=1e-6)


def test_disjoint_densities_get_the_shares_of_their_rows():
    """Log densities may be as low as they like: nothing underflows."""
    log_density = torch.full((2, 10), -torch.inf)
    log_density[0, :3], log_density[1, 3:] = -5000.0, -9000.0
    torch.testing.assert_close(mixture_shares(log_density, torch.ones(10)), torch.tensor([0.3, 0.7]).double())


def test_a_row_of_no_weight_may_be_impossible_under_the_rest():
    log_density = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf, -torch.inf, 0.0]])
    shares = mixture_shares(log_density, torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.0]).double())


def test_a_useless_candidate_gets_nothing():
    z = torch.randn(500, generator=torch.Generator().manual_seed(2))
    shares = mixture_shares(torch.stack([log_normal(z, 0.0), log_normal(z, 9.0)]), torch.ones(500))
    assert shares[0] > 0.999


def test_overlapping_densities_reach_the_maximum():
    """Plain EM stops far from the maximum where densities hardly differ."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(20_000, generator=generator) + 0.05 * (torch.rand(20_000, generator=generator) < 0.9)
    held_out = torch.stack([log_normal(z, 0.0), log_normal(z, 0.05)]).double()
    share = float(mixture_shares(held_out, torch.ones(20_000))[0])
    grid = torch.linspace(0.001, 0.999, 999).double().unsqueeze(-1)
    likelihood = torch.logaddexp(grid.log() + held_out[0], (1 - grid).log() + held_out[1]).sum(-1)
    assert abs(share - float(grid[likelihood.argmax()])) < 0.002


def test_a_candidate_of_uncertain_normalizer_is_left_out_if_another_is_certain():
    z = torch.randn(500, generator=torch.Generator().manual_seed(3))
    flattered = torch.stack([log_normal(z, 0.0), log_normal(z, 0.0) + 5])
    flattered[:, :10] = torch.nan
    assert stacking_shares(flattered, torch.ones(500), torch.tensor([True, False]), [TOL, TOL]) == [1, 0]
    assert stacking_shares(flattered, torch.ones(500), torch.tensor([False, False]), [TOL, TOL]) == [0, 1]


def test_a_candidate_that_adds_next_to_nothing_gets_no_share_unless_it_is_cheap():
    z = torch.randn(2000, generator=torch.Generator().manual_seed(4))
    # The first two are the same up to a little noise: both together are better, but hardly.
    noise = 0.02 * torch.randn(2, 2000, generator=torch.Generator().manual_seed(5))
    held_out = torch.cat([log_normal(z, 0.0) + noise, log_normal(z, 8.0).unsqueeze(0)])
    weight, all_covered = torch.ones(2000), torch.tensor([True, True, True])
    assert mixture_shares(held_out, weight)[:2].min() > 0.1
    shares = stacking_shares(held_out, weight, all_covered, [TOL, TOL, TOL])
    assert sorted(shares) == [0, 0, 1]
    assert shares[2] == 0
    shares = stacking_shares(held_out, weight, all_covered, [TOL, TOL, -math.inf])
    assert 0 < shares[2] < 0.001
    assert 0 in shares


def test_what_is_next_to_nothing_in_a_thousand_rows_is_something_in_twenty_thousand():
    z = torch.randn(1000, generator=torch.Generator().manual_seed(4))
    held_out = torch.stack([log_normal(z, 0.0), log_normal(z, 0.0, 1.6)])
    of_many = held_out.repeat(1, 20)
    log_shares = mixture_shares(held_out, torch.ones(1000)).log().unsqueeze(-1)
    assert 2 / 20_000 < ((held_out + log_shares).logsumexp(0) - held_out[0]).mean() < TOL
    assert stacking_shares(held_out, torch.ones(1000), torch.tensor([True, True]), [TOL, TOL]) == [1, 0]
    chance = gain_by_chance(torch.ones(20_000))
    shares = stacking_shares(of_many, torch.ones(20_000), torch.tensor([True, True]), [chance, chance])
    assert 0 < shares[1] < 0.2


def test_shares_fall_short_of_the_most_likely_ones_by_as_much_as_is_allowed():
    z = torch.randn(4000, generator=torch.Generator().manual_seed(6)).double()
    log_density = torch.stack([log_normal(z, mean, 1.1) for mean in (-0.3, 0.0, 0.1, 2.0)])

    def total(shares):
        return float((log_density + shares.log().unsqueeze(-1)).logsumexp(0).sum())

    best, near = (mixture_shares(log_density, torch.ones(4000), limit) for limit in (1e-6, 1.0))
    assert 1e-6 < total(best) - total(near) < 1


def test_a_small_share_that_adds_much_is_kept():
    z = torch.randn(2000, generator=torch.Generator().manual_seed(4))
    z[:60] += 8
    held_out = torch.stack([log_normal(z, 0.0), log_normal(z, 8.0)])
    shares = stacking_shares(held_out, torch.ones(2000), torch.tensor([True, True]), [TOL, TOL])
    assert 0.02 < shares[1] < 0.05
    assert sum(shares) == pytest.approx(1)


def test_a_density_that_no_row_asked_for_keeps_half_a_row():
    z = torch.randn(100, generator=torch.Generator().manual_seed(5))
    narrow, wide = log_normal(z, 0.0), log_normal(z, 0.0, 30.0)
    shares = shares_with_prior(torch.stack([narrow, wide]), torch.ones(100))
    assert abs(float(shares[1]) - 0.5 / 101) < 1e-6
    mixed = torch.logaddexp(shares[0].log() + narrow, shares[1].log() + wide)
    assert float((narrow - mixed).mean()) < 1 / 100


def test_each_candidate_must_add_as_much_as_is_asked_of_it():
    z = torch.randn(2000, generator=torch.Generator().manual_seed(4))
    z[:200] += 3
    held_out, all_covered = torch.stack([log_normal(z, 0.0), log_normal(z, 3.0)]), torch.tensor([True, True])
    assert stacking_shares(held_out, torch.ones(2000), all_covered, [TOL, TOL])[1] > 0.05
    assert stacking_shares(held_out, torch.ones(2000), all_covered, [TOL, 1.0]) == [1, 0]
    # The other way round as well, although the first alone is far better.
    assert stacking_shares(held_out, torch.ones(2000), all_covered, [9.0, TOL]) == [0, 1]
