"""EBMFlowDensity takes the place of KernelDensity and GaussianMixture in packages that we did not write.

The packages come with the extra `integrations`; without them these tests skip.
"""

import joblib
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import make_blobs, make_moons
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, train_test_split

from sk_ebm import DensityClassifier, EBMFlowDensity

# Third-party packages warn of their own future.
pytestmark = pytest.mark.filterwarnings("ignore:::(?!sk_ebm)")


def quick(**peer_parameters):
    """Density for a caller that passes the parameters of the class it thinks it builds."""
    return EBMFlowDensity(base="gaussian", max_iter=30, n_estimators=2, n_chains=128, random_state=0)


@pytest.fixture(scope="module")
def moons():
    return make_moons(600, noise=0.15, random_state=0)


@pytest.fixture(scope="module")
def contaminated():
    """Two clusters and, with label 1, rows from all over the place."""
    rng = np.random.default_rng(0)
    inliers, _ = make_blobs(380, centers=[[-3, 0], [3, 0]], cluster_std=0.6, random_state=0)
    X = np.concatenate([inliers, rng.uniform(-8, 8, (20, 2))])
    return X, np.repeat([0, 1], [380, 20])


def test_scikit_lego_classifier(moons, monkeypatch):
    neighbors = pytest.importorskip("sklego.neighbors")
    X_train, X_test, y_train, y_test = train_test_split(*moons, random_state=0)
    peer = neighbors.BayesianKernelDensityClassifier(bandwidth=0.2).fit(X_train, y_train)
    monkeypatch.setattr(neighbors, "KernelDensity", quick)
    classifier = clone(neighbors.BayesianKernelDensityClassifier()).fit(X_train, y_train)
    assert all(isinstance(model, EBMFlowDensity) for model in classifier.models_.values())
    assert classifier.score(X_test, y_test) > peer.score(X_test, y_test) - 0.03
    np.testing.assert_allclose(classifier.predict_proba(X_test).sum(axis=1), 1)


@pytest.mark.parametrize("method", ["quantile", "stddev"])
def test_scikit_lego_outlier_detector(contaminated, monkeypatch, method):
    detector = pytest.importorskip("sklego.mixture.gmm_outlier_detector")
    monkeypatch.setattr(detector, "GaussianMixture", quick)
    X, is_outlier = contaminated
    threshold = 0.95 if method == "quantile" else 2
    found = detector.GMMOutlierDetector(threshold=threshold, method=method).fit(X)
    assert isinstance(found.gmm_, EBMFlowDensity)
    assert roc_auc_score(is_outlier, -found.score_samples(X)) > 0.9
    assert is_outlier[found.predict(X) == -1].mean() > 0.6


def test_pyod_detector(contaminated):
    kde = pytest.importorskip("pyod.models.kde")
    X, is_outlier = contaminated
    detector = kde.KDE(contamination=0.05)
    detector.kde_ = quick()
    detector.fit(X)
    assert roc_auc_score(is_outlier, detector.decision_scores_) > 0.9
    assert detector.labels_.sum() == 20
    assert is_outlier[detector.predict(X) == 1].mean() > 0.6
    assert detector.predict_proba(X).shape == (400, 2)


def test_quapy_kernel_hook(moons):
    aggregative = pytest.importorskip("quapy.method.aggregative")
    from sklearn.linear_model import LogisticRegression

    class EBMyML(aggregative.KDEyML):
        """KDEyML with another density of the posteriors."""

        def get_kde_function(self, X, bandwidth, kernel):
            return quick().fit(self.transform_posteriors(X, kernel))

    X_train, X_test, y_train, y_test = train_test_split(*moons, random_state=0)
    # The posteriors of all classes sum to one; "ilr" takes the coordinates that are free.
    quantifier = EBMyML(LogisticRegression(), kernel="ilr", shrinkage=0.01, random_state=0).fit(X_train, y_train)
    assert all(isinstance(density, EBMFlowDensity) for density in quantifier.mix_densities)
    for share in (0.2, 0.8):
        ones = np.flatnonzero(y_test == 1)
        zeros = np.flatnonzero(y_test == 0)
        n_ones = round(50 * share)
        rows = np.concatenate([ones[:n_ones], zeros[: 50 - n_ones]])
        assert quantifier.predict(X_test[rows])[1] == pytest.approx(share, abs=0.12)


