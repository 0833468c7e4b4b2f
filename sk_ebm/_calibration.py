"""Calibration: what the log densities of classes are worth as evidence, learnt from rows they have not seen."""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, logsumexp
from torch.nn.functional import logsigmoid

# Weak normal priors: the scale is 1 +- 1, every offset 0 +- 1, and the log odds of an exception -4 +- 2.
_LOG_ODDS, _LOG_ODDS_SPREAD = -4.0, 2.0
_SCALE_RANGE = (1e-3, 5.0)
# The likelihood may have two maxima: a row that its own class finds impossible asks for a tiny scale or for some
# contamination.
_STARTS = (1.0, 0.1)


class Calibration(NamedTuple):
    """What turns log densities of classes into calibrated ones.

    With ``q_c = exp(scale * log_density_c + offset_c)``, the calibrated density of class c is
    ``(1 - contamination) q_c + contamination mean_k q_k``: with probability `contamination`, a row is an exception that
    the densities say nothing about. So no single row, however badly its density fits, can outvote the others.

    Attributes
    ----------
    scale : float
        Inverse temperature; below one where the densities are too sure of themselves.
    offset : ndarray of shape (C,)
        Correction of each class (nats).
    contamination : float
        Share of rows that are exceptions.
    offset_covariance : ndarray of shape (C, C)
        Covariance of the offsets.
    """

    scale: float
    offset: np.ndarray
    contamination: float
    offset_covariance: np.ndarray

    def __call__(self, log_density: np.ndarray) -> np.ndarray:
        """Return calibrated log densities, shape (n, C)."""
        evidence = self.scale * log_density + self.offset
        if self.contamination == 0:
            return evidence
        log_mean = logsumexp(evidence, axis=1, keepdims=True) - math.log(evidence.shape[1])
        return np.logaddexp(math.log1p(-self.contamination) + evidence, math.log(self.contamination) + log_mean)


def no_calibration(log_normalizer_errors: np.ndarray) -> Calibration:
    """Take log densities as they are; they err by their normalizers alone."""
    return Calibration(1.0, np.zeros_like(log_normalizer_errors), 0.0, np.diag(np.square(log_normalizer_errors)))


def fit_calibration(log_density: np.ndarray, label: np.ndarray, weight: np.ndarray) -> Calibration:
    """Fit a temperature, an offset per class and a contamination by penalised likelihood of the labels.

    Parameters
    ----------
    log_density : ndarray of shape (n, C)
        Log densities (nats) of labelled rows under every class; -inf where one is zero, but not under all.
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
    n_classes = log_density.shape[1]
    values, rows, row_weight = torch.from_numpy(log_density), torch.from_numpy(label), torch.from_numpy(weight)
    # Only differences between classes count.
    evidence = values - values.amax(1, keepdim=True)
    is_impossible = evidence.isneginf()
    evidence = evidence.masked_fill(is_impossible, 0.0)
    log_prior = (row_weight.new_zeros(n_classes).index_add(0, rows, row_weight) / row_weight.sum()).log()
    centre = torch.tensor([1.0, *[0.0] * n_classes, _LOG_ODDS], dtype=values.dtype)
    spread = torch.tensor([*[1.0] * (1 + n_classes), _LOG_ODDS_SPREAD], dtype=values.dtype)

    def log_probability(parameters: torch.Tensor) -> torch.Tensor:
        scale, offset, log_odds = parameters.tensor_split([1, 1 + n_classes])
        scaled = (scale * evidence + offset).masked_fill(is_impossible, -math.inf)
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

    bounds = [_SCALE_RANGE, *[(None, None)] * (n_classes + 1)]
    starts = (np.concatenate([[scale], centre[1:].numpy()]) for scale in _STARTS)
    fits = [
        minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 1000})
        for start in starts
    ]
    found = min(fits, key=lambda fit: fit.fun).x
    probability = log_probability(torch.from_numpy(found)).exp()
    information = (row_weight @ probability).diag() - (row_weight.unsqueeze(-1) * probability).T @ probability
    covariance = torch.linalg.inv(information + torch.eye(n_classes, dtype=values.dtype))
    return Calibration(float(found[0]), found[1:-1], float(expit(found[-1])), covariance.numpy())
