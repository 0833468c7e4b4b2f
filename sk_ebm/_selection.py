"""Cross-fitted candidates: choose the feature map and the bases by the likelihood of rows they have not seen."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from sk_ebm._base import COVARIANCE_TYPES, Mixture, fit_gaussian, fit_mixture, fit_student_t
from sk_ebm._folds import Folds
from sk_ebm._support import FeatureMap, fit_feature_map
from sk_ebm._types import Density

_N_COMPONENTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_MIN_ROWS_PER_COMPONENT = 10
# More rows would change the fitted maps and bases too little to be worth their time and memory.
MAX_FIT_ROWS = 8000
_MAX_SEARCH_ROWS = 3000
# Nats by which a Gaussian on normal-score margins may trail the best plain base and still be worth a closer look.
_HOPELESS = 0.5
# Two folds judge the settings of a mixture well enough; the mixture chosen is then fitted for every fold.
_SEARCH_FOLDS = 2
# Nats times the square root of the rows: how far two settings may differ by chance.
_SCORE_NOISE = 0.5
# EM has local optima: the mixture chosen is fitted several times, and the likeliest fit is kept.
_FINAL_RUNS = 3


class Bases(NamedTuple):
    """One fitted base per member, and the held-out log-likelihood per row (nats, in z-space)."""

    members: list[Density]
    score: float


def cross_fit(fit: Callable[[torch.Tensor, torch.Tensor], Density], data: Folds) -> Bases:
    """Fit one density per member on the rows it may see, and score each on the rows it may not."""
    members = [fit(data.rows, weight) for weight in data.train_weight()]
    return Bases(members, data.held_out_mean(torch.stack([member.log_prob(data.rows) for member in members])))


def cross_fit_base(name: str, data: Folds, feature_map: FeatureMap, generator: torch.Generator) -> Bases:
    """Cross-fit the base called "gaussian", "student_t" or "mixture" in z-space."""
    if name == "gaussian":
        return cross_fit(fit_gaussian, data)
    if name == "student_t":
        return cross_fit(fit_student_t, data)
    return _search_mixture(data, feature_map, generator)


def choose_feature_map(
    data: Folds, names: Sequence[str], generator: torch.Generator
) -> tuple[FeatureMap, dict[str, Bases]]:
    """Choose between plain whitening and normal-score margins by the best of the named bases on each.

    Parameters
    ----------
    data : Folds
        Rows in the user's units.
    names : sequence of str
        Bases to try, "gaussian" among them.
    generator : torch.Generator
        Source of randomness.

    Returns
    -------
    feature_map : FeatureMap
        The map, fitted to all rows.
    bases : dict
        The named bases on that map.
    """
    plain = fit_feature_map(data.rows, data.weight, use_margins=False)
    plain_bases = cross_fit_bases(data, names, plain, generator)
    plain_score = max(bases.score for bases in plain_bases.values()) + mean_log_det(data, plain)
    honest_score = _score_map_and_gaussian(data)
    if honest_score < plain_score - _HOPELESS:
        return plain, plain_bases
    margins = fit_feature_map(data.rows, data.weight, use_margins=True)
    margin_bases = cross_fit_bases(data, names, margins, generator)
    # The map is a density model too and has seen every row: take off what that flatters the Gaussian by.
    flattery = margin_bases["gaussian"].score + mean_log_det(data, margins) - honest_score
    margin_score = max(bases.score for bases in margin_bases.values()) + mean_log_det(data, margins) - flattery
    if margin_score > plain_score + _margin_of_doubt(data):
        return margins, margin_bases
    return plain, plain_bases


def cross_fit_bases(
    data: Folds, names: Sequence[str], feature_map: FeatureMap, generator: torch.Generator
) -> dict[str, Bases]:
    """Cross-fit the named bases on the z of the given map."""
    z = data.with_rows(feature_map(data.rows)[0])
    return {name: cross_fit_base(name, z, feature_map, generator) for name in names}


def mean_log_det(data: Folds, feature_map: FeatureMap) -> float:
    """Return the weighted mean log |det| (nats) of the map over the rows."""
    return float((data.weight @ feature_map(data.rows)[1]) / data.weight.sum())


def _margin_of_doubt(data: Folds) -> float:
    """Nats per row by which the more elaborate map must win: the noise of a paired score of n rows."""
    return 0.02 + 0.5 / math.sqrt(len(data.rows))


def _score_map_and_gaussian(data: Folds) -> float:
    """Held-out log-likelihood (nats, user's units) of a Gaussian on normal-score margins that were fitted with it."""
    log_probs = []
    for weight in data.train_weight():
        feature_map = fit_feature_map(data.rows[weight > 0], weight[weight > 0], use_margins=True)
        z, log_det = feature_map(data.rows)
        log_probs.append(fit_gaussian(z, weight).log_prob(z) + log_det)
    return data.held_out_mean(torch.stack(log_probs))


def _search_mixture(data: Folds, feature_map: FeatureMap, generator: torch.Generator) -> Bases:
    """Choose the size and covariance of a Gaussian mixture by held-out likelihood, then cross-fit it."""
    sample = data.subset(_MAX_SEARCH_ROWS)._replace(n_members=min(_SEARCH_FOLDS, data.n_members))
    # With few features EM is cheap and its likelihood is bumpy in the number of components; with many, neither.
    patience = 5 if data.rows.shape[1] <= 3 else 2
    tried: list[tuple[float, int, tuple[torch.Tensor, str, int]]] = []
    for frame, covariance_type in _frames(feature_map):
        best_of_type, stale = -math.inf, 0
        for n_components in _sizes(sample):
            settings = (frame, covariance_type, n_components)
            score = cross_fit(_mixture_fitter(*settings, generator=generator, n_runs=1), sample).score
            tried.append((score, _n_parameters(covariance_type, n_components, len(frame)), settings))
            stale = 0 if score > best_of_type + 1e-3 else stale + 1
            best_of_type = max(best_of_type, score)
            if stale >= patience:
                break
    # Of the settings that held-out rows can hardly tell apart, the one of fewest parameters.
    within_noise = max(score for score, _, _ in tried) - _SCORE_NOISE / math.sqrt(len(sample.rows))
    _, _, settings = min((t for t in tried if t[0] >= within_noise), key=lambda t: (t[1], -t[0]))
    return cross_fit(_mixture_fitter(*settings, generator=generator, n_runs=_FINAL_RUNS), data)


def _n_parameters(covariance_type: str, n_components: int, d: int) -> int:
    """Count the free parameters of the means and covariances."""
    full = d * (d + 1) // 2
    per_covariance = {"full": full, "tied": full, "diag": d, "spherical": 1}[covariance_type.removeprefix("tied_")]
    n_covariances = 1 if covariance_type.startswith("tied") else n_components
    return n_components * d + n_covariances * per_covariance


def _frames(feature_map: FeatureMap) -> Iterator[tuple[torch.Tensor, str]]:
    """Yield coordinates, as the matrix that leads there from z, in which a covariance type is worth trying.

    "Spherical" means something else in the user's units than in standardised ones.
    """
    standardised = feature_map.unwhitener
    if len(standardised) == 1:
        yield standardised, "full"
        yield standardised, "tied"
        return
    for covariance_type in COVARIANCE_TYPES:
        yield standardised, covariance_type
    if feature_map.margins is None:
        users_units = standardised * (feature_map.scale / feature_map.scale.log().mean().exp())
        for covariance_type in ("spherical", "tied_spherical"):
            yield users_units, covariance_type


def _sizes(data: Folds) -> list[int]:
    return [1] + [k for k in _N_COMPONENTS[1:] if k * _MIN_ROWS_PER_COMPONENT <= len(data.rows)]


def _mixture_fitter(
    frame: torch.Tensor, covariance_type: str, n_components: int, *, generator: torch.Generator, n_runs: int
) -> Callable[[torch.Tensor, torch.Tensor], Mixture]:
    def fit(z: torch.Tensor, weight: torch.Tensor) -> Mixture:
        rows, tol = z @ frame, 1e-3 if n_runs == 1 else 1e-4
        runs = [
            fit_mixture(rows, weight, n_components, covariance_type=covariance_type, generator=generator, tol=tol)
            for _ in range(n_runs)
        ]
        return max(runs, key=lambda mixture: float(weight @ mixture.log_prob(rows))).pulled_back(frame)

    return fit
