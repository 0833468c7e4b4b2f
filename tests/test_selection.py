"""Cross-fitted choices: no row judges what it helped to fit, and the right candidates win."""

import math

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from sk_ebm import _selection
from sk_ebm._folds import Folds
from sk_ebm._mixture import fit_gaussian, mixture_of_mixtures
from sk_ebm._selection import (
    _halfway_down,
    _most_to_come,
    _shapes_at_atoms,
    choose_feature_map,
    cross_fit,
    cross_fit_bases,
    max_fit_rows,
    mix_members,
    shares_of_parts,
)
from sk_ebm._stacking import shares_with_prior
from sk_ebm._student_t import StudentT, fit_student_t
from sk_ebm._support import fit_feature_map

NAMES = ("gaussian", "student_t", "mixture")


def folds(X, n_members=4):
    rows = torch.from_numpy(np.asarray(X, dtype=np.float64))
    return Folds(rows, torch.ones(len(rows), dtype=torch.float64), torch.arange(len(rows)) % n_members, n_members)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


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
def test_thin_components_are_not_pulled_towards_what_is_wide_in_others(n, rng, generator):
    data = folds(draw_cross(n, rng))
    feature_map = fit_feature_map(data.rows, data.weight, use_margins=False)
    bases = cross_fit_bases(data, ["mixture"], feature_map, generator)["mixture"]
    new = draw_cross(5000, rng)
    z, log_det = feature_map(new)
    loss = [float((log_prob_of_cross(new) - member.log_prob(z) - log_det).mean()) for member in bases.members]
    # A count of one row for the prior costs .03 nats with 1000 rows, and .2 with 200.
    assert np.mean(loss) < 10 / n


def draw_clusters(unlikeness, rng, n_features=10, n_clusters=4):
    """Return a function that draws rows of clusters whose covariances are more or less alike."""
    shape = n_clusters, n_features, n_features
    factors = np.eye(n_features) + unlikeness * rng.normal(size=shape)
    centres = 3 * rng.normal(size=shape[:2])

    def draw(n):
        label, noise = rng.integers(n_clusters, size=n), rng.normal(size=(n, n_features))
        return centres[label] + np.einsum("nij,nj->ni", factors[label], noise)

    return draw


def score_of_mixture(X, fresh):
    data = folds(X)
    feature_map = fit_feature_map(data.rows, data.weight, use_margins=False)
    generator = torch.Generator().manual_seed(0)
    members = cross_fit_bases(data, ["mixture"], feature_map, generator)["mixture"].members
    z, log_det = feature_map(torch.from_numpy(fresh))
    pooled = torch.stack([member.log_prob(z) for member in members]).exp().mean(0).log()
    return float((pooled + log_det).mean())


def test_components_of_few_rows_that_are_alike_are_pulled_together(rng, monkeypatch):
    draw = draw_clusters(0.2, rng)
    X, fresh = draw(150), draw(2000)
    score = score_of_mixture(X, fresh)
    assert score > GaussianMixture(4, covariance_type="tied", n_init=3, random_state=0).fit(X).score(fresh) + 0.3
    monkeypatch.setattr(_selection, "_MIN_FEATURES_TO_TIGHTEN", math.inf)
    assert score > score_of_mixture(X, fresh) + 0.3


@pytest.mark.parametrize(("n_clusters", "n_features"), [(7, 3), (9, 6)])
def test_numbers_of_components_between_the_usual_ones_are_tried(n_clusters, n_features, rng, generator):
    centres = 8 * rng.normal(size=(n_clusters, n_features))
    data = folds(centres[np.arange(150) % n_clusters] + rng.normal(size=(150, n_features)))
    feature_map = fit_feature_map(data.rows, data.weight, use_margins=False)
    members = cross_fit_bases(data, ["mixture"], feature_map, generator)["mixture"].members
    assert {len(member.means) for member in members} == {n_clusters}


def test_sizes_halfway_down_are_those_left_out_below_a_small_one():
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert _halfway_down(sizes, 6) == 5
    assert _halfway_down(sizes, 16) == 14
    assert [_halfway_down(sizes, size) for size in (1, 2, 24)] == [None, None, None]


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


def test_mixture_is_about_as_good_as_a_tuned_one(rng, generator):
    X = rng.normal(size=(600, 3)) * [1, 2, 3] + np.array([[0, 0, 0], [9, 0, 0], [0, 20, 5]])[rng.integers(0, 3, 600)]
    data = folds(X[:400])
    feature_map = fit_feature_map(data.rows, data.weight, use_margins=False)
    members = cross_fit_bases(data, NAMES, feature_map, generator)["mixture"].members
    z, log_det = feature_map(torch.from_numpy(X[400:]))
    ours = torch.stack([member.log_prob(z) + log_det for member in members]).exp().mean(0).log().mean()
    reference = GaussianMixture(3, covariance_type="tied", random_state=0).fit(X[:400])
    assert float(ours) > reference.score(X[400:]) - 0.05


