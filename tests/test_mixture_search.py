"""The search for a mixture: as good as a tuned one, for clusters of any size and shape."""

import math

import numpy as np
import pytest
import torch
from helpers import folds
from sklearn.mixture import GaussianMixture

from sk_ebm import _mixture, _mixture_search
from sk_ebm._mixture import fit_gaussian, mixture_of_mixtures
from sk_ebm._mixture_search import (
    Coordinates,
    _cross_fit_crowded,
    _halfway_down,
    _most_to_come,
    _shapes,
    _shapes_at_atoms,
    search_mixture,
)
from sk_ebm._support import fit_feature_map


def search(data):
    """Return the bases found for whitened rows, and the map that whitens."""
    feature_map = fit_feature_map(data.rows, data.weight, use_margins=False)
    z = data.with_rows(feature_map(data.rows)[0])
    return search_mixture(z, Coordinates.of(feature_map), torch.Generator().manual_seed(0)), feature_map


def score(X, fresh):
    """Return the mean log density (nats) of new rows under the average of the members fitted to X."""
    bases, feature_map = search(folds(X))
    z, log_det = feature_map(torch.as_tensor(fresh))
    log_prob = torch.stack([member.log_prob(z) for member in bases.members]).logsumexp(0) - math.log(len(bases.members))
    return float((log_prob + log_det).mean())


def draw_cross(n, rng):
    """Draw two long, thin clusters that cross at right angles."""
    X = rng.normal(size=(n, 2)) * [2.0, 0.1]
    is_upright = rng.random(n) < 0.5
    X[is_upright] = X[is_upright][:, ::-1]
    return torch.from_numpy(X)


def log_prob_of_cross(X):
    narrow, wide = torch.distributions.Normal(0.0, 0.1), torch.distributions.Normal(0.0, 2.0)
    axes = [wide.log_prob(X[:, i]) + narrow.log_prob(X[:, 1 - i]) for i in (0, 1)]
    return torch.stack(axes).logsumexp(0) - np.log(2)


@pytest.mark.parametrize("n", [200, 1000])
def test_thin_components_are_not_pulled_towards_what_is_wide_in_others(n, rng):
    X, fresh = draw_cross(n, rng), draw_cross(5000, rng)
    # A count of one row for the prior costs .03 nats with 1000 rows, and .2 with 200.
    assert score(X, fresh) > float(log_prob_of_cross(fresh).mean()) - 10 / n


def draw_clusters(common, unlikeness, rng, n_clusters=4):
    """Return a function that draws rows of clusters whose covariances are more or less alike."""
    n_features = len(common)
    shape = n_clusters, n_features, n_features
    factors = common + unlikeness * rng.normal(size=shape)
    centres = 3 * rng.normal(size=shape[:2])

    def draw(n):
        label, noise = rng.integers(n_clusters, size=n), rng.normal(size=(n, n_features))
        return centres[label] + np.einsum("nij,nj->ni", factors[label], noise)

    return draw


def test_components_of_few_rows_that_are_alike_are_pulled_together(rng, monkeypatch):
    draw = draw_clusters(np.eye(10), 0.2, rng)
    X, fresh = draw(150), draw(2000)
    ours = score(X, fresh)
    assert ours > GaussianMixture(4, covariance_type="tied", n_init=3, random_state=0).fit(X).score(fresh) + 0.3
    monkeypatch.setattr(_mixture_search, "_MIN_FEATURES_TO_TIGHTEN", math.inf)
    assert ours > score(X, fresh) + 0.3


def test_thin_components_that_differ_get_a_looser_prior_still(monkeypatch):
    rng = np.random.default_rng(2)
    draw = draw_clusters(rng.normal(size=(8, 8)), 0.3, rng)
    X, fresh = draw(200), draw(2000)
    ours = score(X, fresh)
    monkeypatch.setattr(_mixture_search, "_LOOSER_PRIOR_COUNTS", _mixture_search._LOOSER_PRIOR_COUNTS[:1])
    assert ours > score(X, fresh) + 0.3


