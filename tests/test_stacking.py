"""Stacking finds the mixture of candidates that makes held-out rows most likely."""

import torch

from sk_ebm._stacking import stacking_shares


def log_normal(z, mean, scale=1.0):
    return torch.distributions.Normal(mean, scale).log_prob(z)


def test_shares_maximise_the_held_out_likelihood_on_a_grid():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2000, generator=generator) + 3 * (torch.rand(2000, generator=generator) < 0.3)
    held_out = torch.stack([log_normal(z, 0.0), log_normal(z, 3.0)]).unsqueeze(1)
    share = float(stacking_shares(held_out, torch.ones(1, 2000))[0])
    grid = torch.linspace(0.01, 0.99, 99).unsqueeze(-1)
    likelihood = torch.logaddexp(grid.log() + held_out[0], (1 - grid).log() + held_out[1]).mean(-1)
    assert abs(share - float(grid[likelihood.argmax()])) < 0.01


def test_only_held_out_rows_count():
    held_out = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1))
    weight = torch.zeros(3, 50)
    weight[1, 10:20] = 2.0
    expected = stacking_shares(held_out[:, 1:2, 10:20], torch.ones(1, 10))
    torch.testing.assert_close(stacking_shares(held_out, weight), expected)


def test_a_useless_candidate_gets_nothing():
    z = torch.randn(500, generator=torch.Generator().manual_seed(2))
    shares = stacking_shares(torch.stack([log_normal(z, 0.0), log_normal(z, 9.0)]).unsqueeze(1), torch.ones(1, 500))
    assert shares[0] > 0.999
