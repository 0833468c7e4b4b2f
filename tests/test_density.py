"""EBMFlowDensity as a density: normalised, in the user's units, weighted, reproducible, and clear about bad input."""

import warnings
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_iris
from torch import nn

from sk_ebm import EBMFlowDensity, LowEffectiveSampleSizeWarning, TrainingWarning, _density
from sk_ebm._base_flows import Lead
from sk_ebm._training import Outcome

QUICK = {
    "base": "gaussian",
    "max_iter": 6,
    "n_estimators": 2,
    "n_chains": 64,
    "hidden_layer_sizes": (16, 16),
    "random_state": 0,
}
ATTRIBUTES = """log_normalizer_ log_normalizer_std_error_ effective_sample_size_ acceptance_rate_ history_ n_iter_
    converged_ base_ outcome_""".split()


def quick(**parameters):
    """Estimator that runs all the machinery in about a second."""
    return EBMFlowDensity(**{**QUICK, **parameters})


def two_clusters(n_samples, n_features, seed=0):
    """Rows of two clusters of unequal size, neither centred nor scaled."""
    rng = np.random.default_rng(seed)
    center = np.where(rng.random((n_samples, 1)) < 0.7, 0.0, 4.0)
    return 10.0 + 2.0 * (center + rng.normal(size=(n_samples, n_features)))


@pytest.fixture(scope="module")
def tilted():
    """Model whose energies add to its bases."""
    return quick(base="gaussian", max_iter=30).fit(two_clusters(300, 2))


def integral(model, low, high, n_features):
    """Integrate the density over a cube by the midpoint rule."""
    n = 4000 if n_features == 1 else 300
    step = (high - low) / n
    axis = low + step * (np.arange(n) + 0.5)
    grid = np.stack(np.meshgrid(*[axis] * n_features), axis=-1).reshape(-1, n_features)
    return np.exp(model.score_samples(grid)).sum() * step**n_features


@pytest.mark.parametrize("n_features", [1, 2])
@pytest.mark.parametrize(
    "parameters",
    [
        {"base": "gaussian"},
        {"base": "student_t"},
        {"base": "mixture"},
        {"base": "heavy_tailed_mixture"},
        {"base": "flow"},
        {"base": "auto"},
        {"feature_map": "marginal"},
        {"flow": "affine", "sampler": "imh"},
        {"n_estimators": 1, "n_local_steps": 0},
    ],
    ids=str,
)
def test_integrates_to_one(n_features, parameters):
    model = quick(**parameters).fit(two_clusters(150, n_features))
    half_width = 400 if parameters.get("base") == "student_t" and n_features == 1 else 60
    assert integral(model, 15 - half_width, 15 + half_width, n_features) == pytest.approx(1, abs=0.015)


def test_learns_more_than_its_base():
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 500)
    ring = np.c_[np.cos(angle), np.sin(angle)] * 3 + 0.2 * rng.normal(size=(500, 2))
    model = EBMFlowDensity(base="gaussian", n_estimators=2, max_iter=40, random_state=0).fit(ring[:400])
    untrained = quick(max_iter=1).fit(ring[:400])
    assert model.score(ring[400:]) > untrained.score(ring[400:]) + 0.3 * 100
    assert model.score_samples([[0.0, 0.0]]) < model.score_samples([[3.0, 0.0]]) - 2


def test_draws_follow_the_density():
    model = quick(base="mixture").fit(two_clusters(400, 2))
    draws = model.sample(4000, random_state=0)
    # The mean of log p over draws of p is minus the entropy; the grid gives the same number.
    axis = np.linspace(-5, 40, 400)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    log_p = model.score_samples(grid)
    p = np.exp(log_p)
    p /= p.sum()
    scores = model.score_samples(draws)
    assert scores.mean() == pytest.approx((p * log_p).sum(), abs=5 * scores.std() / np.sqrt(4000) + 0.01)
    np.testing.assert_allclose(draws.mean(0), p @ grid, atol=0.35)
    assert len(np.unique(draws, axis=0)) > 0.95 * len(draws)


def test_scores_are_in_the_units_of_the_user():
    X = two_clusters(150, 2)
    scale = np.array([1e-6, 1e6])
    plain, scaled = quick().fit(X), quick().fit(X * scale - 7e-6)
    expected = plain.score_samples(X) - np.log(scale).sum()
    np.testing.assert_allclose(scaled.score_samples(X * scale - 7e-6), expected, atol=0.02)


