"""Bounded features: a bijection with the right Jacobian, no density outside, clear errors."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from sk_ebm import EBMFlowDensity
from sk_ebm._bounds import make_bounds

INF = math.inf


def rows_between(low, high, n=50, seed=0):
    u = torch.rand(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.9 + 0.05
    if low > -INF and high < INF:
        return low + (high - low) * u
    return low + 3 * u if low > -INF else high - 3 * u if high < INF else 4 * u - 2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-5, 1e6), (2, INF), (-INF, -3), (-INF, INF), (0, 1e-6)])
def test_the_map_is_a_bijection_with_its_jacobian(low, high):
    x = rows_between(low, high)
    bounds = make_bounds([(low, high)], x)
    s, log_det = bounds(x)
    assert s.isfinite().all()
    torch.testing.assert_close(bounds.inverse(s), x)
    (derivative,) = torch.autograd.functional.jacobian(lambda x: bounds(x)[0].sum(0), x)
    torch.testing.assert_close(log_det, derivative.flatten().log())


@pytest.mark.parametrize("bounds", [(0, 1), (0, None), (None, 1)])
def test_anything_maps_back_between_the_bounds(bounds):
    mapped = make_bounds([bounds], rows_between(0, 1))
    x = mapped.inverse(torch.linspace(-800, 800, 101, dtype=torch.float64).unsqueeze(-1))
    low, high = (INF if bound is None else bound for bound in bounds)
    assert (x >= (-INF if low == INF else low)).all()
    assert (x <= high).all()
    assert x.isfinite().all()


def test_outside_is_impossible_and_the_bound_itself_is_not():
    mapped = make_bounds([(0, 1), None], torch.tensor([[0.2, 5.0], [0.9, -5.0], [0.0, 1.0]]))
    x = torch.tensor([[-0.1, 0.0], [1.1, 0.0], [0.0, 0.0], [1.0, 0.0], [0.1, 0.0]], dtype=torch.float64)
    s, log_det = mapped(x)
    assert s.isfinite().all()
    assert log_det.isneginf().tolist() == [True, True, False, False, False]
    # A row on the bound counts as half as far away as the nearest other row.
    assert float(s[2, 0]) == pytest.approx(math.log(0.1), abs=1e-6)
    assert float(s[4, 0]) == pytest.approx(math.log(0.1 / 0.9))


def test_values_next_to_a_bound_stay_finite():
    x = torch.tensor([[1.0], [1 - 2.0**-53], [0.5], [1e-300], [0.0]], dtype=torch.float64)
    s, log_det = make_bounds((0, 1), x)(x)
    assert s.isfinite().all()
    assert log_det.isfinite().all()


@pytest.mark.parametrize(("bounds", "x"), [((0, 0.1), [0.01, 0.1]), ((None, 99.9), [98.9, 99.9])])
def test_rounding_to_float32_is_not_outside(bounds, x):
    rows = torch.tensor(x, dtype=torch.float32).unsqueeze(-1)
    assert float(rows[1]) > bounds[1]
    assert make_bounds(bounds, rows)(rows.double())[1].isfinite().all()


def test_bounds_far_from_zero_are_as_sharp_as_others():
    low = 1.7e9
    x = low + torch.tensor([[100.0], [500.0], [80_000.0]], dtype=torch.float64)
    for bounds in ((low, low + 86_400), (low, None), (None, low + 86_400)):
        is_outside = make_bounds(bounds, x).is_outside(torch.tensor([[low - 10], [low + 86_410]], dtype=torch.float64))
        assert is_outside.flatten().tolist() == [bounds[0] is not None, bounds[1] is not None]
    with pytest.raises(ValueError, match="lie outside"):
        make_bounds((low + 200, None), x)


@pytest.mark.parametrize("n_features", [1, 2, 3])
@pytest.mark.parametrize("kind", [np.array, pd.DataFrame, lambda pairs: [np.array(pair) for pair in pairs]])
def test_bounds_may_be_arrays(n_features, kind):
    x = torch.rand(9, n_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = [[-j, j + 1] for j in range(n_features)]
    torch.testing.assert_close(make_bounds(kind(pairs), x)(x)[0], make_bounds(pairs, x)(x)[0])


@pytest.mark.parametrize(
    "wrong", [[(0, 1)] * 3, (1, 0), [(0, 1), (1, 1)], [(0, 1), 5], [(0, "a"), None], (0, math.nan)]
)
def test_wrong_bounds_are_refused(wrong):
    with pytest.raises(ValueError, match="bounds"):
        make_bounds(wrong, torch.rand(5, 2))


def test_rows_outside_are_named():
    with pytest.raises(ValueError, match=r"1 values of feature 1 lie outside its bounds \(0, 1\), such as 7"):
        make_bounds((0, 1), torch.tensor([[0.1, 0.2], [0.4, 7.0]]))


def quick(**parameters):
    defaults = {"base": "gaussian", "max_iter": 20, "n_estimators": 2, "n_chains": 64, "random_state": 0}
    return EBMFlowDensity(**{**defaults, **parameters})


@pytest.fixture(scope="module")
def exponential():
    return np.random.default_rng(0).exponential(size=(1500, 1))


def test_density_next_to_a_bound_is_not_smoothed_over_it(exponential):
    grid = np.linspace(0.0005, 12, 12_000)[:, None]
    bounded = quick(bounds=(0, None)).fit(exponential)
    density = np.exp(bounded.score_samples(grid))
    assert density.sum() * 0.001 == pytest.approx(1, abs=0.02)
    test = np.random.default_rng(1).exponential(size=(5000, 1))
    assert np.mean(-test[:, 0] - bounded.score_samples(test)) < 0.03
    assert np.isneginf(bounded.score_samples([[-1e-9], [-3.0]])).all()
    assert np.isfinite(bounded.score_samples([[0.0]])).all()
    assert bounded.sample(2000, random_state=0).min() >= 0


def test_two_bounds_and_a_free_feature_in_one_fit():
    rng = np.random.default_rng(0)
    X = np.c_[rng.beta(0.8, 0.8, 600), rng.normal(size=600)]
    model = quick(bounds=[(0, 1), None]).fit(X)
    draws = model.sample(1000, random_state=0)
    assert draws[:, 0].min() >= 0
    assert draws[:, 0].max() <= 1
    assert draws[:, 1].min() < -1
    assert model.score_samples([[1.5, 0.0]])[0] == -np.inf
    assert not np.isinf(model.oob_log_density_).any()
    with pytest.raises(ValueError, match="bounds changed"):
        model.set_params(warm_start=True, bounds=None).fit(X)


def test_bounds_by_name():
    X = pd.DataFrame(np.random.default_rng(0).exponential(size=(60, 2)), columns=["age", "income"])
    model = quick(bounds={"income": (0, None)}).fit(X)
    density = model.score_samples(pd.DataFrame({"age": [-0.1, 1.0], "income": [1.0, -0.1]}))
    assert np.isfinite(density[0])
    assert density[1] == -np.inf
    with pytest.raises(ValueError, match="no such feature: 'incom'. The features are 'age', 'income'"):
        quick(bounds={"incom": (0, None)}).fit(X)
    with pytest.raises(ValueError, match="bounds of feature 'age' must be"):
        quick(bounds={"age": 0}).fit(X)
    by_number = quick(bounds={1: (0, None)}).fit(X.to_numpy())
    np.testing.assert_array_equal(by_number.score_samples(X.to_numpy()), model.score_samples(X))


def test_warm_start_takes_bounds_of_any_kind():
    X = np.random.default_rng(0).uniform(size=(60, 2))
    model = quick(bounds=np.array([[0, 1], [0, 1]]), warm_start=True, max_iter=1).fit(X).fit(X)
    model.set_params(bounds=[[0, 1], [0, 1]]).fit(X)
    model.set_params(bounds=[np.array([0, 1]), (0, 1)]).fit(X).fit(X)
    by_number = {0: np.array([0, 1])}
    model = quick(bounds=by_number, warm_start=True, max_iter=1).fit(X).fit(X)
    by_number[1] = (0, 1)
    with pytest.raises(ValueError, match="bounds changed"):
        model.fit(X)


def test_rows_on_the_bound_do_not_break_the_normalisation():
    rng = np.random.default_rng(0)
    X = np.where(rng.random((500, 1)) < 0.3, 0.0, rng.exponential(size=(500, 1)))
    model = quick(bounds=(0, None)).fit(X)
    # The mass next to the bound needs a grid in the logarithm.
    edges = np.geomspace(1e-12, 50, 200_001)
    middle = np.sqrt(edges[1:] * edges[:-1])[:, None]
    assert np.sum(np.exp(model.score_samples(middle)) * np.diff(edges)) == pytest.approx(1, abs=0.02)
