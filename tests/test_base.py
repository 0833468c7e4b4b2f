"""Every base is a normalised density with draws of its own law, fitted to weighted rows, however few."""

import math
import pickle

import numpy as np
import pytest
import torch
from helpers import global_rng_untouched, integral, normal, seeded
from scipy import stats
from sklearn.mixture import GaussianMixture

from sk_ebm import _mixture, _student_t
from sk_ebm._mixture import COVARIANCE_TYPES, fit_gaussian, fit_mixtures, kmeans_labels
from sk_ebm._student_t import fit_student_t

BASES = ["gaussian", *COVARIANCE_TYPES, "student_t"]
CENTERS = torch.tensor([[-3.0, 0.0, 1.0], [3.0, 1.0, -1.0], [0.0, 6.0, 0.0]]).double()
every_base = pytest.mark.parametrize("name", BASES)


def fit(name, z, weight=None, *, n_components=3, seed=0):
    weight = torch.ones(len(z), dtype=z.dtype) if weight is None else weight
    if name == "gaussian":
        return fit_gaussian(z, weight)
    if name == "student_t":
        return fit_student_t(z, weight)
    return fit_mixtures(z, weight[None], n_components, covariance_type=name, generator=seeded(seed))[0]


def clusters(n=300, n_features=2, seed=0):
    """Draw rows from three well separated, unequal and tilted clusters."""
    k = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), n, replacement=True, generator=seeded(seed))
    noise = normal(n, n_features, seed=seed + 1)
    tilt = 0.5 * torch.eye(n_features).double() + 0.1
    return CENTERS[k, :n_features] + noise @ tilt


def student_t_rows(df, n, n_features, seed=0):
    noise = normal(n, df + n_features, seed=seed)
    return noise[:, df:] / noise[:, :df].square().mean(-1, keepdim=True).sqrt()


@every_base
class TestBase:
    @pytest.mark.parametrize("n_features", [1, 2])
    def test_integrates_to_one(self, name, n_features):
        base = fit(name, clusters(n_features=n_features))
        assert integral(base.log_prob, n_features) == pytest.approx(1, abs=2e-3)

    @pytest.mark.parametrize("n_features", [1, 3])
    def test_draws_are_of_its_law(self, name, n_features):
        """If z is drawn from p, then g(z) / p(z) has mean one for every density g narrower than p."""
        base = fit(name, clusters(n_features=n_features))
        z = base.sample(50_000, seeded(1))
        for center in CENTERS[:, :n_features]:
            narrow = torch.distributions.Normal(center, 0.4)
            ratio = (narrow.log_prob(z).sum(-1) - base.log_prob(z)).exp()
            std_error = float(ratio.std()) / math.sqrt(len(z))
            assert std_error < 0.1
            assert abs(float(ratio.mean()) - 1) < 4 * std_error

    def test_weights_are_repetitions(self, name):
        z, weight = clusters(), torch.randint(0, 4, (300,), generator=seeded()).double()
        weighted, repeated = fit(name, z, weight), fit(name, z.repeat_interleave(weight.long(), dim=0))
        new = clusters(seed=5)
        torch.testing.assert_close(weighted.log_prob(new), repeated.log_prob(new), rtol=1e-6, atol=1e-6)

    def test_rows_of_weight_zero_count_nothing(self, name):
        z, outliers = clusters(), 100 * normal(30, 2)
        weight = torch.cat([torch.ones(300), torch.zeros(30)]).double()
        with_outliers, without = fit(name, torch.cat([z, outliers]), weight), fit(name, z)
        new = clusters(seed=5)
        torch.testing.assert_close(with_outliers.log_prob(new), without.log_prob(new), rtol=1e-6, atol=1e-6)

    def test_seeded_is_equal_and_leaves_the_global_generator(self, name):
        z = clusters()
        with global_rng_untouched():
            first, second = fit(name, z), fit(name, z)
            draws = [first.sample(20, seeded(seed)) for seed in (1, 1, 2)]
        assert torch.equal(first.log_prob(z), second.log_prob(z))
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    def test_casts_to_single_precision(self, name):
        z = clusters()
        expected = fit(name, z).log_prob(z)
        single = fit(name, z).float()
        log_prob = single.log_prob(z.float())
        assert log_prob.dtype == single.sample(3, seeded()).dtype == torch.float32
        torch.testing.assert_close(log_prob.double(), expected, rtol=1e-4, atol=1e-4)

    def test_rows_do_not_depend_on_their_batch(self, name):
        z = clusters(100)
        base = fit(name, z)
        rows = torch.cat([base.log_prob(row[None]) for row in z])
        torch.testing.assert_close(base.log_prob(z), rows, rtol=1e-10, atol=1e-10)

    def test_pickled_is_the_same(self, name):
        z = clusters(100)
        base = fit(name, z)
        copy = pickle.loads(pickle.dumps(base))
        assert torch.equal(copy.log_prob(z), base.log_prob(z))
        assert torch.equal(copy.sample(5, seeded()), base.sample(5, seeded()))

    @pytest.mark.parametrize(
        "z",
        [normal(5, 20), normal(1, 2), normal(1, 2).expand(40, 2), normal(2, 1), normal(200, 1).round().expand(200, 4)],
        ids=["fewer rows than features", "one row", "one row copied", "two rows", "copied features and ties"],
    )
    def test_degenerate_rows_give_a_finite_density(self, name, z):
        base = fit(name, z)
        draws = base.sample(50, seeded())
        assert draws.shape == (50, z.shape[1])
        for rows in (z, draws, z + 1):
            assert bool(base.log_prob(rows).isfinite().all())