def test_fitted_attributes_are_there_and_sensible():
    model = quick(base="auto").fit(two_clusters(120, 2))
    assert all(hasattr(model, name) for name in ATTRIBUTES)
    assert 0 < model.effective_sample_size_ <= 1
    assert 0 <= model.log_normalizer_std_error_ < 0.1
    assert set(model.acceptance_rate_) == {"local", "flow"}
    assert all(0 < rate <= 1 for rate in model.acceptance_rate_.values())
    assert model.base_["name"] in model.base_["shares"]
    assert sum(model.base_["shares"].values()) == pytest.approx(1)
    assert {"base", "iteration", "seconds", "train_log_likelihood", "validation_log_likelihood"} <= set(
        model.history_[0]
    )


def test_weight_two_is_the_row_twice_and_weight_zero_is_no_row():
    X = two_clusters(60, 2)
    weight = np.ones(60)
    weight[:10], weight[50:] = 2.0, 0.0
    weighted = quick(base="auto").fit(X, sample_weight=weight)
    repeated = quick(base="auto").fit(np.r_[X[:50], X[:10]])
    np.testing.assert_allclose(weighted.score_samples(X), repeated.score_samples(X), atol=1e-6)


def test_weights_move_mass():
    X = two_clusters(300, 1)
    is_right = X[:, 0] > 14
    heavy = quick(base="mixture").fit(X, sample_weight=np.where(is_right, 20.0, 1.0))
    plain = quick(base="mixture").fit(X)
    assert np.mean(heavy.sample(2000, random_state=0) > 14) > np.mean(plain.sample(2000, random_state=0) > 14) + 0.3


def test_heavy_tails_choose_a_heavy_tailed_base():
    X = np.random.default_rng(0).standard_t(2, size=(400, 2)) * 3
    model = EBMFlowDensity(max_iter=10, n_estimators=2, n_chains=64, random_state=0).fit(X)
    assert model.base_["shares"]["gaussian"] < 0.3
    assert np.isfinite(model.score_samples(X * 1e6)).all()


def test_bases_that_no_energy_tilts_propose_perfectly():
    X = np.random.default_rng(0).normal(size=(200, 3))
    # What energies add is never worth a thousand nats per row.
    model = quick(base="gaussian", tol=1000.0).fit(X)
    assert all(ensemble.is_flat for ensemble in model.density_.ensembles)
    assert model.effective_sample_size_ == pytest.approx(1)
    assert model.log_normalizer_ == pytest.approx(0, abs=1e-9)
    assert len(model.proposal_.components) == len(model.density_.ensembles[0])


def test_skewed_margins_choose_normal_scores():
    X = np.random.default_rng(0).lognormal(sigma=1.2, size=(400, 4))
    model = EBMFlowDensity(max_iter=4, n_estimators=2, n_chains=64, random_state=0).fit(X)
    assert model.feature_map_.margins is not None


@pytest.mark.parametrize(
    ("shape", "base"),
    [
        ((2, 1), "auto"),
        ((2, 3), "auto"),
        ((5, 2), "auto"),
        ((20, 5), "auto"),
        ((15, 30), "auto"),
        ((30, 60), "mixture"),
    ],
)
@pytest.mark.filterwarnings("ignore::sk_ebm.LowEffectiveSampleSizeWarning")
def test_few_rows_give_finite_scores(shape, base):
    X = np.random.default_rng(0).normal(size=shape)
    model = quick(base=base, max_iter=2).fit(X)
    assert np.isfinite(model.score_samples(X)).all()
    assert np.isfinite(model.sample(5, random_state=0)).all()


def test_real_data_beats_a_gaussian():
    X = load_iris().data
    train, test = X[::2], X[1::2]
    covariance = np.cov(train.T)
    centred = test - train.mean(0)
    gaussian = (
        -0.5 * np.sum(centred @ np.linalg.inv(covariance) * centred, 1)
        - 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    )
    model = EBMFlowDensity(max_iter=10, n_chains=64, random_state=0).fit(train)
    assert model.score(test) > gaussian.sum()


