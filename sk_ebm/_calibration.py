"""Calibration: what the log densities of classes are worth as evidence, learnt from rows they have not seen."""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch.nn.functional import logsigmoid

# Normal priors: the scale is 1 +- 1, every offset 0 +- 1, the log odds of an exception -4 +- 2, and the tilt 0 +- 0.2
# per standard deviation of a feature.
_LOG_ODDS, _LOG_ODDS_SPREAD, _TILT_SPREAD = -4.0, 2.0, 0.2
# Standard deviations beyond which a feature tilts no further.
_FAR = 5.0
_SCALE_RANGE = (1e-3, 5.0)
# The likelihood may have two maxima: a row that its own class finds impossible asks for a tiny scale or for some
# contamination.
_STARTS = (1.0, 0.1)


class Tilt(NamedTuple):
    """Linear evidence of the features, ``clip((x - centre) / spread) @ slope``.

    Attributes
    ----------
    centre, spread : ndarray of shape (d,)
        Mean and standard deviation of the training rows.
    slope : ndarray of shape (d, C)
        Evidence for each class (nats) per standard deviation.
    """

    centre: np.ndarray
    spread: np.ndarray
    slope: np.ndarray

    def __call__(self, X: np.ndarray) -> np.ndarray:
        """Return the evidence (nats), shape (n, C)."""
        return _standardised(X, self.centre, self.spread) @ self.slope


class Calibration(NamedTuple):
    """What turns log densities of classes into calibrated ones.

    With ``q_c = exp(scale * log_density_c + offset_c + tilt_c)``, the calibrated density of class c is
    ``(1 - contamination) q_c + contamination mean_k q_k``. The tilt mends what densities that were fitted apart get
    wrong of the difference between their classes; and a row is an exception, that the densities say nothing about, with
    probability `contamination`, so that no single row, however badly its density fits, can outvote the others.

    Attributes
    ----------
    scale : float
        Inverse temperature; below one where the densities are too sure of themselves.
    offset : ndarray of shape (C,)
        Correction of each class (nats).
    tilt : Tilt or None
        Linear correction.
    contamination : float
        Share of rows that are exceptions.
    offset_covariance : ndarray of shape (C, C)
        Covariance of the offsets.
    """

    scale: float
    offset: np.ndarray
    tilt: Tilt | None
    contamination: float
    offset_covariance: np.ndarray

    def __call__(self, log_density: np.ndarray, X: np.ndarray) -> np.ndarray:
        """Return calibrated log densities, shape (n, C), of rows X with log densities (n, C)."""
        evidence = self.scale * log_density + self.offset
        if self.tilt is not None:
            evidence = evidence + self.tilt(X)
        if self.contamination == 0:
            return evidence
        log_mean = logsumexp(evidence, axis=1, keepdims=True) - math.log(evidence.shape[1])
        return np.logaddexp(math.log1p(-self.contamination) + evidence, math.log(self.contamination) + log_mean)


def no_calibration(log_normalizer_errors: np.ndarray) -> Calibration:
    """Take log densities as they are; they err by their normalizers alone."""
    covariance = np.diag(np.square(log_normalizer_errors))
    return Calibration(1.0, np.zeros_like(log_normalizer_errors), None, 0.0, covariance)


def fit_calibration(log_density: np.ndarray, X: np.ndarray, label: np.ndarray, weight: np.ndarray) -> Calibration:
    """Fit a temperature, an offset and a tilt per class and a contamination by penalised likelihood of the labels.

    Parameters
    ----------
    log_density : ndarray of shape (n, C)
        Log densities (nats) of labelled rows under every class; -inf where one is zero, but not under all.
    X : ndarray of shape (n, d)
        The rows.
    label : ndarray of shape (n,)
        Index of the class of each row.
    weight : ndarray of shape (n,)
        Non-negative row weights.

    References
    ----------
    A. Alexandari, A. Kundaje, A. Shrikumar, "Maximum likelihood with bias-corrected calibration is hard-to-beat at
    label shift adaptation", 2020, arXiv 1901.06852;
    J. Copas, "Binary regression models for contaminated data", Journal of the Royal Statistical Society B 50, 1988.
    """
    n_classes, n_features = log_density.shape[1], X.shape[1]
    middle = np.average(X, axis=0, weights=weight)
    deviation = np.sqrt(np.average(np.square(X - middle), axis=0, weights=weight))
    deviation[deviation == 0] = 1.0
    features = torch.from_numpy(_standardised(X, middle, deviation))
    values, rows, row_weight = torch.from_numpy(log_density), torch.from_numpy(label), torch.from_numpy(weight)
    # Only differences between classes count.
    evidence = values - values.amax(1, keepdim=True)
    is_impossible = evidence.isneginf()
    evidence = evidence.masked_fill(is_impossible, 0.0)
    log_prior = (row_weight.new_zeros(n_classes).index_add(0, rows, row_weight) / row_weight.sum()).log()
    sizes = (1, n_classes, 1, n_features * n_classes)
    centre, spread = (
        torch.cat([torch.full((size,), value, dtype=values.dtype) for size, value in zip(sizes, prior, strict=True)])
        for prior in ((1.0, 0.0, _LOG_ODDS, 0.0), (1.0, 1.0, _LOG_ODDS_SPREAD, _TILT_SPREAD))
    )

    def log_probability(parameters: torch.Tensor) -> torch.Tensor:
        scale, offset, log_odds, slope = parameters.split(sizes)
        tilt = features @ slope.view(n_features, n_classes)
        scaled = (scale * evidence + offset + tilt).masked_fill(is_impossible, -math.inf)
        log_mean = scaled.logsumexp(1, keepdim=True) - math.log(n_classes)
        clean, exception = logsigmoid(-log_odds) + scaled, logsigmoid(log_odds) + log_mean
        return (torch.logaddexp(clean, exception) + log_prior).log_softmax(1)

    def loss(parameters: torch.Tensor) -> torch.Tensor:
        log_likelihood = row_weight @ log_probability(parameters).gather(1, rows.unsqueeze(-1)).squeeze(-1)
        return 0.5 * ((parameters - centre) / spread).square().sum() - log_likelihood

    def loss_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.from_numpy(parameters).requires_grad_(True)
        value = loss(at)
        (gradient,) = torch.autograd.grad(value, at)
        return value.item(), gradient.numpy()

    bounds = [_SCALE_RANGE, *[(None, None)] * (len(centre) - 1)]
    starts = (np.concatenate([[scale], centre[1:].numpy()]) for scale in _STARTS)
    fits = [
        minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 1000})
        for start in starts
    ]
    found = torch.from_numpy(min(fits, key=lambda fit: fit.fun).x)
    probability = log_probability(found).exp()
    information = (row_weight @ probability).diag() - (row_weight.unsqueeze(-1) * probability).T @ probability
    covariance = torch.linalg.inv(information + torch.eye(n_classes, dtype=values.dtype))
    scale, offset, log_odds, slope = found.split(sizes)
    return Calibration(
        float(scale),
        offset.numpy(),
        Tilt(middle, deviation, slope.view(n_features, n_classes).numpy()),
        float(log_odds.sigmoid()),
        covariance.numpy(),
    )


def _standardised(X: np.ndarray, centre: np.ndarray, spread: np.ndarray) -> np.ndarray:
    return ((X - centre) / spread).clip(-_FAR, _FAR)