@pytest.mark.parametrize("covariance_type", sorted({"full", "tied", "diag", "spherical"} & set(COVARIANCE_TYPES)))
def test_mixture_is_as_likely_as_that_of_scikit_learn(covariance_type):
    z, new = clusters(1000, 3), clusters(1000, 3, seed=7)
    reference = GaussianMixture(3, covariance_type=covariance_type, n_init=5, random_state=0).fit(z.numpy())
    ours = float(fit(covariance_type, z).log_prob(new).mean())
    assert ours == pytest.approx(reference.score(new.numpy()), abs=0.02)


def test_gaussian_is_as_likely_as_the_moments_say():
    z, new = clusters(1000, 3), clusters(1000, 3, seed=7)
    moments = torch.distributions.MultivariateNormal(z.mean(0), z.T.cov(correction=0))
    assert float(fit("gaussian", z).log_prob(new).mean()) == pytest.approx(
        float(moments.log_prob(new).mean()), abs=0.01
    )


@pytest.mark.parametrize("name", [*COVARIANCE_TYPES, "student_t"])
def test_rows_beyond_those_that_starts_are_compared_on_count_as_much(name, monkeypatch):
    """The fit to all rows is a fixed point of EM on all of them, from wherever it started."""
    z, n_few = (student_t_rows(3, 2000, 2), 300) if name == "student_t" else (clusters(2000), 60)
    of_all = float(fit(name, z).log_prob(z).mean())
    for module in (_mixture, _student_t):
        monkeypatch.setattr(module, "MAX_START_ROWS", n_few)
    continued, of_few = (float(fit(name, rows).log_prob(z).mean()) for rows in (z, z[:n_few]))
    assert continued == pytest.approx(of_all, abs=0.002)
    assert continued > of_few + 0.001


def test_with_many_rows_a_mixture_that_has_stopped_climbing_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(_mixture, "_MIN_VALUES_TO_LEAVE_OUT", 0)
    z, weight = clusters(), torch.rand(4, 300, generator=seeded(0)).double()
    labels = kmeans_labels(z, weight.repeat_interleave(2, 0), 8, seeded(1))
    options = {"covariance_type": "full", "generator": seeded(2), "n_runs": 2}
    together = fit_mixtures(z, weight, 8, labels=labels, **options)
    for k, mixture in enumerate(together):
        alone = fit_mixtures(z, weight[[k]], 8, labels=labels[2 * k : 2 * k + 2], **options)[0]
        torch.testing.assert_close(mixture.log_prob(z), alone.log_prob(z), rtol=0, atol=1e-9)


def test_tied_types_share_one_covariance_and_the_others_do_not():
    z = torch.cat([clusters(), 5 * normal(300, 2) + 30])
    for covariance_type in COVARIANCE_TYPES:
        scale_trils = fit(covariance_type, z, n_components=4).scale_trils
        assert torch.allclose(scale_trils, scale_trils[:1]) == covariance_type.startswith("tied")


@pytest.mark.parametrize("n_features", [1, 3])
def test_student_t_finds_heavy_tails_and_wins_on_them(n_features):
    z, new = student_t_rows(3, 2000, n_features), student_t_rows(3, 2000, n_features, seed=1)
    base = fit("student_t", z)
    assert 2 <= base.df <= 4
    score = float(base.log_prob(new).mean())
    assert score > stats.multivariate_t(np.zeros(n_features), df=3).logpdf(new.numpy()).mean() - 0.01
    assert score > float(fit("gaussian", z).log_prob(new).mean()) + 0.1


@pytest.mark.parametrize("n_features", [1, 3])
def test_student_t_draws_are_heavy_tailed(n_features):
    """The squared Mahalanobis distance of a Student t draw, over d, has the F distribution with d and df."""
    base = fit("student_t", student_t_rows(3, 2000, n_features))
    z = base.sample(20_000, seeded(1)) - base.mean
    distance = torch.linalg.solve_triangular(base.scale_tril, z.T, upper=False).square().sum(0)
    assert stats.kstest(distance / n_features, "f", (n_features, base.df)).pvalue > 1e-3


def test_student_t_on_gaussian_rows_is_nearly_gaussian():
    z, new = normal(2000, 3), normal(2000, 3, seed=1)
    base = fit("student_t", z)
    assert base.df >= 10
    assert float(base.log_prob(new).mean()) == pytest.approx(float(fit("gaussian", z).log_prob(new).mean()), abs=0.02)


def test_mixture_keeps_the_proportions_of_the_clusters():
    mixture = fit("full", clusters(5000))
    shares = np.sort(mixture.log_proportions.exp().numpy())
    np.testing.assert_allclose(shares, [0.2, 0.3, 0.5], atol=0.02)


def test_weights_tilt_the_mixture():
    z = clusters(2000)
    is_right = z[:, 0] > 2
    mixture = fit("full", z, torch.where(is_right, 3.0, 1.0).double())
    share = 3 * float(is_right.sum()) / float(3 * is_right.sum() + (~is_right).sum())
    assert float(mixture.log_proportions.exp().sub(share).abs().min()) < 0.02
