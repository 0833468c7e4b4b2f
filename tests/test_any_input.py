"""Whatever comes in, a right answer or a clear error comes out: never NaN, never a traceback from inside torch.

``pytest tests/test_any_input.py --hypothesis-profile=thorough`` tries thirty times as many inputs.
"""

import math
import tempfile
import traceback
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sk_ebm import DensityClassifier, EBMFlowDensity, LowEffectiveSampleSizeWarning, TrainingWarning

# What an error may be raised from, and by whom: our own checks and those of scikit-learn and numpy.
CLEAR = (ValueError, TypeError)
INSIDES = ("/torch/", "/normflows/")


def quick(**parameters):
    defaults = {"base": "gaussian", "max_iter": 2, "n_estimators": 2, "n_chains": 32, "hidden_layer_sizes": (8,)}
    return EBMFlowDensity(**{**defaults, "random_state": 0, **parameters})


@pytest.fixture(scope="module")
def fitted():
    return quick().fit(normal(np.random.default_rng(0), 60, 2))


def normal(rng, n, d):
    return rng.normal(size=(n, d))


def heavy(rng, n, d):
    return rng.standard_t(1, size=(n, d))


def whole_numbers(rng, n, d):
    return rng.integers(-3, 4, size=(n, d)).astype(float)


