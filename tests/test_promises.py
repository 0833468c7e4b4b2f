"""Promises about what surrounds a call: nobody's global state changes, a seed is a seed, threads do not mix."""

import random
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import matplotlib as mpl
import numpy as np
import pytest
import torch

from sk_ebm import (
    DensityClassifier,
    DensityDisplay,
    EBMFlowDensity,
    ProportionsDisplay,
    TrainingDisplay,
    class_proportions,
)

X = np.random.default_rng(0).normal(size=(60, 2)) + 4.0 * (np.arange(60) % 3 == 0)[:, None]
LABELS = np.arange(60) % 3 == 0


def quick(**parameters):
    defaults = {"max_iter": 4, "n_estimators": 2, "n_chains": 32, "hidden_layer_sizes": (8,), "random_state": 0}
    return EBMFlowDensity(**{**defaults, **parameters})


@pytest.fixture(scope="module")
def fitted():
    return quick().fit(X)


@pytest.fixture(scope="module")
def classifier():
    return DensityClassifier(quick(base="gaussian"), random_state=0).fit(X, LABELS)


def side(rows):
    return np.where(rows[:, 0] > 2, "right", "left")


def fails(fitted):
    with pytest.raises(ValueError, match="Constant"):
        quick().fit(np.c_[X, np.ones(60)])


CALLS = {
    "fit": lambda fitted, classifier: quick().fit(X),
    "fit without a seed": lambda fitted, classifier: quick(base="gaussian", random_state=None).fit(X),
    "fit that fails": lambda fitted, classifier: fails(fitted),
    "fit of a flow base": lambda fitted, classifier: quick(base="flow").fit(X),
    "score": lambda fitted, classifier: fitted.score(X),
    "score_samples": lambda fitted, classifier: fitted.score_samples(X),
    "sample": lambda fitted, classifier: fitted.sample(20),
    "importance_sample": lambda fitted, classifier: fitted.importance_sample(20),
    "class_proportions": lambda fitted, classifier: class_proportions(fitted, side, n_samples=200),
    "classifier.fit": lambda fitted, classifier: DensityClassifier(quick(base="gaussian"), n_jobs=2).fit(X, LABELS),
    "classifier.predict_proba": lambda fitted, classifier: classifier.predict_proba(X),
    "classifier.estimate_proportions": lambda fitted, classifier: classifier.estimate_proportions(X),
    "DensityDisplay": lambda fitted, classifier: DensityDisplay.from_estimator(fitted, X),
    "TrainingDisplay": lambda fitted, classifier: TrainingDisplay.from_estimator(fitted),
    "ProportionsDisplay": lambda fitted, classifier: ProportionsDisplay.from_estimator(classifier, X),
}


def global_state():
    """Everything that a library could change under the hands of its user."""
    return {
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "numpy errors": np.geterr(),
        "numpy printing": str(np.get_printoptions()),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warnings": warnings.filters[:],
        "matplotlib": dict(mpl.rcParams),
        "backend": mpl.get_backend(),
    }


@pytest.mark.parametrize("name", CALLS)
def test_global_state_is_untouched(fitted, classifier, name):
    mpl.use("Agg")
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = global_state()
    CALLS[name](fitted, classifier)
    assert global_state() == before


SCRIPT = """
import hashlib, sys
import numpy as np, torch
from sk_ebm import EBMFlowDensity
torch.set_num_threads(1)
X = np.random.default_rng(0).normal(size=(60, 2)) + 4.0 * (np.arange(60) % 3 == 0)[:, None]
density = EBMFlowDensity(max_iter=4, n_estimators=2, n_chains=32, hidden_layer_sizes=(8,), random_state=0).fit(X)
print(hashlib.sha256(density.score_samples(X).tobytes() + density.sample(9, random_state=0).tobytes()).hexdigest())
"""


def test_same_seed_same_model_bit_for_bit_in_every_process():
    """With hashes of strings and sets in another order, and another state of the global generators."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, check=True)
    exec(SCRIPT.replace("print(", "own.append("), own_scope := {"own": []})
    assert run.stdout == (own_scope["own"][0] + "\n").encode()


def test_threads_that_share_a_model_do_not_mix(fitted):
    rows = np.random.default_rng(1).normal(size=(8, 3000, 2))
    expected = [(fitted.score_samples(part), fitted.sample(50, random_state=k)) for k, part in enumerate(rows)]
    with ThreadPoolExecutor(8) as executor:
        for _ in range(5):
            scores = [executor.submit(fitted.score_samples, part) for part in rows]
            draws = [executor.submit(fitted.sample, 50, k) for k in range(8)]
            for (score, draw), own_score, own_draw in zip(expected, scores, draws, strict=True):
                np.testing.assert_array_equal(own_score.result(), score)
                np.testing.assert_array_equal(own_draw.result(), draw)


def test_threads_that_fit_at_once_get_what_each_would_alone():
    expected = [quick(random_state=seed).fit(X).score_samples(X) for seed in range(2)]
    with ThreadPoolExecutor(2) as executor:
        models = list(executor.map(lambda seed: quick(random_state=seed).fit(X), range(2)))
    for model, scores in zip(models, expected, strict=True):
        np.testing.assert_array_equal(model.score_samples(X), scores)