BAD_INPUT = {
    "nan": (lambda X: np.where(X == X[0, 0], np.nan, X), {}, ValueError, "NaN"),
    "one dimension": (lambda X: X[:, 0], {}, ValueError, "Expected 2D array"),
    "one row": (lambda X: X[:1], {}, ValueError, "1 sample"),
    "equal rows": (lambda X: np.repeat(X[:1], 5, 0), {}, ValueError, "two different rows"),
    "constant feature": (lambda X: np.c_[X, np.full(len(X), 3.5)], {}, ValueError, r"feature 2 \(value 3\.5\)"),
    "text": (lambda X: X.astype(str).astype(object) + "a", {}, ValueError, "could not convert"),
    "complex": (lambda X: X + 1j, {}, ValueError, "[Cc]omplex"),
    "too large": (lambda X: X * 1e300, {}, ValueError, "[Rr]escale"),
    "negative weight": (lambda X: X, {"sample_weight": -np.ones(30)}, ValueError, "[Nn]egative"),
    "zero weight": (
        lambda X: X,
        {"sample_weight": np.zeros(30)},
        ValueError,
        "zero for every row|at least one non-zero",
    ),
    "weight of one row": (lambda X: X, {"sample_weight": np.eye(30)[0]}, ValueError, "two different rows"),
    "too few weights": (lambda X: X, {"sample_weight": np.ones(3)}, ValueError, "sample_weight.shape"),
    "nan weight": (lambda X: X, {"sample_weight": np.full(30, np.nan)}, ValueError, "NaN"),
}


@pytest.mark.parametrize(("change", "arguments", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_to_fit_says_what_is_wrong(change, arguments, error, message):
    with pytest.raises(error, match=message):
        quick().fit(change(two_clusters(30, 2)), **arguments)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"base": "cauchy"}, "'base'.*cauchy"),
        ({"hidden_layer_sizes": (0,)}, "hidden_layer_sizes.*positive.*0"),
        ({"hidden_layer_sizes": ()}, "hidden_layer_sizes"),
        ({"validation_fraction": 0.9}, "'validation_fraction'.*0.9"),
        ({"max_iter": 0}, "'max_iter'.*0"),
        ({"learning_rate": -1.0}, "'learning_rate'.*-1"),
        ({"device": "abacus"}, "device='abacus'.*'auto' or 'cpu'"),
        ({"energy": lambda d: nn.Linear(d, 2)}, r"energy.*shape \(n,\)"),
        ({"energy": lambda d: 3}, "energy.*torch.nn.Module"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_parameters_say_what_is_wrong(parameters, message):
    with pytest.raises((ValueError, TypeError), match=message):
        quick(**parameters).fit(two_clusters(30, 2))


@pytest.mark.parametrize(
    ("n_samples", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError)]
)
def test_bad_number_of_draws_says_what_is_wrong(n_samples, error):
    model = quick(max_iter=1).fit(two_clusters(30, 2))
    with pytest.raises(error, match=f"n_samples must .*{n_samples}"):
        model.sample(n_samples)


def test_failed_fit_leaves_the_previous_model_whole():
    X = two_clusters(60, 2)
    model = quick().fit(X)
    expected = model.score_samples(X)
    with pytest.raises(ValueError):
        model.fit(np.c_[X, np.ones(60)])
    assert model.n_features_in_ == 2
    np.testing.assert_array_equal(model.score_samples(X), expected)


class SteepEnergy(nn.Module):
    """Energy that no proposal can follow."""

    def __init__(self, n_features):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0), requires_grad=True)

    def forward(self, z):
        return 300 * self.scale * torch.sin(20 * z).sum(-1)


class BreakingEnergy(nn.Module):
    """Energy that works for a while, and then returns NaN."""

    def __init__(self, n_features):
        super().__init__()
        self.layer = nn.Linear(n_features, 1)
        self.n_calls = 0

    def forward(self, z):
        self.n_calls += self.layer.weight.requires_grad and torch.is_grad_enabled()
        return self.layer(z).squeeze(-1) * (float("nan") if self.n_calls > 40 else 1)


def test_low_effective_sample_size_warns_with_the_remedy(monkeypatch):
    # Energies so steep are scaled down otherwise.
    monkeypatch.setattr("sk_ebm._fitting._SCALES", (1.0,))
    monkeypatch.setattr("sk_ebm._fitting._MAX_DRAWS", 20_000)
    with pytest.warns(LowEffectiveSampleSizeWarning, match="effective sample size.*Try the default n_estimators"):
        quick(energy=SteepEnergy, max_iter=1, flow="affine").fit(two_clusters(100, 50))


def test_energies_too_steep_for_the_proposals_are_scaled_down():
    model = quick(energy=SteepEnergy, max_iter=1).fit(two_clusters(60, 10))
    assert model.effective_sample_size_ > 0.02
    assert all(scale < 1 for scale in model.base_["scales"][model.base_["name"]])
    # Not the score of the energies as they were trained.
    assert model.base_["validation_log_likelihood"] == pytest.approx(np.nanmean(model.oob_log_density_), abs=0.5)


class NarrowEnergy(nn.Module):
    """Half the squared radius, which makes a density narrower than its base."""

    def __init__(self, n_features):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, z):
        return 0.5 * z.square().sum(-1) + self.shift


