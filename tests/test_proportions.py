"""Class proportions: right on known mixtures, with standard errors that cover, and clear about bad input."""

import pickle
import warnings
from copy import copy

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.optimize import minimize
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from sk_ebm import DensityClassifier, EBMFlowDensity, ProportionsWarning, class_proportions
from sk_ebm._calibration import no_calibration

QUICK = {"base": "mixture", "max_iter": 4, "n_estimators": 2, "n_chains": 32, "hidden_layer_sizes": (16,)}


def quick(**parameters):
    return EBMFlowDensity(**{**QUICK, "random_state": 0, **parameters})


class Normal(KernelDensity):
    """Normal density with the moments of its rows: quick, exact, and a density as any other."""

    def fit(self, X, y=None, sample_weight=None):
        weight = np.ones(len(X)) if sample_weight is None else np.asarray(sample_weight)
        self.mean_ = np.average(X, axis=0, weights=weight)
        self.std_ = np.sqrt(np.average((X - self.mean_) ** 2, axis=0, weights=weight)) + 1e-3
        return self

    def score_samples(self, X):
        return stats.norm.logpdf(X, self.mean_, self.std_).sum(1)


def two_classes(n, share, seed=0, shift=2.0):
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < share).astype(int)
    return rng.normal(size=(n, 2)) + shift * y[:, None], y


@pytest.fixture(scope="module")
def fitted():
    density = quick(base="gaussian", max_iter=20, hidden_layer_sizes=(32, 32)).fit(two_classes(600, 0.3, shift=5.0)[0])
    # Without energies all weights would be one.
    assert not density.density_.ensembles[0].is_flat
    return density


@pytest.fixture(scope="module")
def classifier():
    return DensityClassifier(Normal(), calibrate=False).fit(*two_classes(4000, 0.5))


# Some checks have classes of a handful of rows, and the warning says that they cannot be calibrated.
@pytest.mark.filterwarnings("ignore::sk_ebm.ProportionsWarning")
@parametrize_with_checks([DensityClassifier(Normal()), DensityClassifier(KernelDensity())])
def test_common_checks(estimator, check):
    check(estimator)


