"""Independent groups of features are found, and make a density a product, where and only where they are there."""

import math
import pickle

import numpy as np
import pytest
import torch
from helpers import folds, integral, normal, seeded
from sklearn.datasets import make_moons

from sk_ebm import EBMFlowDensity, _independence, _selection
from sk_ebm._independence import ProductDensity, independent_groups
from sk_ebm._mixture import fit_gaussian
from sk_ebm._mixture_search import Coordinates
from sk_ebm._selection import cross_fit_bases, max_fit_rows
from sk_ebm._support import fit_feature_map


def groups_of(X, weight=None):
    rows = torch.as_tensor(X, dtype=torch.float64)
    weight = torch.ones(len(rows), dtype=torch.float64) if weight is None else torch.from_numpy(weight)
    return [group.tolist() for group in independent_groups(rows, weight)]


def draw_moons(n_rows, n_pairs, seed=0):
    """Draw pairs of features, each a pair of moons."""
    pairs = [make_moons(n_rows, noise=0.1, random_state=seed + j)[0] for j in range(n_pairs)]
    return np.concatenate([np.random.default_rng(seed + j).permutation(pair) for j, pair in enumerate(pairs)], axis=1)


def draw_ring(n_rows, rng):
    """Draw two features that are not correlated, and yet each tells much of the other."""
    angle = rng.uniform(0, 2 * math.pi, n_rows)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.1 * rng.normal(size=(n_rows, 2))


@pytest.mark.parametrize("n_rows", [150, 1000])
def test_groups_are_found_whatever_the_order_and_units_of_features(n_rows, rng):
    X = np.concatenate([draw_moons(n_rows, 2), draw_ring(n_rows, rng), rng.normal(size=(n_rows, 1))], axis=1)
    assert groups_of(X) == [[0, 1], [2, 3], [4, 5], [6]]
    assert groups_of(np.exp(3 * X[:, [4, 2, 0, 6, 1, 3, 5]])) == [[0, 6], [1, 5], [2, 4], [3]]


def test_features_are_linked_through_others(rng):
    first, last = rng.normal(size=(2, 2000))
    assert groups_of(np.stack([first, first + last, last], axis=1)) == [[0, 1, 2]]


def test_independent_features_are_seldom_linked(rng):
    n_linked = sum(len(groups_of(rng.normal(size=(200, 8)))) < 8 for _ in range(100))
    assert n_linked <= 2


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_values_that_repeat_tell_as_much_as_others(share, rng):
    is_first = rng.random(1000) < share
    assert groups_of(np.stack([is_first, rng.normal(size=1000) + 2 * is_first], axis=1)) == [[0, 1]]


@pytest.mark.parametrize("weight", [[1.0] * 8, [5.0, 1, 1, 1, 1, 1, 1, 1]])
def test_each_value_lies_in_one_bin_and_bins_hold_as_much_as_they_can(weight):
    values = torch.tensor([3.0, 1, 1, 1, 2, 4, 5, 6]).double()
    is_in_bin = _independence._is_in_bin(values, torch.tensor(weight).double(), 4)
    assert (is_in_bin.sum(0) == 1).all()
    bins = is_in_bin.argmax(0).tolist()
    assert bins == ([2, 0, 0, 0, 1, 2, 3, 3] if weight[0] == 1 else [2, 0, 0, 0, 1, 3, 3, 3])


def test_rows_without_weight_do_not_count(rng):
    X = np.concatenate([rng.normal(size=(300, 2)), np.repeat(rng.normal(size=(300, 1)), 2, axis=1)])
    assert groups_of(X) == [[0, 1]]
    assert groups_of(X, np.repeat([1.0, 0.0], 300)) == [[0], [1]]
    assert groups_of(X, np.repeat([0.0, 1.0], 300)) == [[0, 1]]


@pytest.mark.parametrize("shape", [(2, 3), (12, 500), (5, 1)])
def test_any_number_of_rows_and_features_has_groups(shape, rng):
    assert sorted(sum(groups_of(rng.normal(size=shape)), [])) == list(range(shape[1]))


def test_a_feature_of_one_value_depends_on_nothing(rng):
    assert groups_of(np.stack([np.ones(200), rng.normal(size=200)], axis=1)) == [[0], [1]]


def product(frame):
    """Return the product of Gaussians of two groups, and their covariance as features."""
    covariance = torch.tensor([[1.0, 0.0, 0.6], [0.0, 2.0, 0.0], [0.6, 0.0, 1.5]]).double()
    rows = normal(4000, 3) @ torch.linalg.cholesky(covariance).T
    groups = [torch.tensor([0, 2]), torch.tensor([1])]
    factors = [fit_gaussian(rows[:, group], torch.ones(4000).double()) for group in groups]
    return ProductDensity(factors, groups, frame)


def test_a_product_adds_up_log_densities_of_groups_and_is_normalised():
    frame = torch.tensor([[1.0, 0.3, 0.0], [0.0, 2.0, -0.4], [0.2, 0.0, 0.5]]).double()
    density, z = product(frame), normal(7, 3)
    features = z @ frame
    slow = density.factors[0].log_prob(features[:, [0, 2]]) + density.factors[1].log_prob(features[:, [1]])
    torch.testing.assert_close(density.log_prob(z), slow + torch.linalg.det(frame).abs().log())
    assert integral(density.log_prob, 3, reach=40, n_nodes=81) == pytest.approx(1, abs=1e-3)


