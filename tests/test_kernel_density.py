"""Kernels around the training rows: a density like any other, and one that few rows have use for."""

import math

import numpy as np
import pytest
import torch
from helpers import folds, integral, normal, seeded
from sklearn.neighbors import KernelDensity

from sk_ebm import EBMFlowDensity, _fitting
from sk_ebm._kernel_density import MAX_ROWS_OF_KERNELS, GaussianKernels, cross_fit_kernels
from sk_ebm._selection import cross_fit_bases, cross_fit_kernels_and_tails
from sk_ebm._support import fit_feature_map

FRAME = torch.tensor([[1.0, 0.4], [0.0, 0.5]]).double()


def kernels(n_rows=6, bandwidth=0.3):
    weight = torch.arange(1.0, n_rows + 1).double()
    return GaussianKernels(normal(n_rows, 2), weight, FRAME, bandwidth), weight


def test_log_density_is_that_of_a_kernel_density_in_the_frame():
    density, weight = kernels()
    rows, z = normal(6, 2) @ FRAME, normal(9, 2, seed=1)
    reference = KernelDensity(bandwidth=0.3).fit(rows, sample_weight=weight.numpy())
    log_det = torch.linalg.det(FRAME).abs().log()
    torch.testing.assert_close(density.log_prob(z), torch.from_numpy(reference.score_samples(z @ FRAME)) + log_det)
    assert integral(density.log_prob, 2, reach=20) == pytest.approx(1, abs=1e-3)


def test_draws_are_those_of_the_density():
    density, weight = kernels()
    draws, rows = density.sample(100_000, seeded()) @ FRAME, normal(6, 2) @ FRAME
    share = weight / weight.sum()
    torch.testing.assert_close(draws.mean(0), share @ rows, atol=0.02, rtol=0)
    spread = rows.T @ (share.unsqueeze(-1) * rows) - torch.outer(share @ rows, share @ rows)
    torch.testing.assert_close(draws.T.cov(), spread + 0.09 * torch.eye(2).double(), atol=0.03, rtol=0)


def test_single_precision_is_enough():
    density, _ = kernels(bandwidth=0.02)
    z = normal(50, 2)
    expected = density.log_prob(z)
    torch.testing.assert_close(density.float().log_prob(z.float()).double(), expected, rtol=1e-4, atol=1e-2)


def test_no_member_has_kernels_at_rows_that_it_must_not_see(rng):
    data = folds(rng.normal(size=(40, 2)))
    data = data._replace(weight=torch.where(torch.arange(40) < 8, 0.0, data.weight))
    for k, member in enumerate(cross_fit_kernels(data, torch.eye(2).double()).members):
        seen = data.rows[(data.fold != k) & (data.weight > 0)]
        torch.testing.assert_close(member.centers @ member.inverse, seen)


def test_bandwidth_and_frame_are_the_likeliest_for_unseen_rows(rng):
    # Two thin clusters along the diagonal of standardised features, which whitening makes round.
    z = rng.normal(size=(200, 2)) * 0.2 + 2 * rng.choice([-1, 1], size=(200, 1)) * [1, 0]
    standardised = torch.tensor([[3.0, 3.0], [-0.3, 0.3]]).double()
    data = folds(z)
    bases = cross_fit_kernels(data, standardised)
    for frame, width in ((torch.eye(2).double(), 0.06), (torch.eye(2).double(), 0.5), (standardised, 0.3)):
        other = [GaussianKernels(data.rows[w > 0], w[w > 0], frame, width) for w in data.train_weight()]
        log_prob = torch.stack([member.log_prob(data.rows) for member in other])
        assert bases.score > data.held_out_mean(log_prob)
    matrix = bases.members[0].matrix
    torch.testing.assert_close(matrix, matrix[0, 0] * torch.eye(2).double())


def draw_small_clusters(n_rows, rng):
    centers = np.random.default_rng(1).uniform(-100, 100, size=(80, 2))
    return centers[rng.integers(80, size=n_rows)] + rng.normal(size=(n_rows, 2))


def fit(X, **parameters):
    return EBMFlowDensity(n_estimators=3, max_iter=5, random_state=0, **parameters).fit(X)


def test_many_small_clusters_are_found_in_few_rows(rng, monkeypatch):
    X, fresh = draw_small_clusters(200, rng), draw_small_clusters(5000, rng)
    density = fit(X)
    assert density.base_["shares"]["kernel_density"] > 0.3
    monkeypatch.setattr(_fitting, "MAX_ROWS_OF_KERNELS", 0)
    without = fit(X)
    assert "kernel_density" not in without.base_["shares"]
    assert density.score(fresh) > without.score(fresh) + 0.1 * len(fresh)


def test_kernels_that_add_nothing_get_no_share(rng):
    density = fit(rng.normal(size=(200, 2)))
    assert density.base_["shares"]["kernel_density"] == 0


@pytest.mark.parametrize("reason", ["many rows", "another base"])
def test_kernels_are_not_tried_elsewhere(reason, rng):
    n_rows, parameters = (MAX_ROWS_OF_KERNELS, {}) if reason == "many rows" else (200, {"base": "mixture"})
    assert "kernel_density" not in fit(draw_small_clusters(n_rows, rng), **parameters).base_["shares"]


def test_a_warm_start_keeps_kernels_untrained(rng):
    X = draw_small_clusters(200, rng)
    density = fit(X, warm_start=True)
    before = density.base_["shares"]["kernel_density"]
    density.set_params(max_iter=10).fit(X)
    assert density.base_["shares"]["kernel_density"] == pytest.approx(before, abs=0.2)
    assert {h["iteration"] for h in density.history_ if h["base"] == "kernel_density"} == {0}


def test_a_row_far_from_all_kernels_has_the_density_of_heavy_tails(rng):
    data = folds(draw_small_clusters(200, rng))
    feature_map = fit_feature_map(data.rows, data.weight, use_margins=False)
    heavy_tailed = cross_fit_bases(data, ["heavy_tailed_mixture"], feature_map, seeded())["heavy_tailed_mixture"]
    members = cross_fit_kernels_and_tails(data, feature_map, heavy_tailed).members
    far, near = torch.tensor([[1e3, 1e3]]).double(), feature_map(data.rows[:1])[0]
    for member, tails in zip(members, heavy_tailed.members, strict=True):
        # Half a row of 201.
        assert member.log_prob(far) > tails.log_prob(far) - math.log(402) - 0.01
    # The first row is of the first fold, and the kernel at it belongs to the others.
    assert members[1].log_prob(near) > heavy_tailed.members[1].log_prob(near) + 0.3