def test_energies_are_scaled_to_what_held_out_rows_ask_for(tilted):
    X = np.random.default_rng(0).normal(size=(300, 2))
    wrong = quick(base="gaussian", energy=NarrowEnergy, max_iter=1, early_stopping=False).fit(X)
    assert wrong.base_["scales"]["gaussian"] == [0.0] * len(wrong.density_.ensembles[0])
    assert tilted.base_["scales"]["gaussian"] == [1.0] * len(tilted.density_.ensembles[0])
    assert tilted.density_.ensembles[0].log_normalizers.abs().max() > 0.1


def test_held_out_rows_do_not_flatter_a_base_of_flows(monkeypatch):
    monkeypatch.setattr("sk_ebm._fitting._MAX_DRAWS", 20_000)
    # The coordinates in which flows work are whitened by all rows, which tells much about 30 features of 90 rows.
    X = np.random.default_rng(0).normal(size=(1090, 30))
    # One iteration is enough: it is where flows start that flattered them.
    model = quick(base="flow", max_iter=1).fit(X[:90])
    assert model.base_["validation_log_likelihood"] < model.score_samples(X[90:]).mean() + 1


def test_energies_see_rows_whitened_by_those_they_train_on():
    # Whitened by all of 60 rows, 20 features of new rows are farther out than held-out rows.
    X = np.random.default_rng(0).normal(size=(1060, 20))
    model = quick(max_iter=1).fit(X[:60])
    energies = model.density_.ensembles[0].energies
    seen = [
        torch.baddbmm(energies.shift, model.feature_map_(torch.tensor(rows))[0].expand(2, -1, -1), energies.matrix)
        for rows in (X[:60], X[60:])
    ]
    distance, new_distance = (rows.square().mean(-1) for rows in seen)
    is_held_out = np.isfinite(model.oob_log_density_)
    # One of the two members has not seen such a row.
    assert float(distance.amax(0)[is_held_out].mean()) > 0.8 * float(new_distance.mean())
    assert float(distance[:, ~is_held_out].mean()) < 0.8 * float(new_distance.mean())
    assert float(distance.amin(0)[is_held_out].mean()) < 0.8 * float(new_distance.mean())


def test_healthy_fit_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick(base="auto").fit(two_clusters(100, 2))


def test_energy_that_breaks_in_training_leaves_the_best_model_and_says_so():
    X = two_clusters(60, 2)
    with pytest.warns(TrainingWarning, match="ended early"):
        model = quick(energy=BreakingEnergy, max_iter=40).fit(X)
    assert np.isfinite(model.score_samples(X)).all()
    assert not model.converged_


def test_energy_that_never_works_raises():
    class Broken(BreakingEnergy):
        def forward(self, z):
            return super().forward(z) * float("nan")

    with pytest.raises(ValueError, match="energy.*finite"):
        quick(energy=Broken).fit(two_clusters(60, 2))


class Box(nn.Module):
    """Uniform density on a box, as a base of the user's own."""

    def __init__(self, low, high):
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def log_prob(self, z):
        is_outside = ((z < self.low) | (z > self.high)).any(-1)
        return (-(self.high - self.low).log().sum()).expand(len(z)).masked_fill(is_outside, -torch.inf)

    def sample(self, n_samples, generator):
        u = torch.rand(n_samples, len(self.low), generator=generator, dtype=self.low.dtype)
        return self.low + (self.high - self.low) * u


def test_a_base_without_density_at_new_rows_is_named():
    def fit_box(z, weight):
        return Box(z[weight > 0].amin(0), z[weight > 0].amax(0))

    with pytest.raises(ValueError, match="base has no density at rows that it was not fitted to"):
        quick(base=fit_box).fit(two_clusters(60, 2))


class Quadratic(nn.Module):
    """Energy of the user's own."""

    def __init__(self, n_features):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(n_features, n_features))

    def forward(self, z):
        return (z @ self.matrix).square().sum(-1) + (z @ self.matrix).sum(-1)


class WithDropout(Quadratic):
    """Energy of a network that is another function in every call while it trains."""

    def forward(self, z):
        return super().forward(nn.functional.dropout(z, training=self.training))


def test_own_energies_are_functions():
    X = two_clusters(60, 2)
    state = torch.get_rng_state()
    first, second = (quick(energy=WithDropout).fit(X).score_samples(X) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


def test_own_energy_is_trained():
    model = quick(energy=Quadratic).fit(two_clusters(100, 2))
    energies = model.density_.ensembles[0].energies.energies.networks
    assert isinstance(energies[0], Quadratic)
    assert len(energies) == 2


def energy_with_a_frozen_layer(n_features):
    first = nn.Linear(n_features, 8).requires_grad_(False)
    nn.init.constant_(first.weight, 0.25)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))


