"""The feature map is an invertible map with the log-Jacobian it claims, fitted to weighted rows."""

import pickle

import numpy as np
import pytest
import torch
from helpers import normal, seeded
from scipy import stats

from sk_ebm._support import fit_feature_map

with_and_without_margins = pytest.mark.parametrize("use_margins", [False, True], ids=["linear", "margins"])


def mixed_rows(n=400, seed=0):
    """Draw rows whose features are skewed, heavy-tailed, two-humped, correlated, and of scales 1e-6 to 1e6."""
    a, b, c, d, e, f = normal(6, n, seed=seed)
    columns = [a.exp(), 1e6 * b / (c.square() + d.square()).sqrt(), 2 * e.sign() + 0.3 * f, 1e-6 * (a + 0.1 * b)]
    return torch.stack([*columns, 5 + 0.9 * b + 0.2 * c], dim=-1)


def fit(x, weight=None, *, use_margins):
    weight = torch.ones(len(x), dtype=torch.float64) if weight is None else weight
    return fit_feature_map(x, weight, use_margins=use_margins)


def assert_same_map(first, second, x, tolerance=1e-6):
    for value, expected in zip(first(x), second(x), strict=True):
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


@with_and_without_margins
class TestFeatureMap:
    def test_inverse_returns_the_rows(self, use_margins):
        x = mixed_rows()
        feature_map = fit(x[:300], use_margins=use_margins)
        error = (feature_map.inverse(feature_map(x)[0]) - x).abs() / x.std(0)
        assert float(error.max()) < 1e-9

    def test_forward_returns_the_whitened_rows(self, use_margins):
        feature_map, z = fit(mixed_rows(), use_margins=use_margins), 3 * normal(200, 5)
        torch.testing.assert_close(feature_map(feature_map.inverse(z))[0], z, rtol=1e-7, atol=1e-7)

    def test_log_det_agrees_with_autograd(self, use_margins):
        x = mixed_rows()
        feature_map = fit(x, use_margins=use_margins)
        for row in x[:20]:
            jacobian = torch.autograd.functional.jacobian(lambda x: feature_map(x[None])[0][0], row)
            expected = torch.linalg.slogdet(jacobian).logabsdet
            torch.testing.assert_close(feature_map(row[None])[1][0], expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("deviations", [-1e4, -40.0, 40.0, 1e4])
    def test_far_rows_are_finite_and_come_back(self, deviations, use_margins):
        x = mixed_rows()
        feature_map = fit(x, use_margins=use_margins)
        far = x.mean(0) + deviations * x.std(0) * torch.cat([torch.eye(5), torch.ones(1, 5)]).double()
        z, log_det = feature_map(far)
        assert bool(z.isfinite().all() and log_det.isfinite().all())
        error = (feature_map.inverse(z) - far).abs() / x.std(0)
        assert float(error.max()) < 1e-9 * abs(deviations)

    def test_log_det_in_the_tails_is_that_of_finite_differences(self, use_margins):
        x = mixed_rows()[:, :1]
        feature_map = fit(x, use_margins=use_margins)
        far = x.mean() + x.std() * torch.tensor([-1e4, -300.0, -30.0, 30.0, 300.0, 1e4]).double().unsqueeze(-1)
        step = 1e-3 * x.std()
        slope = (feature_map(far + step)[0] - feature_map(far - step)[0]) / (2 * step)
        torch.testing.assert_close(feature_map(far)[1], slope.squeeze(-1).log(), rtol=1e-5, atol=1e-5)

    # Nearly collinear features are whitened less, on purpose: the covariance is shrunk towards its diagonal.
    def test_training_rows_are_centred_and_white(self, use_margins):
        x = mixed_rows(3000)
        z = fit(x, use_margins=use_margins)(x)[0]
        torch.testing.assert_close(z.mean(0), torch.zeros(5).double(), atol=1e-9, rtol=0)
        torch.testing.assert_close(z.T @ z / len(z), torch.eye(5).double(), atol=0.06, rtol=0)

    def test_weights_are_repetitions(self, use_margins):
        x, weight = mixed_rows(), torch.randint(0, 4, (400,), generator=seeded()).double()
        repeated = fit(x.repeat_interleave(weight.long(), dim=0), use_margins=use_margins)
        assert_same_map(fit(x, weight, use_margins=use_margins), repeated, mixed_rows(seed=1))

    def test_rows_of_weight_zero_count_nothing(self, use_margins):
        x, outliers = mixed_rows(), 100 * mixed_rows(50, seed=1)
        weight = torch.cat([torch.ones(400), torch.zeros(50)]).double()
        with_outliers = fit(torch.cat([x, outliers]), weight, use_margins=use_margins)
        assert_same_map(with_outliers, fit(x, use_margins=use_margins), mixed_rows(seed=1), tolerance=1e-9)

    def test_order_of_rows_is_irrelevant(self, use_margins):
        x, weight = mixed_rows(), normal(400).exp()
        shuffled = torch.randperm(400, generator=seeded())
        first, second = (fit(x[rows], weight[rows], use_margins=use_margins) for rows in (slice(None), shuffled))
        assert_same_map(first, second, mixed_rows(seed=1))

    def test_units_of_the_features_are_irrelevant(self, use_margins):
        x, unit, origin = mixed_rows(), torch.tensor([1e-6, 3.0, 1e6, 0.1, 7.0]).double(), 4.0
        z, log_det = fit(x, use_margins=use_margins)(x)
        other_z, other_log_det = fit(unit * (x + origin * x.std(0)), use_margins=use_margins)(
            unit * (x + origin * x.std(0))
        )
        torch.testing.assert_close(other_z, z, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other_log_det, log_det - unit.log().sum(), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(("n_samples", "n_features"), [(200, 1), (4, 1), (2, 3), (10, 30)])
    def test_few_rows_or_one_feature(self, n_samples, n_features, use_margins):
        x = normal(n_samples, n_features)
        feature_map = fit(x, use_margins=use_margins)
        z, log_det = feature_map(x)
        assert z.shape == x.shape
        assert log_det.shape == (n_samples,)
        assert bool(z.isfinite().all() and log_det.isfinite().all())
        torch.testing.assert_close(feature_map.inverse(z), x, rtol=1e-7, atol=1e-7)

    def test_copied_and_repeated_values_are_no_trouble(self, use_margins):
        x = normal(300, 1).round().repeat(1, 3)
        feature_map = fit(x, use_margins=use_margins)
        z, log_det = feature_map(x)
        assert bool(z.isfinite().all() and log_det.isfinite().all())
        torch.testing.assert_close(feature_map.inverse(z), x, rtol=1e-6, atol=1e-6)

    def test_rows_do_not_depend_on_their_batch(self, use_margins):
        x = mixed_rows()
        feature_map = fit(x, use_margins=use_margins)
        for whole, rows in zip(feature_map(x), zip(*[feature_map(row[None]) for row in x], strict=True), strict=True):
            torch.testing.assert_close(whole, torch.cat(rows), rtol=1e-10, atol=1e-10)

    def test_pickled_is_the_same(self, use_margins):
        x = mixed_rows(50)
        feature_map = fit(x, use_margins=use_margins)
        assert_same_map(pickle.loads(pickle.dumps(feature_map)), feature_map, x, tolerance=0)


def test_normal_scores_make_skewed_and_heavy_margins_nearly_normal():
    x, new = mixed_rows(2000)[:, :2], mixed_rows(2000, seed=1)[:, :2]

    def distances(use_margins):
        z = fit(x, use_margins=use_margins)(new)[0]
        return np.array([stats.kstest(column, "norm").statistic for column in z.T.numpy()])

    assert (distances(use_margins=True) < 0.04).all()
    assert (distances(use_margins=False) > 0.15).all()


def test_whitening_keeps_the_axes_of_uncorrelated_features():
    """The symmetric whitening is the nearest to the identity: no rotation of what is nearly uncorrelated."""
    x = normal(5000, 4)
    z = fit(x, use_margins=False)(x)[0]
    correlation = torch.corrcoef(torch.cat([x, z], dim=-1).T)[:4, 4:]
    assert float((correlation - torch.eye(4)).abs().max()) < 0.05


def test_normal_scores_are_nowhere_flat():
    """Halfway between two narrow modes there is next to no mass, but the map must be invertible there."""
    x = torch.cat([-1 + 0.01 * normal(200, 1), 1 + 0.01 * normal(200, 1, seed=1)])
    _, log_det = fit(x, use_margins=True)(torch.zeros(1, 1).double())
    assert float(log_det) > -15


def test_whitening_of_few_rows_keeps_new_rows_near():
    """Ten rows say nothing about most directions of thirty: as if they were narrow, new rows would be far out."""
    z = fit(normal(10, 30), use_margins=False)(normal(100, 30, seed=1))[0]
    assert float(z.square().mean()) < 30


def test_many_rows_are_mapped_back_as_few_are():
    rng = np.random.default_rng(0)
    modes = rng.integers(0, 3, size=(800, 2)) + 0.05 * rng.normal(size=(800, 2))
    margins = fit_feature_map(torch.from_numpy(modes), torch.ones(800).double(), use_margins=True).margins
    z = torch.from_numpy(rng.normal(size=(3000, 2)))
    z[0], z[1] = 7.5, -20.0
    together = margins.inverse(z)
    apart = torch.cat([margins.inverse(part) for part in z.split(500)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)
    torch.testing.assert_close(margins(together)[0], z, rtol=0, atol=1e-9)
