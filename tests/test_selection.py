"""Cross-fitted choices: no row judges what it helped to fit, and the right candidates win."""

import numpy as np
import pytest
import torch
from helpers import folds

from sk_ebm._bases import cross_fit
from sk_ebm._mixture import fit_gaussian
from sk_ebm._selection import choose_feature_map, cross_fit_bases, max_fit_rows, mix_members, shares_of_parts
from sk_ebm._stacking import shares_with_prior
from sk_ebm._student_t import StudentT, fit_student_t
from sk_ebm._support import fit_feature_map

NAMES = ("gaussian", "student_t", "mixture")


def best_base(data, generator):
    bases = cross_fit_bases(data, NAMES, fit_feature_map(data.rows, data.weight, use_margins=False), generator)
    return max(bases, key=lambda name: bases[name].score)


def test_members_never_see_their_own_fold(rng):
    data = folds(rng.normal(size=(40, 2)))
    for k, weight in enumerate(data.train_weight()):
        assert not weight[data.fold == k].any()
    torch.testing.assert_close(data.train_weight() + data.held_out_weight(), data.weight.expand(4, -1))


def test_score_is_that_of_unseen_rows(rng):
    data = folds(rng.normal(size=(40, 1)), n_members=2)
    bases = cross_fit(lambda z, weights: [fit_gaussian(z, weight) for weight in weights], data)
    slow = [float(bases.members[int(k)].log_prob(row[None])) for row, k in zip(data.rows, data.fold, strict=True)]
    assert bases.score == pytest.approx(np.mean(slow))


def test_clusters_choose_the_mixture(rng, generator):
    X = rng.normal(size=(400, 2)) + 8 * (rng.random((400, 1)) < 0.3)
    assert best_base(folds(X), generator) == "mixture"


def test_heavy_tails_choose_student_t(rng, generator):
    assert (
        best_base(
            folds(rng.multivariate_normal(np.zeros(4), np.eye(4), 400) / np.sqrt(rng.chisquare(3, (400, 1)) / 3)),
            generator,
        )
        == "student_t"
    )


@pytest.mark.parametrize("n_outliers", [0, 3])
def test_a_row_beyond_all_others_costs_nats_not_hundreds(n_outliers, rng, generator):
    X = rng.normal(size=(300, 2)) + 8 * (rng.random((300, 1)) < 0.3)
    X[:n_outliers] += 200 * rng.normal(size=(n_outliers, 2))
    data = folds(X)
    feature_map = fit_feature_map(data.rows, data.weight, use_margins=False)
    bases = cross_fit_bases(data, ["mixture", "student_t", "heavy_tailed_mixture"], feature_map, generator)
    heavy = bases["heavy_tailed_mixture"]
    # Half a row more for each of two costs at most log(301 / 300.5) nats a row.
    assert heavy.score > max(bases["mixture"].score, bases["student_t"].score) - 1 / 300
    far = torch.tensor([[60.0, 60.0]], dtype=torch.float64)
    z, log_det = feature_map(far)
    loss = {name: -float(bases[name].members[0].log_prob(z) + log_det) for name in ("mixture", "heavy_tailed_mixture")}
    assert loss["heavy_tailed_mixture"] < loss["mixture"]
    if n_outliers:
        assert loss["heavy_tailed_mixture"] < 30


@pytest.mark.parametrize("n_rows", [300, 4000])
def test_shares_of_parts_are_those_of_unseen_rows(n_rows, rng):
    data = folds(rng.standard_t(2, size=(n_rows, 2)))
    parts = [
        cross_fit(lambda z, weights: [fit_gaussian(z, weight) for weight in weights], data).members,
        cross_fit(lambda z, weights: [fit_student_t(z, weight) for weight in weights], data).members,
    ]
    shares = shares_of_parts(parts, data)
    assert sum(shares) == pytest.approx(1)
    assert shares[1] > 0.9
    # Half a row of prior, even if no row asks for it.
    assert shares_of_parts(parts[::-1], data.with_rows(0 * data.rows + 0.1))[1] >= 0.5 / (n_rows + 1)
    mixed = mix_members(parts, shares)
    z = data.rows[:5]
    expected = sum(share * part[2].log_prob(z).exp() for share, part in zip(shares, parts, strict=True))
    torch.testing.assert_close(mixed[2].log_prob(z).exp(), expected)


def test_rows_that_count_for_nothing_or_have_no_density_do_not_spoil_shares(rng):
    data = folds(rng.normal(size=(80, 1)))
    data = data._replace(n_members=3)

    class Broken(StudentT):
        def log_prob(self, z):
            return torch.where(z.squeeze(-1) > 1, torch.nan, super().log_prob(z))

    whole = cross_fit(lambda z, weights: [fit_gaussian(z, weight) for weight in weights], data).members
    broken = [Broken(torch.zeros(1).double(), torch.eye(1).double(), 5.0) for _ in range(3)]
    assert np.isfinite(shares_of_parts([whole, broken], data)).all()


def test_prior_counts_rows_of_equal_weight():
    log_density = torch.stack([torch.zeros(1000), torch.full((1000,), -torch.inf)])
    weight = torch.full((1000,), 1e-9)
    weight[:50] = 1
    assert float(shares_with_prior(log_density, weight)[1]) == pytest.approx(0.5 / 51)


@pytest.mark.parametrize("n_features, n_rows", [(1, 50_000), (40, 50_000), (100, 20_000), (784, 8000)])
def test_bases_see_as_many_rows_as_time_and_memory_allow(n_features, n_rows):
    assert max_fit_rows(n_features) == n_rows


@pytest.mark.parametrize("shape", ["skewed", "plain"])
def test_normal_scores_are_taken_where_they_help(rng, generator, shape):
    X = rng.normal(size=(400, 4))
    X = np.exp(1.3 * X) if shape == "skewed" else X
    feature_map, _ = choose_feature_map(folds(X), NAMES, generator)
    assert (feature_map.margins is not None) == (shape == "skewed")
