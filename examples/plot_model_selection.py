"""
===================================
Choosing parameters, and looking
===================================

The defaults are meant to be left alone. Where a search pays, it is the searches you know: this example runs
scikit-learn's GridSearchCV and HalvingRandomSearchCV, and Optuna's OptunaSearchCV, and shows how to see what the winner
has learnt. No scorer is needed: `score` is the total log-likelihood of the held-out rows; the scorer below is its mean.

It needs Optuna: ``pip install optuna optuna-integration``.
"""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import optuna
from optuna_integration import OptunaSearchCV
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import GridSearchCV, HalvingRandomSearchCV, cross_val_score

from sk_ebm import DensityDisplay, EBMFlowDensity, TrainingDisplay

# %%
# Data: waiting times and the amounts that follow them, both positive and skewed.

rng = np.random.default_rng(0)
waiting = rng.gamma(2.0, 1.0, 200)
X = np.column_stack([waiting, waiting * rng.lognormal(0.0, 0.4, 200)])


def mean_log_likelihood(density, X, y=None):
    """Score by nats per row."""
    return density.score_samples(X).mean()


# %%
# What it reaches as it is, by cross-validation. To keep the example short, there are fewer iterations than by default,
# and fewer energies: two are too few for real work, where they may run away from their sampler.

density = EBMFlowDensity(base="gaussian", n_estimators=2, max_iter=10, random_state=0)
scores = cross_val_score(density, X, scoring=mean_log_likelihood, cv=3, n_jobs=2)
print(f"as it is        {scores.mean():.3f} nats per row, +- {scores.std() / np.sqrt(len(scores)):.3f}")

# %%
# A grid, over what matters most for positive features: that they are told to be, and the map of the features.

grid = {"bounds": [None, (0, None)], "feature_map": ["standard", "marginal"]}
search = GridSearchCV(density, grid, scoring=mean_log_likelihood, cv=3, n_jobs=2).fit(X)
print(f"grid            {search.best_score_:.3f} with {search.best_params_}")

# %%
# Successive halving, with the iterations as the resource: all candidates get few, the best ones more.

choices = {"alpha": np.geomspace(0.01, 1.0, 20), "base": ["gaussian", "mixture", "student_t"]}
halving = HalvingRandomSearchCV(
    search.best_estimator_,
    choices,
    resource="max_iter",
    min_resources=5,
    max_resources=10,
    factor=2,
    n_candidates=4,
    scoring=mean_log_likelihood,
    cv=3,
    n_jobs=2,
    random_state=0,
).fit(X)
print(f"halving         {halving.best_score_:.3f} with {halving.best_params_}")

# %%
# Optuna, over continuous ranges.

optuna.logging.set_verbosity(optuna.logging.WARNING)
# What Optuna says of its own parts.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", module="optuna", category=FutureWarning)
study = OptunaSearchCV(
    search.best_estimator_,
    {
        "alpha": optuna.distributions.FloatDistribution(0.01, 1.0, log=True),
        "learning_rate": optuna.distributions.FloatDistribution(0.001, 0.01, log=True),
    },
    scoring=mean_log_likelihood,
    cv=3,
    n_trials=3,
    random_state=0,
).fit(X)
print(f"Optuna          {study.best_score_:.3f} with {study.best_params_}")

# %%
# What did the best of the grid learn, and how did its training go?

best = search.best_estimator_
DensityDisplay.from_estimator(best, X)
TrainingDisplay.from_estimator(best)
plt.show()
