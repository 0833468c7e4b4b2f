"""EBMFlowDensity is a scikit-learn estimator: the common checks, and what they do not look at."""

import io
import pickle

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_html_repr
from sklearn.utils.estimator_checks import (
    check_dataframe_column_names_consistency,
    check_param_validation,
    parametrize_with_checks,
)

from sk_ebm import DensityClassifier, EBMFlowDensity

QUICK = {"base": "gaussian", "max_iter": 4, "n_estimators": 2, "n_chains": 32, "hidden_layer_sizes": (16,)}


def quick(**parameters):
    """Estimator that runs all the machinery in about a second."""
    return EBMFlowDensity(**{**QUICK, "random_state": 0, **parameters})


@pytest.fixture(scope="module")
def X():
    return np.random.default_rng(0).normal(size=(60, 2)) * [1.0, 3.0] + [5.0, 0.0]


@pytest.fixture(scope="module")
def fitted(X):
    return quick().fit(X)


# Fifteen rows of thirty features, or two iterations, are too little for a good proposal, and the warning says so.
@pytest.mark.filterwarnings("ignore::sk_ebm.LowEffectiveSampleSizeWarning")
@parametrize_with_checks([quick(base="auto", max_iter=2)])
def test_common_checks(estimator, check):
    check(estimator)


def test_checks_not_yielded_for_third_parties():
    check_param_validation("EBMFlowDensity", quick())
    check_dataframe_column_names_consistency("EBMFlowDensity", quick())


@pytest.mark.parametrize("method", ["score_samples", "score", "sample"])
def test_unfitted_raises(method, X):
    argument = 3 if method == "sample" else X
    with pytest.raises(NotFittedError):
        getattr(EBMFlowDensity(), method)(argument)


def test_score_is_the_total_of_score_samples(fitted, X):
    assert fitted.score(X) == pytest.approx(fitted.score_samples(X).sum())
    assert fitted.score_samples(X).dtype == np.float64


def test_sample_has_the_shape_of_kernel_density(fitted):
    assert fitted.sample().shape == (1, 2)
    assert fitted.sample(5, random_state=0).shape == (5, 2)
    np.testing.assert_array_equal(fitted.sample(5, random_state=3), fitted.sample(5, random_state=3))
    assert not np.array_equal(fitted.sample(5, random_state=3), fitted.sample(5, random_state=4))


@pytest.mark.parametrize("dump", [pickle, joblib], ids=["pickle", "joblib"])
def test_dumped_and_loaded_scores_the_same(fitted, X, dump):
    file = io.BytesIO()
    dump.dump(fitted, file)
    file.seek(0)
    loaded = dump.load(file)
    np.testing.assert_array_equal(loaded.score_samples(X), fitted.score_samples(X))
    np.testing.assert_array_equal(loaded.sample(4, random_state=0), fitted.sample(4, random_state=0))


def test_same_seed_same_model_and_refit_is_idempotent(fitted, X):
    expected = fitted.score_samples(X)
    again = clone(fitted).fit(X)
    np.testing.assert_array_equal(again.score_samples(X), expected)
    np.testing.assert_array_equal(again.fit(X).score_samples(X), expected)


def test_random_state_instance_is_used(X):
    first = quick(random_state=np.random.RandomState(1)).fit(X).score_samples(X)
    second = quick(random_state=np.random.RandomState(1)).fit(X).score_samples(X)
    np.testing.assert_array_equal(first, second)


def test_scoring_and_sampling_leave_the_estimator_as_it_was(fitted, X):
    before = pickle.dumps(fitted)
    keys = list(vars(fitted))
    fitted.score_samples(X)
    fitted.sample(3, random_state=0)
    assert list(vars(fitted)) == keys
    assert pickle.dumps(fitted) == before


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["fit", "score_samples"])
def test_non_finite_values_raise(fitted, X, bad, where):
    broken = X.copy()
    broken[3, 1] = bad
    target = quick() if where == "fit" else fitted
    with pytest.raises(ValueError, match="NaN|infinity"):
        getattr(target, where)(broken)


def test_wrong_feature_names_raise(X):
    frame = pd.DataFrame(X, columns=["a", "b"])
    model = quick().fit(frame)
    assert list(model.feature_names_in_) == ["a", "b"]
    with pytest.raises(ValueError, match="feature names"):
        model.score_samples(frame.rename(columns={"b": "c"}))


def test_scores_do_not_depend_on_chunking(fitted):
    rows = np.random.default_rng(1).normal(size=(20_000, 2))
    whole = fitted.score_samples(rows)
    parts = np.concatenate([fitted.score_samples(part) for part in np.array_split(rows, 7)])
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-10)


def test_grid_search_scores_do_not_depend_on_n_jobs(X):
    searches = [GridSearchCV(quick(), {"alpha": [0.01, 0.1]}, cv=2, n_jobs=n_jobs).fit(X) for n_jobs in (1, 2)]
    # Bitwise: workers run one torch thread each, and so does this process.
    np.testing.assert_array_equal(*(search.cv_results_["mean_test_score"] for search in searches))
    assert np.isfinite(searches[0].score(X))


def test_pipeline_scores_and_samples_in_its_own_space(X):
    pipe = make_pipeline(PCA(n_components=1), quick()).fit(X)
    assert pipe.score_samples(X).shape == (60,)
    assert pipe[:-1].inverse_transform(pipe[-1].sample(3, random_state=0)).shape == (3, 2)


@pytest.mark.parametrize("estimator", [EBMFlowDensity(alpha=0.3), DensityClassifier(calibrate=False)])
def test_representations_show_what_was_changed_and_where_to_read(estimator):
    changed = "alpha=0.3" if isinstance(estimator, EBMFlowDensity) else "calibrate=False"
    assert repr(estimator) == f"{type(estimator).__name__}({changed})"
    assert f"api.html#sk_ebm.{type(estimator).__name__}" in estimator_html_repr(estimator)


@pytest.mark.parametrize(
    ("parameters", "column"), [({}, [1.0] * 60), ({"bounds": [None, (0, 1)]}, np.linspace(0.5, 1.5, 60))]
)
def test_errors_call_features_by_their_names(X, parameters, column):
    with pytest.raises(ValueError, match="eature 'height'"):
        quick(**parameters).fit(pd.DataFrame({"width": X[:, 0], "height": column}))