@pytest.mark.parametrize(("n_clusters", "n_features"), [(7, 3), (9, 6)])
def test_numbers_of_components_between_the_usual_ones_are_tried(n_clusters, n_features, rng):
    centres = 8 * rng.normal(size=(n_clusters, n_features))
    bases, _ = search(folds(centres[np.arange(150) % n_clusters] + rng.normal(size=(150, n_features))))
    assert {len(member.means) for member in bases.members} == {n_clusters}


def test_sizes_halfway_down_are_those_left_out_below_a_small_one():
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert _halfway_down(sizes, 6) == 5
    assert _halfway_down(sizes, 16) == 14
    assert [_halfway_down(sizes, size) for size in (1, 2, 24)] == [None, None, None]


def test_mixture_is_about_as_good_as_a_tuned_one(rng):
    X = rng.normal(size=(600, 3)) * [1, 2, 3] + np.array([[0, 0, 0], [9, 0, 0], [0, 20, 5]])[rng.integers(0, 3, 600)]
    reference = GaussianMixture(3, covariance_type="tied", random_state=0).fit(X[:400])
    assert score(X[:400], X[400:]) > reference.score(X[400:]) - 0.05


def test_scales_that_have_seen_held_out_rows_do_not_win_by_that(rng):
    n_features = 60
    centres = np.zeros((2, n_features))
    centres[1] = 1.0
    rows = centres[rng.integers(2, size=2120)] + rng.normal(size=(2120, n_features))
    X, fresh = rows[:120], rows[120:]
    # One scale for all, as in the user's units, where 60 that are fitted to all rows look better held out.
    reference = GaussianMixture(2, covariance_type="spherical", n_init=3, random_state=0).fit(X)
    assert score(X, fresh) > reference.score(fresh) - 0.1