class TestClassProportions:
    def test_agree_with_draws_within_error(self, fitted):
        def is_right(X):
            return X[:, 0] > 2.5

        shares = class_proportions(fitted, is_right, random_state=0)
        drawn = is_right(fitted.sample(20_000, random_state=0)).mean()
        assert shares.proportions.sum() == pytest.approx(1)
        assert abs(shares.proportions[1] - drawn) < 4 * (shares.std_errors[1] + np.sqrt(drawn * (1 - drawn) / 20_000))
        assert shares.proportions[1] == pytest.approx(0.3, abs=0.06)

    def test_intervals_cover_the_true_share(self, fitted):
        def label(X):
            return X[:, 0] > 1.0

        truth = class_proportions(fitted, label, n_samples=100_000, random_state=99).proportions[1]
        estimates = [class_proportions(fitted, label, n_samples=500, random_state=seed) for seed in range(200)]
        covered = [abs(e.proportions[1] - truth) < 1.645 * e.std_errors[1] for e in estimates]
        # Three standard errors of 200 trials.
        assert 0.836 <= np.mean(covered) <= 0.964

    def test_seeded_is_equal(self, fitted):
        first, second, third = (
            class_proportions(fitted, lambda X: X[:, 0] > 0, n_samples=500, random_state=s) for s in (1, 1, 2)
        )
        np.testing.assert_array_equal(first.proportions, second.proportions)
        assert (first.proportions != third.proportions).any()

    @pytest.mark.parametrize("response_method", ["auto", "predict_proba", "predict"])
    def test_probabilities_and_labels_agree_where_classes_are_apart(self, fitted, response_method):
        X, y = two_classes(600, 0.3, shift=5.0)
        shares = class_proportions(
            fitted, LogisticRegression().fit(X, y), response_method=response_method, random_state=0
        )
        np.testing.assert_array_equal(shares.classes, [0, 1])
        assert shares.proportions[1] == pytest.approx(y.mean(), abs=0.06)

    def test_classes_that_the_density_misses_have_share_zero(self, fitted):
        X, y = two_classes(600, 0.3, shift=5.0)
        y[X[:, 0] > 5.0] = 2
        X, y = np.r_[X, [[1e3, 1e3], [1e3 + 1, 1e3]]], np.r_[y, [7, 7]]
        shares = class_proportions(fitted, GaussianNB().fit(X, y), response_method="predict", random_state=0)
        np.testing.assert_array_equal(shares.classes, [0, 1, 2, 7])
        assert shares.proportions[-1] == shares.std_errors[-1] == 0

    def test_one_class_has_it_all(self, fitted):
        shares = class_proportions(fitted, lambda X: np.full(len(X), "all"), random_state=0)
        assert shares.classes.tolist() == ["all"]
        assert shares.proportions[0] == pytest.approx(1)
        assert shares.std_errors[0] == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize("density", [KernelDensity(bandwidth=0.3), GaussianMixture(2, random_state=0)])
    def test_any_density_with_draws(self, density):
        X, _ = two_classes(600, 0.3, shift=5.0)
        shares = class_proportions(density.fit(X), lambda X: X[:, 0] > 2.5, n_samples=5000, random_state=0)
        assert shares.proportions[1] == pytest.approx(0.3, abs=0.06)
        assert shares.std_errors[1] == pytest.approx(np.sqrt(0.3 * 0.7 / 5000), rel=0.1)

    def test_a_density_need_not_be_an_estimator(self):
        class Draws:
            def sample(self, n_samples):
                return np.arange(n_samples).reshape(-1, 1)

        found = class_proportions(Draws(), lambda X: X[:, 0] < 5, n_samples=20, random_state=0)
        np.testing.assert_allclose(found.proportions, [0.75, 0.25])

    def test_draws_of_another_density_are_reproducible(self):
        density = GaussianMixture(2, random_state=0).fit(two_classes(600, 0.3, shift=5.0)[0])
        first, second, third = (
            class_proportions(density, lambda X: X[:, 0] > 0, n_samples=500, random_state=s).proportions
            for s in (1, 1, 2)
        )
        np.testing.assert_array_equal(first, second)
        assert (first != third).any()
        assert density.random_state == 0

    def test_low_effective_sample_size_is_warned_of(self, fitted):
        class Narrow:
            sample = fitted.sample

            def importance_sample(self, n_samples, random_state):
                X, weight = fitted.importance_sample(n_samples, random_state)
                return X, np.where(np.arange(n_samples) < 20, weight, 1e-6)

        with pytest.warns(ProportionsWarning, match="5000 draws are worth"):
            class_proportions(Narrow(), lambda X: X[:, 0] > 0, n_samples=5000, random_state=0)

    def test_frames_reach_the_classifier_as_frames(self):
        X, y = two_classes(200, 0.3, shift=5.0)
        frame = pd.DataFrame(X, columns=["left", "up"])
        scaled = ColumnTransformer([("scaled", StandardScaler(), ["up", "left"])])
        classifier = make_pipeline(scaled, LogisticRegression()).fit(frame, y)
        found = class_proportions(quick().fit(frame), classifier, random_state=0)
        assert found.proportions[1] == pytest.approx(0.3, abs=0.1)

    def test_what_is_no_classifier_is_shown(self, fitted):
        with pytest.raises(TypeError, match=r"a function from an array of rows to labels, got array\(\[0, 1\]\)"):
            class_proportions(fitted, np.array([0, 1]))

    def test_wrong_input_is_named(self, fitted):
        with pytest.raises(NotFittedError):
            class_proportions(fitted, LogisticRegression())
        with pytest.raises(TypeError, match="Pipeline has no `sample`"):
            class_proportions(make_pipeline(StandardScaler(), fitted), np.sign)
        with pytest.raises(ValueError, match="n_samples must be at least 2, got 1"):
            class_proportions(fitted, np.sign, n_samples=1)
        with pytest.raises(ValueError, match="response_method.*'proba'"):
            class_proportions(fitted, np.sign, response_method="proba")
        with pytest.raises(ValueError, match="one label per row"):
            class_proportions(fitted, np.sign)
        with pytest.raises(ValueError, match="no predict_proba"):
            class_proportions(fitted, lambda X: X[:, 0], response_method="predict_proba")

    def test_importance_weights_have_mean_one_and_right_moments(self, fitted):
        X, weight = fitted.importance_sample(20_000, random_state=0)
        std_error = weight.std() / np.sqrt(len(weight))
        assert abs(weight.mean() - 1) < 4 * (std_error + fitted.log_normalizer_std_error_)
        drawn = fitted.sample(20_000, random_state=1)
        np.testing.assert_allclose(weight @ X / weight.sum(), drawn.mean(0), atol=0.15)