def repeated(rng, n, d):
    return rng.normal(size=(max(n // 5, 1), d))[rng.integers(0, max(n // 5, 1), n)] if n else np.zeros((0, d))


def with_constant(rng, n, d):
    X = rng.normal(size=(n, d))
    X[:, -1:] = 7.0
    return X


def collinear(rng, n, d):
    return rng.normal(size=(n, 1)) * np.arange(1, d + 1)


def one_far_row(rng, n, d):
    X = rng.normal(size=(n, d))
    X[:1] = 1e9
    return X


def two_values(rng, n, d):
    return (rng.random((n, d)) < 0.5).astype(float)


CONTENTS = [normal, heavy, whole_numbers, repeated, with_constant, collinear, one_far_row, two_values]


def memmap(X):
    file = tempfile.TemporaryFile()
    mapped = np.memmap(file, dtype=float, shape=X.shape) if X.size else X
    mapped[:] = X
    return mapped


def read_only(X):
    X.flags.writeable = False
    return X


def masked(X):
    return np.ma.masked_array(X, mask=np.arange(X.size).reshape(X.shape) % 3 == 1)


def frame(X):
    return pd.DataFrame(X, columns=[f"column {j}" for j in range(X.shape[1])])


CONTAINERS = {
    "float64": np.array,
    "float32": lambda X: X.astype(np.float32),
    "float16": lambda X: X.astype(np.float16),
    "longdouble": lambda X: X.astype(np.longdouble),
    "int64": lambda X: np.clip(np.nan_to_num(X), -1e9, 1e9).astype(np.int64),
    "uint8": lambda X: np.clip(np.nan_to_num(X), 0, 255).astype(np.uint8),
    "bool": lambda X: X > 0,
    "complex": lambda X: X + 1j,
    "object": lambda X: X.astype(object),
    "strings": lambda X: X.astype(str),
    "words": lambda X: np.full(X.shape, "word", dtype=object),
    "list": lambda X: X.tolist(),
    "Fortran order": np.asfortranarray,
    "strided": lambda X: np.repeat(X, 3, axis=0)[::3, ::-1],
    "big-endian": lambda X: X.astype(">f8"),
    "read-only": read_only,
    "memmap": memmap,
    "masked": masked,
    "sparse": sparse.csr_matrix,
    "frame": frame,
    "one row too few dimensions": lambda X: X.ravel(),
    "one dimension too many": lambda X: X[None],
    "a number": lambda X: 3.0,
    "nothing": lambda X: None,
}


@st.composite
def tables(draw):
    """A table of any content, size, scale, defect and container."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, d = draw(st.sampled_from([0, 1, 2, 3, 5, 10, 30, 60])), draw(st.sampled_from([0, 1, 1, 2, 3, 6, 40]))
    X = draw(st.sampled_from(CONTENTS))(rng, n, d)
    exponent = draw(st.one_of(st.just(0), st.integers(-300, 300), st.integers(-20, 20)))
    with np.errstate(over="ignore", under="ignore"):
        X = X * 10.0**exponent + draw(st.sampled_from([0, 0, 0, 1, -1e6, 1e15, 1e300]))
    if X.size and draw(st.integers(0, 5)) == 0:
        X[rng.integers(n), rng.integers(d)] = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e308]))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return CONTAINERS[draw(st.sampled_from(sorted(CONTAINERS)))](X)


def outcome(use):
    """Return what `use` returns, or None after a clear error; anything else fails."""
    with warnings.catch_warnings():
        # Our own warnings are answers; those of numpy and torch would be leaks.
        for category in (LowEffectiveSampleSizeWarning, TrainingWarning):
            warnings.simplefilter("ignore", category)
        # What scikit-learn's check for infinite values says of float16.
        warnings.filterwarnings("ignore", "invalid value encountered in reduce", RuntimeWarning)
        try:
            return use()
        except CLEAR as error:
            raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
            assert not any(inside in raised_in for inside in INSIDES), traceback.format_exc()
            assert str(error)


@given(tables())
def test_any_table_is_fitted_right_or_refused_clearly(X):
    model = outcome(lambda: quick().fit(X))
    if model is None:
        return
    scores, draws = model.score_samples(X), model.sample(30, random_state=0)
    assert np.isfinite(scores).all()
    assert np.isfinite(draws).all()
    assert np.isfinite(model.score_samples(frame(draws) if isinstance(X, pd.DataFrame) else draws)).all()
    assert np.isfinite([model.log_normalizer_, model.log_normalizer_std_error_, model.effective_sample_size_]).all()
    values = np.asarray(X, dtype=np.float64)
    # Draws lie where the rows lie, up to tails.
    reach = 1e3 * (values.max(0) - values.min(0))
    assert ((draws > values.min(0) - reach) & (draws < values.max(0) + reach)).all()


@pytest.mark.parametrize("n_rows", [3, 10])
def test_a_row_beyond_what_the_others_could_map(n_rows):
    X = -1e6 + normal(np.random.default_rng(0), n_rows, 40)
    X[0] = 1e9
    assert np.isfinite(quick().fit(X).score_samples(X)).all()


@given(X=tables())
def test_any_table_is_scored_right_or_refused_clearly(fitted, X):
    X = X.to_numpy() if isinstance(X, pd.DataFrame) else X
    scores = outcome(lambda: fitted.score_samples(X))
    if scores is not None:
        assert not np.isnan(scores).any()
        assert (scores < 10).all()


@settings(max_examples=settings.default.max_examples // 4)
@given(st.sampled_from([1, 2]), st.integers(-150, 150), st.integers(0, 2**32 - 1))
def test_scales_change_scores_by_their_logarithm_and_nothing_else(n_features, exponent, seed):
    X = normal(np.random.default_rng(seed), 40, n_features)
    scale = 2.0 ** (3 * exponent)
    plain, scaled = quick().fit(X), quick().fit(X * scale)
    expected = plain.score_samples(X) - n_features * math.log(scale)
    np.testing.assert_allclose(scaled.score_samples(X * scale), expected, rtol=1e-9, atol=1e-3)


VALUES = [
    None,
    -1,
    0,
    1,
    2,
    2.5,
    0.3,
    -0.1,
    "auto",
    "word",
    (),
    (4,),
    [3, 2],
    {},
    math.nan,
    math.inf,
    True,
    len,
    {"a": 1},
]


@given(st.dictionaries(st.sampled_from(sorted(EBMFlowDensity().get_params())), st.sampled_from(VALUES), max_size=3))
def test_any_parameters_work_or_are_refused_clearly(parameters):
    X = normal(np.random.default_rng(0), 30, 2)
    model = outcome(lambda: quick(**parameters).fit(X))
    if model is not None:
        assert not np.isnan(model.score_samples(X)).any()
        assert np.isfinite(model.sample(5)).all()


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.5, 1e-300, 1e-11, 1e-4, 1e300]), min_size=19, max_size=19),
    st.sampled_from([1.0, 2.0, 3.0, -1.0, math.nan, math.inf]),
)
def test_any_weights_are_used_or_refused_clearly(weight, last):
    X = normal(np.random.default_rng(0), 20, 2)
    weight = [*weight, last]
    model = outcome(lambda: quick(batch_size=1).fit(X, sample_weight=weight))
    assert (model is None) or np.isfinite(model.score_samples(X)).all()


@settings(max_examples=settings.default.max_examples // 4)
@given(tables(), st.sampled_from([1, 2, 3]))
def test_any_table_is_classified_or_refused_clearly(X, n_classes):
    classifier = DensityClassifier(quick(), calibrate=False, random_state=0)
    labels = np.arange(np.shape(X)[0] if np.ndim(X) else 3) % n_classes
    probability = outcome(lambda: classifier.fit(X, labels).predict_proba(X))
    if probability is not None:
        assert np.isfinite(probability).all()
        np.testing.assert_allclose(probability.sum(1), 1)


def test_masked_values_are_refused(fitted):
    X = masked(normal(np.random.default_rng(0), 30, 2))
    for use in (quick().fit, fitted.score_samples, lambda X: DensityClassifier(quick()).fit(X, np.arange(30) % 2)):
        with pytest.raises(ValueError, match="X has 20 masked values"):
            use(X)
    assert np.isfinite(fitted.score_samples(np.ma.masked_array(X.data))).all()


def test_rows_and_features_may_run_backwards(fitted):
    X = normal(np.random.default_rng(0), 30, 2)
    backwards = X[::-1, ::-1]
    np.testing.assert_array_equal(fitted.score_samples(backwards), fitted.score_samples(backwards.copy()))
    np.testing.assert_array_equal(
        quick().fit(backwards).score_samples(X), quick().fit(backwards.copy()).score_samples(X)
    )