def test_a_product_draws_what_it_says():
    frame = torch.tensor([[1.0, 0.3, 0.0], [0.0, 2.0, -0.4], [0.2, 0.0, 0.5]]).double()
    density = product(frame)
    features = density.sample(50_000, seeded()) @ frame
    expected = torch.zeros(3, 3).double()
    for factor, group in zip(density.factors, ([0, 2], [1]), strict=True):
        expected[np.ix_(group, group)] = factor.scale_trils[0] @ factor.scale_trils[0].T
    torch.testing.assert_close(features.T.cov(), expected, atol=0.04, rtol=0)


def mixtures(X):
    """Return the bases of mixtures and where their generator ended."""
    data, generator = folds(X), seeded()
    feature_map = fit_feature_map(data.rows, data.weight, use_margins=False)
    return cross_fit_bases(data, ["mixture"], feature_map, generator)["mixture"], generator.get_state()


def without_groups(monkeypatch):
    monkeypatch.setattr(_selection, "independent_groups", lambda rows, weight: [torch.arange(rows.shape[1])])


def is_product(bases):
    return any(isinstance(module, ProductDensity) for module in bases.members[0].modules())


def test_independent_groups_make_the_mixture_a_product(monkeypatch):
    X = draw_moons(300, 3)
    with_groups, state = mixtures(X)
    without_groups(monkeypatch)
    plain, state_without = mixtures(X)
    # Learnt jointly, three pairs of moons take the components of each to the third power.
    assert with_groups.score > plain.score + 0.5
    assert torch.equal(state, state_without)
    assert is_product(with_groups) and not is_product(plain)


def test_features_whose_values_repeat_stay_with_the_others():
    X = draw_moons(300, 2)
    assert is_product(mixtures(X)[0])
    # Ten values each, of which a mixture of one feature would make spikes.
    X[:, 0] = (3 * X[:, 0]).round()
    assert not is_product(mixtures(X)[0])


def draw_exclusive_or(n_rows, rng):
    """Draw three features of which every two are independent, but whose signs multiply to one."""
    X = np.abs(rng.normal(size=(n_rows, 3))) + 1
    signs = rng.choice([-1, 1], size=(n_rows, 2))
    return X * np.column_stack([signs, signs.prod(1)])


@pytest.mark.parametrize("kind", ["exclusive or", "many weak links"])
def test_features_that_depend_on_each_other_only_together_stay_together(kind, rng, monkeypatch):
    X = draw_exclusive_or(300, rng) if kind == "exclusive or" else rng.normal(size=(200, 30))
    X = X + 0.5 * rng.choice([-1, 1], size=(len(X), 1)) if kind == "many weak links" else X
    assert len(groups_of(X)) > 1
    with_groups, _ = mixtures(X)
    without_groups(monkeypatch)
    plain, _ = mixtures(X)
    for member, expected in zip(with_groups.members, plain.members, strict=True):
        torch.testing.assert_close(member.means, expected.means, rtol=0, atol=0)


def test_margins_may_stand_between_features_and_groups(monkeypatch):
    data = folds(np.exp(draw_moons(300, 2)))
    feature_map = fit_feature_map(data.rows, data.weight, use_margins=True)
    assert Coordinates.of(feature_map).of_features(torch.tensor([0, 1])).scale is None
    with_groups = cross_fit_bases(data, ["mixture"], feature_map, seeded())["mixture"]
    without_groups(monkeypatch)
    plain = cross_fit_bases(data, ["mixture"], feature_map, seeded())["mixture"]
    assert with_groups.score > plain.score + 0.3


@pytest.mark.parametrize("n_features", [5, 300, 784])
def test_tables_of_bins_stay_small(n_features, monkeypatch):
    made = []
    original = _independence._is_in_bin
    monkeypatch.setattr(_independence, "_is_in_bin", lambda *arguments: made.append(original(*arguments)) or made[-1])
    rows = normal(max_fit_rows(n_features), n_features)
    independent_groups(rows, torch.ones(len(rows)).double())
    assert sum(len(bins) for bins in made) <= max(2000, 3 * n_features)
    assert {bins.shape[1] for bins in made} == {8000}


def test_of_many_groups_the_smallest_are_joined(rng):
    X = np.concatenate([draw_moons(1000, 2), rng.normal(size=(1000, 30))], axis=1)
    first, second, *singles, rest = groups_of(X)
    assert [first, second] == [[0, 1], [2, 3]]
    assert [len(group) for group in singles] == [1] * 13
    assert rest == list(range(17, 34))


def test_uneven_weights_say_as_much_as_fewer_rows(rng):
    weight = np.exp(2 * rng.normal(size=1000))
    assert len(groups_of(rng.normal(size=(1000, 6)), weight / weight.mean())) == 6


def test_a_fitted_product_draws_scores_and_survives_pickling():
    X = 5 * draw_moons(200, 2) + 100
    density = EBMFlowDensity(n_estimators=2, max_iter=2, random_state=0).fit(X)
    assert any(isinstance(module, ProductDensity) for module in density.density_.modules())
    draws = density.sample(2000, random_state=0)
    assert np.isfinite(density.score_samples(draws)).all()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(density)).score_samples(X), density.score_samples(X))
    # One half of each pair tells nothing of the other pair.
    assert abs(np.corrcoef(draws.T)[:2, 2:]).max() < 0.1
    assert density.score(draws) / 2000 == pytest.approx(density.score(X) / 200, abs=0.5)