def test_scales_that_have_seen_held_out_rows_do_not_win_by_that(rng, generator):
    n_features = 60
    centres = np.zeros((2, n_features))
    centres[1] = 1.0

    def draw(n):
        return centres[rng.integers(2, size=n)] + rng.normal(size=(n, n_features))

    data, fresh = folds(draw(120)), torch.from_numpy(draw(2000))
    feature_map = fit_feature_map(data.rows, data.weight, use_margins=False)
    bases = cross_fit_bases(data, ("mixture",), feature_map, generator)["mixture"]
    z, log_det = feature_map(fresh)
    ours = torch.stack([member.log_prob(z) + log_det for member in bases.members]).exp().mean(0).log().mean()
    # One scale for all, as in the user's units, where 60 that are fitted to all rows look better held out.
    tuned = GaussianMixture(2, covariance_type="spherical", n_init=3, random_state=0).fit(data.rows)
    assert float(ours) > tuned.score(fresh.numpy()) - 0.1


def test_many_rows_are_all_searched_by_fewer_members(rng, generator, monkeypatch):
    """Ten clusters of 20 rows are more than 50 rows show, and one member sees them all."""
    X = rng.normal(size=(200, 2)) + 20 * np.arange(10)[np.arange(200) // 4 % 10, None] * [1, -1]
    fitted_to = []
    original = _selection.fit_mixtures

    def spy(z, weight, n_components, **options):
        fitted_to.append((*weight.shape, n_components))
        return original(z, weight, n_components, **options)

    monkeypatch.setattr(_selection, "fit_mixtures", spy)
    monkeypatch.setattr(_selection, "_MAX_SEARCH_ROWS", 50)
    best = best_base(folds(X), generator)
    assert best == "mixture"
    *search, (n_members, n_rows, n_components) = fitted_to
    assert {(b, n) for b, n, _ in search} == {(1, 200)}
    assert (n_members, n_rows) == (4, 200) and n_components >= 8


@pytest.mark.parametrize("n_features, n_rows", [(1, 50_000), (20, 50_000), (50, 20_000), (784, 8000)])
def test_bases_see_as_many_rows_as_time_and_memory_allow(n_features, n_rows):
    assert max_fit_rows(n_features) == n_rows


@pytest.mark.parametrize("shape", ["skewed", "plain"])
def test_normal_scores_are_taken_where_they_help(rng, generator, shape):
    X = rng.normal(size=(400, 4))
    X = np.exp(1.3 * X) if shape == "skewed" else X
    feature_map, _ = choose_feature_map(folds(X), NAMES, generator)
    assert (feature_map.margins is not None) == (shape == "skewed")


def test_values_that_repeat_get_narrow_components(rng, generator, monkeypatch):
    X = rng.normal(size=(300, 2))
    X[rng.random(300) < 0.3, 0] = 1.0
    data = folds(X)
    feature_map = fit_feature_map(data.rows, data.weight, use_margins=False)
    narrow = cross_fit_bases(data, ["mixture"], feature_map, generator)["mixture"]
    rows = zip(feature_map(data.rows)[0], data.fold, strict=True)
    slow = [float(narrow.members[int(k)].log_prob(z[None])) for z, k in rows]
    monkeypatch.setattr("sk_ebm._selection._shapes_at_atoms", lambda *arguments: [])
    plain = cross_fit_bases(data, ["mixture"], feature_map, generator)["mixture"]
    assert narrow.score == pytest.approx(np.mean(slow))
    assert narrow.score > plain.score + 0.5


def test_values_that_do_not_repeat_get_no_narrow_components(rng):
    data = folds(rng.normal(size=(300, 2)))
    assert not _shapes_at_atoms(fit_feature_map(data.rows, data.weight, use_margins=False), data.rows)


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


def test_a_hopeless_shape_is_not_tried_to_the_end(rng, generator, monkeypatch):
    tried = []
    fit = _selection.fit_mixtures

    def recorded(z, weights, n_components, *, covariance_type, **options):
        tried.append((covariance_type, n_components))
        return fit(z, weights, n_components, covariance_type=covariance_type, **options)

    monkeypatch.setattr(_selection, "fit_mixtures", recorded)
    # A thin bent sheet: round components never get there, though more of them always help.
    t = rng.uniform(-1, 1, size=(800, 1))
    data = folds(np.hstack([t, t + 0.003 * rng.normal(size=(800, 3)), t**2]), 2)
    feature_map = fit_feature_map(data.rows, data.weight, use_margins=False)
    cross_fit_bases(data, ["mixture"], feature_map, generator)
    most = {shape: max(k for name, k in tried if name == shape) for shape, _ in tried}
    assert most["full"] > 1
    assert 16 <= most["spherical"] < 64
    assert 16 <= most["tied_spherical"] < 64