def test_frozen_parameters_of_a_users_energy_stay_as_they_are():
    X = two_clusters(60, 2)
    model = quick(energy=energy_with_a_frozen_layer, max_iter=3, warm_start=True).fit(X).fit(X)
    for network in model.density_.ensembles[0].energies.energies.networks:
        assert bool((network[0].weight == 0.25).all())
        assert not bool((network[2].bias == 0).all())


def test_a_network_as_energy_is_no_function_that_builds_one():
    with pytest.raises(TypeError, match="function that builds a network"):
        quick(energy=nn.Linear(2, 1)).fit(two_clusters(60, 2))


def test_warm_start_with_too_few_rows_says_so():
    model = quick(n_estimators=4, warm_start=True).fit(two_clusters(60, 2))
    with pytest.raises(ValueError, match="3 different rows are enough for 3"):
        model.fit(two_clusters(60, 2)[:3])


def test_few_importance_draws_have_mean_weight_one(tilted):
    weight = np.concatenate([tilted.importance_sample(3, random_state=seed)[1] for seed in range(300)])
    assert weight.std() > 0.1
    assert abs(weight.mean() - 1) < 4 * weight.std() / np.sqrt(len(weight))


def test_early_stopping_off_runs_to_the_end():
    model = quick(early_stopping=False, max_iter=12, n_iter_no_change=1).fit(two_clusters(60, 2))
    assert model.n_iter_ == 12
    assert not model.converged_


def test_warm_start_goes_on_from_the_previous_fit():
    X = two_clusters(200, 2)
    model = quick(warm_start=True, early_stopping=False, max_iter=30).fit(X)
    feature_map, last = model.feature_map_, model.history_[-1]["validation_log_likelihood"]
    check = model.set_params(max_iter=5).fit(X).history_[0]
    assert model.feature_map_ is feature_map
    assert check["validation_log_likelihood"] == pytest.approx(last, abs=0.05)
    assert check["train_log_likelihood"] > quick().fit(X).history_[0]["train_log_likelihood"] + 0.1
    with pytest.raises(ValueError, match="features"):
        model.fit(X[:, :1])
    with pytest.raises(ValueError, match="n_estimators changed"):
        model.set_params(n_estimators=3).fit(X)


def test_warm_start_goes_on_with_as_many_energies_when_rows_have_become_many(monkeypatch):
    model = quick(n_estimators="auto", warm_start=True, max_iter=1).fit(two_clusters(60, 2))
    monkeypatch.setattr(_density, "MANY_ROWS", 100)
    model.fit(two_clusters(120, 2))
    assert len(model.density_.ensembles[0]) == 6
    assert len(model.set_params(warm_start=False).fit(two_clusters(120, 2)).density_.ensembles[0]) == 4


def test_warm_start_takes_hidden_layer_sizes_of_any_kind():
    X = two_clusters(60, 2)
    model = quick(warm_start=True, max_iter=1, hidden_layer_sizes=np.array([16, 16])).fit(X).fit(X)
    model.set_params(hidden_layer_sizes=[16, 16]).fit(X)
    model.hidden_layer_sizes.append(16)
    with pytest.raises(ValueError, match="hidden_layer_sizes changed"):
        model.fit(X)


@pytest.mark.parametrize("feature_map", ["standard", "marginal"])
@pytest.mark.parametrize("far", [[1e155, 0], [1e308, 1e308], [-1e308, 1e308]])
def test_rows_so_far_out_that_numbers_overflow_have_no_density(feature_map, far):
    X = two_clusters(100, 2) @ [[1, 0.5], [0, 1]]
    assert quick(feature_map=feature_map).fit(X).score_samples([far]) == -np.inf


def test_weights_whose_sum_overflows_are_weights():
    X, weight = two_clusters(100, 2), np.arange(1, 101) / 100
    huge = quick(max_iter=10).fit(X, sample_weight=1.7e308 * weight)
    assert any(scale > 0 for scale in huge.base_["scales"]["gaussian"])
    expected = quick(max_iter=10).fit(X, sample_weight=weight).score_samples(X)
    np.testing.assert_allclose(huge.score_samples(X), expected, atol=1e-6)


def test_verbose_writes_one_line_per_check(capsys):
    quick(verbose=1).fit(two_clusters(60, 2))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("held out" in line and "ESS" in line for line in lines)
    quick().fit(two_clusters(60, 2))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("interrupted_at", "n_iter"), [(7, 6), (14, 3)])