class TestDensityClassifier:
    def test_probabilities_are_those_of_bayes(self, classifier):
        X, _ = two_classes(50, 0.5, seed=3)
        joint = np.column_stack([np.exp(d.score_samples(X)) for d in classifier.densities_]) * classifier.class_prior_
        np.testing.assert_allclose(classifier.predict_proba(X), joint / joint.sum(1, keepdims=True))
        np.testing.assert_array_equal(classifier.predict(X), joint.argmax(1))

    def test_class_prior_moves_the_border(self):
        X, y = two_classes(1000, 0.5)
        shares = [
            (DensityClassifier(Normal(), class_prior=[1 - p, p]).fit(X, y).predict(X) == 1).mean() for p in (0.1, 0.9)
        ]
        assert shares[0] < 0.5 < shares[1]

    @pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
    def test_proportions_are_found_under_prior_shift(self, classifier, share):
        X, y = two_classes(4000, share, seed=1)
        found = classifier.estimate_proportions(X)
        assert abs(found.proportions[1] - y.mean()) < 4 * found.std_errors[1]
        np.testing.assert_array_equal(classifier.quantify(X), found.proportions)

    def test_proportions_maximise_the_likelihood(self, classifier):
        log_density = classifier.score_samples_by_class(two_classes(300, 0.2, seed=2)[0])
        found = minimize(
            lambda p: -np.logaddexp(np.log1p(-p) + log_density[:, 0], np.log(p) + log_density[:, 1]).sum(),
            0.5,
            bounds=[(1e-6, 1 - 1e-6)],
        )
        proportions = classifier.quantify(two_classes(300, 0.2, seed=2)[0])
        assert proportions[1] == pytest.approx(found.x[0], abs=1e-4)

    def test_frames_are_taken_without_a_word(self):
        X, y = two_classes(100, 0.5)
        frame = pd.DataFrame(X, columns=["left", "up"])
        classifier = DensityClassifier(Normal()).fit(frame, y)
        np.testing.assert_array_equal(classifier.predict(frame), DensityClassifier(Normal()).fit(X, y).predict(X))

    def test_names_of_features_reach_the_densities(self):
        X, y = two_classes(100, 0.5)
        frame = pd.DataFrame(X, columns=["left", "up"])
        model = DensityClassifier(quick(bounds={"up": (-9, None)})).fit(frame, y)
        assert model.densities_[0].feature_names_in_.tolist() == ["left", "up"]
        log_density = model.score_samples_by_class(pd.DataFrame({"left": [0.0, 0.0], "up": [-10.0, 0.0]}))
        np.testing.assert_array_equal(np.isneginf(log_density), [[True, True], [False, False]])

    def test_prior_count_is_so_many_rows_of_each_class(self, classifier):
        X = np.random.default_rng(0).normal(-4, 1, (20, 2))
        steadied = copy(classifier).set_params(prior_count=0.5)
        found = steadied.estimate_proportions(X)
        np.testing.assert_allclose(found.proportions, [20.5 / 21, 0.5 / 21], atol=1e-6)
        # Of a known number of rows of each class, the error is that of a binomial share.
        np.testing.assert_allclose(found.std_errors, np.sqrt(20.5 * 0.5 / 21**3), rtol=1e-3)

    def test_prior_count_must_not_be_negative(self, classifier):
        with pytest.raises(ValueError, match="prior_count must be a number of rows, 0 or more, got -1"):
            copy(classifier).set_params(prior_count=-1).estimate_proportions(np.zeros((3, 2)))

    @pytest.mark.parametrize("share", [0.1, 0.5])
    def test_intervals_cover_the_true_proportion(self, classifier, share):
        found = [classifier.estimate_proportions(two_classes(200, share, seed=s)[0]) for s in range(100, 200)]
        covered = [abs(f.proportions[1] - share) < 1.645 * f.std_errors[1] for f in found]
        assert 82 <= sum(covered) <= 98

    def test_std_errors_hold_those_of_the_normalizers(self, classifier):
        X = two_classes(5000, 0.5, seed=4)[0]
        plain = classifier.estimate_proportions(X)
        noisy = pickle.loads(pickle.dumps(classifier))
        noisy.calibration_ = no_calibration(np.array([0.1, 0.0]))
        shifted = classifier.score_samples_by_class(X) + [0.1, 0.0]
        widened = noisy.estimate_proportions(X).std_errors[1]
        noisy._score_by_class = lambda X: shifted
        moved = abs(noisy.quantify(X) - plain.proportions)[1]
        assert np.sqrt(widened**2 - plain.std_errors[1] ** 2) == pytest.approx(moved, rel=0.1)

    def test_calibration_mends_densities_that_are_too_sure(self):
        """Four copies of each feature make the densities count the same evidence four times."""
        X, y = two_classes(4000, 0.5, shift=1.0)
        new, labels = two_classes(4000, 0.15, shift=1.0, seed=1)
        errors = []
        for calibrate in (False, True):
            model = DensityClassifier(Normal(), calibrate=calibrate).fit(np.tile(X, 4), y)
            found = model.estimate_proportions(np.tile(new, 4))
            errors.append(abs(found.proportions[1] - labels.mean()))
        # The tilt may take a part of what the temperature has to do.
        raw = np.diff(model.score_samples_by_class(np.tile(new, 4)), axis=1).ravel()
        calibrated = np.diff(model.predict_log_proba(np.tile(new, 4)), axis=1).ravel()
        assert np.polyfit(raw, calibrated, 1)[0] == pytest.approx(0.25, abs=0.03)
        assert errors[1] < 4 * found.std_errors[1]
        assert errors[1] < 0.5 * errors[0]

    def test_calibrated_intervals_cover_the_true_proportion(self):
        """Over training and unlabelled samples: the errors of the calibration count too."""
        covered = []
        for seed in range(60):
            model = DensityClassifier(Normal()).fit(*two_classes(200, 0.5, seed=1000 + seed))
            found = model.estimate_proportions(two_classes(2000, 0.3, seed=seed)[0])
            covered.append(abs(found.proportions[1] - 0.3) < 1.645 * found.std_errors[1])
        assert 46 <= sum(covered) <= 59

    def test_calibration_of_the_default_density_needs_no_further_fits(self, monkeypatch):
        fits, fit = [], EBMFlowDensity.fit
        monkeypatch.setattr(EBMFlowDensity, "fit", lambda self, X: fits.append(len(X)) or fit(self, X))
        model = DensityClassifier(quick()).fit(*two_classes(300, 0.5))
        assert len(fits) == 2
        assert 0.3 < model.calibration_.scale < 2.0
        assert model.calibration_.scale != 1.0

    def test_weights_are_repetitions(self, classifier):
        X, _ = two_classes(100, 0.4, seed=5)
        weight = np.arange(100) % 3
        weighted, repeated = classifier.estimate_proportions(X, weight), classifier.quantify(X.repeat(weight, axis=0))
        np.testing.assert_allclose(weighted.proportions, repeated, atol=1e-6)

    def test_rows_of_no_weight_say_nothing_even_where_only_an_absent_class_is(self):
        X, y = two_classes(200, 0.5, shift=60.0)
        model = DensityClassifier(KernelDensity(bandwidth=0.5), calibrate=False).fit(X, y)
        found, without = model.estimate_proportions(X, y == 0), model.estimate_proportions(X[y == 0])
        np.testing.assert_array_equal(found.proportions, [1, 0])
        np.testing.assert_array_equal(found.std_errors, without.std_errors)

    def test_extreme_log_densities_do_not_underflow(self, classifier):
        far = two_classes(100, 0.5)[0] * 1e3
        assert np.isfinite(classifier.estimate_proportions(far).proportions).all()
        assert np.isfinite(classifier.predict_proba(far)).all()

    def test_one_class_only(self):
        model = DensityClassifier(Normal()).fit(two_classes(50, 0.5)[0], ["only"] * 50)
        assert model.predict([[0.0, 0.0]]).tolist() == ["only"]
        assert model.estimate_proportions([[0.0, 0.0]]).proportions.tolist() == [1.0]
        assert model.estimate_proportions([[0.0, 0.0]]).std_errors.tolist() == [0.0]

    def test_std_errors_of_absent_classes_are_bounded(self):
        """Four classes far apart, of which one is there: the others may hold a row or so in a hundred."""
        rng = np.random.default_rng(0)
        y = np.repeat(np.arange(4), 200)
        X = rng.normal(size=(800, 2)) + 6 * np.c_[y % 2, y // 2]
        model = DensityClassifier(Normal(), calibrate=False).fit(X, y)
        found = model.estimate_proportions(rng.normal(size=(100, 2)))
        np.testing.assert_allclose(found.proportions, [1, 0, 0, 0], atol=1e-4)
        assert (found.std_errors < 0.02).all()
        assert (found.std_errors[1:] > 0.001).all()
        # What the others may have, the first one lacks.
        assert found.std_errors[0] == pytest.approx(np.linalg.norm(found.std_errors[1:]), rel=0.05)

    def test_std_error_of_a_share_of_zero_is_a_fall_of_one_half(self, classifier):
        X = two_classes(400, 0.0, seed=8)[0]
        X = X[X.sum(1) < 1]
        found, log_density = classifier.estimate_proportions(X), classifier.score_samples_by_class(X)
        assert found.proportions[1] < 1e-6
        risen = found.std_errors[1]
        fall = log_density[:, 0] - np.logaddexp(np.log1p(-risen) + log_density[:, 0], np.log(risen) + log_density[:, 1])
        assert fall.sum() == pytest.approx(0.5, rel=0.1)

    def test_rows_outside_every_density(self):
        X, y = two_classes(200, 0.5)
        model = DensityClassifier(KernelDensity(kernel="tophat", bandwidth=1.0)).fit(X, y)
        assert model.score(*two_classes(1000, 0.5, seed=9)) > 0.85
        outside = np.full((3, 2), 1e3)
        with pytest.warns(ProportionsWarning, match="3 of 203 rows have density zero"):
            with_outside = model.estimate_proportions(np.r_[X, outside]).proportions
        np.testing.assert_allclose(with_outside, model.quantify(X))
        with pytest.raises(ValueError, match="None of the 3 rows"):
            model.quantify(outside)
        np.testing.assert_allclose(model.predict_proba(outside), np.tile(model.class_prior_, (3, 1)))

    def test_a_row_that_no_class_of_positive_prior_allows_gets_the_prior(self):
        X, y = two_classes(200, 0.5, shift=20.0)
        model = DensityClassifier(KernelDensity(kernel="tophat", bandwidth=1.0), class_prior=[0.0, 1.0]).fit(X, y)
        np.testing.assert_array_equal(model.predict_proba([[0.0, 0.0]]), [[0.0, 1.0]])

    def test_weights_of_rows_are_repetitions(self):
        X, y = two_classes(300, 0.4)
        weight = np.arange(300) % 3
        weighted = DensityClassifier(Normal()).fit(X, y, sample_weight=weight)
        repeated = DensityClassifier(Normal()).fit(X.repeat(weight, axis=0), y.repeat(weight))
        np.testing.assert_allclose(weighted.predict_proba(X), repeated.predict_proba(X), atol=0.02)
        assert np.abs(weighted.predict_proba(X) - DensityClassifier(Normal()).fit(X, y).predict_proba(X)).max() > 0.02

    def test_a_failed_fit_leaves_the_previous_one_whole(self):
        X, y = two_classes(200, 0.5)
        model = DensityClassifier(Normal()).fit(X, y)
        expected = model.predict_proba(X)
        with pytest.raises(ValueError, match="class_prior"):
            model.set_params(class_prior=[1.0]).fit(np.c_[X, X], y)
        np.testing.assert_array_equal(model.predict_proba(X), expected)

    def test_classes_too_small_to_calibrate_are_fitted_with_a_warning(self):
        X, y = two_classes(200, 0.5)
        keep = np.r_[np.flatnonzero(y == 0)[:10], np.flatnonzero(y == 1)]
        with pytest.warns(ProportionsWarning, match="Class 0 has too few rows"):
            model = DensityClassifier(GaussianMixture(9, random_state=0)).fit(X[keep], y[keep])
        assert model.calibration_.scale == 1

    def test_classes_whose_held_out_rows_are_impossible_are_fitted_with_a_warning(self):
        density = KernelDensity(kernel="tophat", bandwidth=1e-6)
        with pytest.warns(ProportionsWarning, match="Class 0 has density zero at all rows that were held out"):
            model = DensityClassifier(density).fit(*two_classes(200, 0.5))
        assert model.calibration_.scale == 1

    def test_random_state_reaches_every_step_of_a_density(self):
        pipe = make_pipeline(StandardScaler(), GaussianMixture(2))
        model = DensityClassifier(pipe, calibrate=False, random_state=0).fit(*two_classes(100, 0.5))
        assert all(isinstance(density[-1].random_state, int) for density in model.densities_)

    def test_a_density_must_score(self):
        with pytest.raises(TypeError, match="must have `score_samples`"):
            DensityClassifier(LogisticRegression()).fit(*two_classes(50, 0.5))

    def test_a_class_with_too_few_rows_is_named_with_its_count(self):
        X, y = two_classes(50, 0.5)
        y[0] = 7
        with pytest.raises(ValueError, match=r"class 7 cannot be fitted to its 1 sample: .*minimum of 2"):
            DensityClassifier(quick()).fit(X, y)

    @pytest.mark.parametrize("prior", [[0.5, 0.6], [1.5, -0.5], [1.0], "uniform"])
    def test_wrong_prior_is_shown(self, prior):
        with pytest.raises(ValueError, match="class_prior must hold 2"):
            DensityClassifier(Normal(), class_prior=prior).fit(*two_classes(50, 0.5))

    def test_density_without_weights_says_so(self):
        with pytest.raises(TypeError, match="GaussianMixture takes no sample_weight"):
            DensityClassifier(GaussianMixture()).fit(*two_classes(50, 0.5), sample_weight=np.ones(50))

    def test_some_row_must_have_a_weight(self):
        # Recent versions of scikit-learn say so first, in words of their own.
        with pytest.raises(ValueError, match="zero"):
            DensityClassifier(Normal()).fit(*two_classes(50, 0.5), sample_weight=np.zeros(50))

    def test_classes_of_weight_zero_are_no_classes(self):
        X, y = two_classes(100, 0.5)
        weight = (y == 1).astype(float)
        assert DensityClassifier(Normal()).fit(X, y, sample_weight=weight).classes_.tolist() == [1]

    def test_in_pipeline_and_grid_search(self):
        X, y = load_iris(return_X_y=True)
        search = GridSearchCV(
            make_pipeline(StandardScaler(), DensityClassifier(KernelDensity())),
            {"densityclassifier__density__bandwidth": [0.1, 0.5]},
        ).fit(X, y)
        assert search.best_score_ > 0.9

    def test_default_density_is_reproducible_and_independent_of_n_jobs(self):
        X, y = two_classes(120, 0.5, shift=4.0)
        model = DensityClassifier(quick(random_state=None), random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first, second = (
                model.fit(X, y).predict_proba(X),
                clone(model).set_params(n_jobs=2).fit(X, y).predict_proba(X),
            )
        np.testing.assert_allclose(first, second, rtol=1e-6)
        assert isinstance(DensityClassifier()._unfitted_densities(1)[0], EBMFlowDensity)