def test_quapy_evaluates_density_classifier(moons):
    base = pytest.importorskip("quapy.method.base")
    from quapy.data.base import LabelledCollection
    from quapy.evaluation import evaluate
    from quapy.protocol import APP

    from sk_ebm import DensityClassifier

    class DensityQuantifier(base.BaseQuantifier):
        """The adapter of docs/class_proportions.md."""

        def __init__(self, density=None, random_state=None):
            self.density = density
            self.random_state = random_state

        def fit(self, X, y):
            self.classifier_ = DensityClassifier(self.density, random_state=self.random_state).fit(X, y)
            return self

        def predict(self, X):
            return self.classifier_.quantify(X)

    X_train, X_test, y_train, y_test = train_test_split(*moons, random_state=0)
    protocol = APP(LabelledCollection(X_test, y_test), sample_size=100, repeats=1, n_prevalences=5, random_state=0)
    quantifier = DensityQuantifier(quick(), random_state=0).fit(X_train, y_train)
    assert evaluate(quantifier, protocol=protocol, error_metric="mae") < 0.03


def test_optuna_search(moons):
    integration = pytest.importorskip("optuna_integration")
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    X = moons[0][:200]
    search = integration.OptunaSearchCV(
        quick().set_params(max_iter=5),
        {"alpha": optuna.distributions.FloatDistribution(0.01, 1.0, log=True)},
        cv=2,
        n_trials=2,
        random_state=0,
        refit=True,
    ).fit(X)
    assert 0.01 <= search.best_params_["alpha"] <= 1.0
    assert np.isfinite(search.best_estimator_.score_samples(X)).all()


def test_polars_frame(moons):
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(moons[0], schema=["left", "up"])
    density = quick().fit(frame)
    np.testing.assert_array_equal(density.feature_names_in_, ["left", "up"])
    np.testing.assert_array_equal(density.score_samples(frame), quick().fit(moons[0]).score_samples(moons[0]))
    with pytest.raises(ValueError, match="feature names"):
        density.score_samples(frame.rename({"up": "down"}))


@pytest.fixture(scope="module")
def dask_workers():
    """Two processes on this machine."""
    dask_distributed = pytest.importorskip("dask.distributed")
    address = {"host": "127.0.0.1", "dashboard_address": None}
    with (
        dask_distributed.LocalCluster(n_workers=2, threads_per_worker=1, **address) as cluster,
        dask_distributed.Client(cluster) as client,
    ):
        yield client


def test_dask_array_is_scored_by_blocks(moons, dask_workers):
    dask_array = pytest.importorskip("dask.array")
    density = quick().fit(moons[0])
    rows = dask_array.from_array(moons[0], chunks=(250, 2))
    scores = rows.map_blocks(density.score_samples, drop_axis=1, dtype=float, meta=np.empty(0))
    np.testing.assert_allclose(scores.compute(), density.score_samples(moons[0]), rtol=0, atol=1e-9)


def test_grid_search_on_dask_finds_what_it_finds_here(moons, dask_workers):
    search = GridSearchCV(quick(), {"alpha": [0.1, 0.5]}, cv=2, refit=False)
    here = clone(search).fit(moons[0]).cv_results_["mean_test_score"]
    with joblib.parallel_config("dask"):
        there = clone(search).fit(moons[0]).cv_results_["mean_test_score"]
    # A worker may have another number of threads, and so other last bits.
    np.testing.assert_allclose(there, here, rtol=0.05)


def test_class_proportions_on_dask(moons, dask_workers):
    X, y = moons
    classifier = DensityClassifier(quick(), random_state=0)
    with joblib.parallel_config("dask"):
        found = classifier.fit(X, y).estimate_proportions(X[y == 0][:100])
    assert found.proportions[0] > 0.9