def test_an_interrupt_keeps_the_best_so_far_and_says_so(monkeypatch, interrupted_at, n_iter):
    """On the first base, and on the second, whether or not that one gets a share."""
    moves = []

    def interrupted(self, pool):
        moves.append(pool)
        if len(moves) == interrupted_at:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr("sk_ebm._training._TrainState.move_chains", interrupted)
    model = EBMFlowDensity(n_estimators=2, max_iter=10, random_state=0)
    with pytest.warns(TrainingWarning, match=f"interrupted after {n_iter} iterations"):
        model.fit(two_clusters(200, 2))
    assert Outcome.INTERRUPTED.value in model.outcome_
    assert not model.converged_
    assert len(moves) == interrupted_at
    assert len(model.base_["shares"]) == 1 + (interrupted_at > 10)
    assert np.isfinite(model.score_samples(two_clusters(20, 2))).all()
    assert np.isfinite(model.sample(20)).all()


@pytest.mark.parametrize("stream", [None, Mock(spec=["write"])])
def test_the_standard_output_may_be_anything(monkeypatch, stream):
    monkeypatch.setattr("sys.stdout", stream)
    quick(verbose=1).fit(two_clusters(60, 2))


@pytest.fixture(params=[torch.float64, torch.bfloat16])
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("base", "n_features"), [("auto", 2), ("flow", 3)])
def test_the_default_dtype_of_torch_does_not_matter(default_dtype, base, n_features):
    X = two_clusters(60, n_features)
    model = quick(base=base, energy=Quadratic).fit(X)
    drawn = model.sample(50, random_state=0)
    assert torch.get_default_dtype() == default_dtype
    torch.set_default_dtype(torch.float32)
    # Initial values of flows are drawn in the default precision, so the fits are alike and not equal.
    expected = quick(base=base, energy=Quadratic).fit(X)
    np.testing.assert_allclose(model.score_samples(X).mean(), expected.score_samples(X).mean(), atol=0.2)
    np.testing.assert_array_equal(model.sample(50, random_state=0), drawn)
    if base == "auto":
        # Energies that add nothing yet: any rounding would show.
        first, second = (fit.history_[0]["validation_log_likelihood"] for fit in (model, expected))
        assert first == pytest.approx(second, abs=1e-5)


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_switched_off(without_gradients):
    X = two_clusters(60, 2)
    with without_gradients():
        model = quick().fit(X)
        assert not torch.is_grad_enabled()
        # So many that some are kept twice and moved apart along gradients.
        scores, drawn = model.score_samples(X), model.sample(2000, random_state=0)
    np.testing.assert_array_equal(scores, quick().fit(X).score_samples(X))
    np.testing.assert_array_equal(drawn, model.sample(2000, random_state=0))


def test_warnings_point_at_the_line_of_the_user(monkeypatch):
    monkeypatch.setattr("sk_ebm._density._TRUSTED_EFFECTIVE_SAMPLE_SIZE", 2.0)
    with pytest.warns(LowEffectiveSampleSizeWarning) as caught:
        quick().fit(two_clusters(60, 2))
    assert caught[0].filename == __file__