def test_many_rows_are_all_searched_by_fewer_members(rng, monkeypatch):
    """Ten clusters of 20 rows are more than 50 rows show, and one member sees them all."""
    X = rng.normal(size=(200, 2)) + 20 * np.arange(10)[np.arange(200) // 4 % 10, None] * [1, -1]
    fitted_to = []
    original = _mixture_search.fit_mixtures

    def spy(z, weight, n_components, **options):
        fitted_to.append((*weight.shape, n_components))
        return original(z, weight, n_components, **options)

    monkeypatch.setattr(_mixture_search, "fit_mixtures", spy)
    monkeypatch.setattr(_mixture_search, "_MAX_SEARCH_ROWS", 50)
    monkeypatch.setattr(_mixture_search, "_cross_fit_crowded", lambda *arguments: None)
    search(folds(X))
    *tried, (n_members, n_rows, n_components) = fitted_to
    assert {(b, n) for b, n, _ in tried} == {(1, 200)}
    assert (n_members, n_rows) == (4, 200) and n_components >= 8


def test_with_many_features_what_fewer_rows_choose_is_fitted_to_all(rng, monkeypatch):
    fitted_to = []
    original = _mixture_search.fit_mixtures

    def spy(z, weight, n_components, **options):
        fitted_to.append(len(z))
        return original(z, weight, n_components, **options)

    monkeypatch.setattr(_mixture_search, "fit_mixtures", spy)
    monkeypatch.setattr(_mixture, "MAX_START_ROWS", 50)
    monkeypatch.setattr(_mixture_search, "MAX_START_ROWS", 50)
    monkeypatch.setattr(_mixture_search, "_MAX_SEARCH_VALUES", 300)
    monkeypatch.setattr(_mixture_search, "_cross_fit_crowded", lambda *arguments: None)
    search(folds(rng.normal(size=(200, 3))))
    assert set(fitted_to[:-1]) == {100} and fitted_to[-1] == 200


def test_values_that_repeat_get_narrow_components(rng, monkeypatch):
    X = rng.normal(size=(300, 2))
    X[rng.random(300) < 0.3, 0] = 1.0
    data = folds(X)
    narrow, feature_map = search(data)
    rows = zip(feature_map(data.rows)[0], data.fold, strict=True)
    slow = [float(narrow.members[int(k)].log_prob(z[None])) for z, k in rows]
    monkeypatch.setattr(_mixture_search, "_shapes_at_atoms", lambda *arguments: [])
    plain, _ = search(data)
    assert narrow.score == pytest.approx(np.mean(slow))
    assert narrow.score > plain.score + 0.5


def test_values_that_do_not_repeat_get_no_narrow_components(rng):
    data = folds(rng.normal(size=(300, 2)))
    assert not _shapes_at_atoms(standardising(data).standardised, data.rows)


def test_many_small_clusters_are_found_in_few_rows(rng, monkeypatch):
    centres = rng.uniform(-100, 100, size=(30, 2))

    def draw(n):
        return torch.from_numpy(centres[rng.integers(30, size=n)] + rng.normal(size=(n, 2)))

    X, fresh = draw(200), draw(5000)
    crowded = score(X, fresh)
    monkeypatch.setattr(_mixture_search, "_cross_fit_crowded", lambda *arguments: None)
    assert crowded > score(X, fresh) + 0.1


def test_small_clusters_that_are_not_there_leave_no_trace(rng, monkeypatch):
    data, generator = folds(rng.normal(size=(200, 3))), torch.Generator()
    with_them = search_mixture_of(data, generator.manual_seed(0))
    state = generator.get_state()
    monkeypatch.setattr(_mixture_search, "_cross_fit_crowded", lambda *arguments: None)
    without = search_mixture_of(data, generator.manual_seed(0))
    assert len(with_them.members[0].means) == 1
    torch.testing.assert_close(with_them.members[0].means, without.members[0].means, rtol=0, atol=0)
    assert torch.equal(generator.get_state(), state)


def search_mixture_of(data, generator):
    """Return the bases found for rows as they are."""
    return search_mixture(data, standardising(data), generator)


def standardising(data):
    """Return what rows are that have been whitened already."""
    return Coordinates.of(fit_feature_map(data.rows, data.weight, use_margins=False))


def test_small_clusters_are_not_tried_where_rows_are_many(rng, monkeypatch):
    monkeypatch.setattr(_mixture_search, "_N_COMPONENTS", (1, 2, 3))
    data = folds(rng.normal(size=(100, 2)))
    assert _cross_fit_crowded(data, _shapes(standardising(data)), torch.Generator()) is None


def test_a_mixture_of_mixtures_is_one(rng):
    parts = [fit_gaussian(torch.from_numpy(rng.normal(size=(30, 2))), torch.ones(30).double()) for _ in range(2)]
    shares, z = torch.tensor([0.3, 0.7]).double(), torch.from_numpy(rng.normal(size=(9, 2)))
    expected = shares @ torch.stack([part.log_prob(z).exp() for part in parts])
    torch.testing.assert_close(mixture_of_mixtures(parts, shares).log_prob(z).exp(), expected)


def test_a_shape_is_given_up_only_where_more_components_cannot_help_it():
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    # Each doubling gains half of what the last one gained, and with 16 a quarter of a nat: no more than twice that is
    # to come.
    slowing = [-10.0, -6.0, -5.0, -4.0, -3.5, -3.0, -2.8, -2.75]
    assert _most_to_come(slowing, sizes) == pytest.approx(-2.75 + 2 * 0.25)
    # With fewer components than clusters, nothing can be said.
    assert _most_to_come(slowing[:-1], sizes) == math.inf
    # What gets worse is not expected to get better.
    assert _most_to_come([*slowing[:-1], -3.2], sizes) == pytest.approx(-3.2)


def test_a_hopeless_shape_is_not_tried_to_the_end(rng, monkeypatch):
    tried = []
    fit = _mixture_search.fit_mixtures

    def recorded(z, weights, n_components, *, covariance_type, **options):
        tried.append((covariance_type, n_components))
        return fit(z, weights, n_components, covariance_type=covariance_type, **options)

    monkeypatch.setattr(_mixture_search, "fit_mixtures", recorded)
    # A thin bent sheet: round components never get there, though more of them always help.
    t = rng.uniform(-1, 1, size=(800, 1))
    search(folds(np.hstack([t, t + 0.003 * rng.normal(size=(800, 3)), t**2]), 2))
    most = {shape: max(k for name, k in tried if name == shape) for shape, _ in tried}
    assert most["full"] > 1
    assert 16 <= most["spherical"] < 64
    assert 16 <= most["tied_spherical"] < 64