def test_an_interrupt_before_training_leaves_the_previous_fit(monkeypatch):
    X = two_clusters(60, 2)
    model = quick().fit(X)
    before = model.score_samples(X)
    monkeypatch.setattr("sk_ebm._fitting.fit_flows", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.fit(X[:40])
    np.testing.assert_array_equal(model.score_samples(X), before)


def test_flows_that_add_to_the_pool_join_without_energies_on_top(monkeypatch, capsys):
    monkeypatch.setattr("sk_ebm._fitting._MAX_DRAWS", 20_000)
    monkeypatch.setattr("sk_ebm._fitting.MAX_ROWS_OF_KERNELS", 0)
    monkeypatch.setattr("sk_ebm._base_flows.BaseFlows._lead", lambda *arguments: Lead(1.0, 0.5))
    monkeypatch.setattr(
        "sk_ebm._fitting.stacking_shares", lambda held_out, *others: [0.0] * (len(held_out) - 1) + [1.0]
    )
    X = two_clusters(90, 3)
    model = quick(base="auto", verbose=1).fit(X)
    progress = capsys.readouterr().out
    # The first tells how good energies must be, so it comes before them.
    assert 0 < progress.index("fitting 1 of 2 flows") < progress.index("iteration") < progress.rindex("fitting 1 of 2")
    assert model.base_["name"] == "flow"
    assert model.outcome_ == Outcome.UNTRAINED.value
    assert model.converged_
    assert model.n_iter_ == 0
    assert np.isnan(model.acceptance_rate_["flow"])
    assert np.isfinite(model.score(X))
    # A flow alone has the tails of a Gaussian: some million nats.
    assert model.score_samples(1e4 + X[:1]) > -300
    alone = quick(base="flow", max_iter=1).fit(X)
    assert alone.n_iter_ > 0
    assert alone.score_samples(1e4 + X[:1]) < -1e5


def test_energies_that_flows_left_behind_stay_if_the_flows_are_not_kept(monkeypatch):
    leads = iter([Lead(5.0, 0.0), Lead(5.0, 0.0), Lead(0.0, 0.0)])
    monkeypatch.setattr("sk_ebm._base_flows.BaseFlows._lead", lambda *arguments: next(leads))
    X = two_clusters(90, 3)
    model = quick(base="auto").fit(X)
    assert model.outcome_ == Outcome.LEFT_BEHIND.value
    assert "flow" not in model.base_["shares"]
    assert np.isfinite(model.score(X))


def test_steps_of_flows_are_not_held_to_those_of_energies(monkeypatch):
    fit_flows = Mock(side_effect=[[0.0], KeyboardInterrupt])
    monkeypatch.setattr("sk_ebm._fitting.fit_flows", fit_flows)
    X = np.random.default_rng(0).normal(size=(30_000, 3))
    with pytest.raises(KeyboardInterrupt):
        EBMFlowDensity(base="flow", n_estimators=2, random_state=0).fit(X)
    proposing, base = (call.kwargs["max_steps"] for call in fit_flows.call_args_list)
    assert proposing == 300
    # 120 iterations of 16 steps are what energies have.
    assert base > 2500
    # Deeper where rows are many, and each layer behind a linear map.
    (small,), (flow, _) = (call.args[0] for call in fit_flows.call_args_list)
    assert (len(small.layers), len(flow.layers)) == (2 * 2 - 1, 2 * 6)


def test_an_interrupt_while_flows_are_fitted_keeps_what_is_trained(monkeypatch):
    X = two_clusters(90, 3)
    monkeypatch.setattr("sk_ebm._base_flows.BaseFlows.fit_if_worth_it", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr("sk_ebm._base_flows.BaseFlows.fit_all", Mock(side_effect=KeyboardInterrupt))
    with pytest.warns(TrainingWarning, match="interrupted"):
        model = quick(base="auto").fit(X)
    assert Outcome.INTERRUPTED.value in model.outcome_
    assert np.isfinite(model.score(X))
    with pytest.raises(KeyboardInterrupt):
        quick(base="flow").fit(X)


class TestCallbacks:
    """Callbacks of scikit-learn 1.9 see every validation check and may stop."""

    @pytest.fixture(autouse=True)
    def callbacks(self):
        pytest.importorskip("sklearn.callback")

    class Recorder:
        def __init__(self, stop_after=None):
            self.stop_after, self.events, self.models = stop_after, [], []

        def setup(self, estimator, context):
            self.events.append("setup")

        def teardown(self, estimator, context):
            self.events.append("teardown")

        def on_fit_task_begin(self, estimator, context):
            self.events.append(f"begin {context.task_name}")

        def on_fit_task_end(self, estimator, context, *, fitted_estimator=None):
            self.events.append(f"end {context.task_name}")
            if context.task_name == "validation check":
                self.models.append(fitted_estimator)
                return len(self.models) == self.stop_after
            return False

    def test_they_see_checks_and_models_without_changing_the_fit(self):
        X, recorder = two_clusters(60, 2), self.Recorder()
        model = quick().set_callbacks(recorder).fit(X)
        assert recorder.events[:3] == ["setup", "begin fit", "begin validation check"]
        assert recorder.events[-2:] == ["end fit", "teardown"]
        assert [len(seen.history_) for seen in recorder.models] == [1, 2, 3]
        assert all(np.isfinite(seen.score(X)) for seen in recorder.models)
        np.testing.assert_array_equal(quick().fit(X).score_samples(X), model.score_samples(X))

    def test_one_of_them_may_stop(self):
        model = quick(max_iter=50).set_callbacks(self.Recorder(stop_after=2)).fit(two_clusters(60, 2))
        assert model.outcome_ == Outcome.STOPPED.value
        assert model.n_iter_ == 5

    def test_a_stop_holds_for_the_bases_that_would_come_after(self):
        X, recorder = two_clusters(200, 2), self.Recorder(stop_after=3)
        model = quick(base="auto", max_iter=10, warm_start=True).set_callbacks(recorder).fit(X)
        assert len(recorder.models) == 3
        assert Outcome.STOPPED.value in model.outcome_
        model.set_callbacks().fit(X)
        assert Outcome.STOPPED.value not in model.outcome_
        again = self.Recorder(stop_after=1)
        before = model.score(X)
        model.set_callbacks(again).fit(X)
        assert len(again.models) == 1
        assert model.score(X) == pytest.approx(before, abs=2.0)

    def test_they_are_torn_down_when_the_fit_fails(self, monkeypatch):
        recorder = self.Recorder()
        monkeypatch.setattr("sk_ebm._fitting.fit_flows", Mock(side_effect=RuntimeError))
        with pytest.raises(RuntimeError):
            quick().set_callbacks(recorder).fit(two_clusters(60, 2))
        assert recorder.events[-1] == "teardown"

    def test_those_of_scikit_learn_work(self, capsys):
        from sklearn.callback import ProgressBar, ScoringMonitor

        monitor = ScoringMonitor(scoring={"log-likelihood": lambda density, X, y: density.score(X) / len(X)})
        X = two_clusters(60, 2)
        model = quick().set_callbacks(monitor).fit(X)
        rows = monitor.get_logs().data_as_pandas
        assert (rows["task_name"] == "validation check").sum() == 3
        after_fit = rows.loc[rows["task_name"] == "fit", "log-likelihood"].item()
        assert after_fit == pytest.approx(model.score(X) / len(X))
        frame = pd.DataFrame(X, columns=["left", "up"])
        with warnings.catch_warnings():
            # Such as that the names of the features were lost.
            warnings.simplefilter("error")
            quick().set_callbacks(monitor).fit(frame)
        try:
            bar = ProgressBar()
        except ImportError:
            pytest.skip("rich is not installed")
        quick().set_callbacks(bar).fit(two_clusters(60, 2))


def test_missing_gpu_is_a_clear_error():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="device='cuda'.*'auto' or 'cpu'"):
        quick(device="cuda").fit(two_clusters(30, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_fit_scores_on_the_cpu():
    X = two_clusters(200, 3)
    model = quick(base="auto", device="cuda").fit(X)
    assert all(tensor.device.type == "cpu" for tensor in model.density_.state_dict().values())
    assert abs(model.score(X) - quick(base="auto", device="cpu").fit(X).score(X)) < 0.3 * len(X)


def test_feature_that_is_constant_in_a_fold_is_no_error():
    X = two_clusters(60, 3)
    X[:, 2] = 0.0
    X[7, 2] = 1.0
    assert np.isfinite(quick(base="auto", max_iter=1).fit(X).score_samples(X)).all()


def test_energy_without_parameters_is_a_clear_error():
    class Fixed(nn.Module):
        def __init__(self, n_features):
            super().__init__()

        def forward(self, z):
            return z.sum(-1)

    with pytest.raises(ValueError, match="no parameters"):
        quick(energy=Fixed).fit(two_clusters(30, 2))


def test_out_of_bag_scores_are_those_of_unseen_rows():
    """Noise in many dimensions is memorised: training rows look likelier than new ones, out of bag they do not."""
    rng = np.random.default_rng(0)
    X, new = rng.normal(size=(2, 100, 6))
    weight = np.ones(100)
    weight[:3] = 0
    model = EBMFlowDensity(base="mixture", max_iter=10, random_state=0).fit(X, sample_weight=weight)
    assert np.isnan(model.oob_log_density_[:3]).all()
    optimism = model.score_samples(X[3:]).mean() - model.score_samples(new).mean()
    out_of_bag = model.oob_log_density_[3:].mean() - model.score_samples(new).mean()
    assert abs(out_of_bag) < max(0.6 * optimism, 0.35)


class _NotADensity(torch.nn.Module):
    def log_prob(self, z):
        return z

    def sample(self, n_samples, generator):
        return torch.zeros(n_samples, 2)


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        (lambda z, weight: "nothing", TypeError, "with log_prob and sample, got 'nothing'"),
        (lambda z, weight: torch.nn.Linear(2, 1), TypeError, "with log_prob and sample, got Linear"),
        (lambda z, weight: _NotADensity(), ValueError, r"it scored with shape \(60, 2\)"),
    ],
)
def test_a_base_that_is_no_density_raises(base, error, message):
    with pytest.raises(error, match=message):
        EBMFlowDensity(base=base, random_state=0).fit(np.random.default_rng(0).normal(size=(60, 2)))
