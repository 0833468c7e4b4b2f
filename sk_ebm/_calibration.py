"""Calibration: what the log densities of classes are worth as evidence, learnt from rows they have not seen."""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

# Pseudo-rows that hold the temperature at one and the offsets at zero.
_PRIOR_COUNT = 1.0
_SCALE_RANGE = (1e-3, 5.0)


class Calibration(NamedTuple):
    """Calibrated log densities are ``scale * log_density + offset``.

    Attributes
    ----------
    scale : float
        Inverse temperature; below one where the densities are too sure of themselves.
    offset : ndarray of shape (C,)
        Correction of each class (nats).
    offset_covariance : ndarray of shape (C, C)
        Covariance of the offsets.
    """

    scale: float
    offset: np.ndarray
    offset_covariance: np.ndarray

    def __call__(self, log_density: np.ndarray) -> np.ndarray:
        """Return calibrated log densities, shape (n, C)."""
        return self.scale * log_density + self.offset


def no_calibration(log_normalizer_errors: np.ndarray) -> Calibration:
    """Take log densities as they are; they err by their normalizers alone."""
    return Calibration(1.0, np.zeros_like(log_normalizer_errors), np.diag(np.square(log_normalizer_errors)))


def fit_calibration(log_density: np.ndarray, label: np.ndarray, weight: np.ndarray) -> Calibration:
    """Fit one temperature and an offset per class by penalised likelihood of the labels.

    Parameters
    ----------
    log_density : ndarray of shape (n, C)
        Log densities (nats) of labelled rows under every class; rows that are impossible in their own are left out.
    label : ndarray of shape (n,)
        Index of the class of each row.
    weight : ndarray of shape (n,)
        Non-negative row weights.

    References
    ----------
    A. Alexandari, A. Kundaje, A. Shrikumar, "Maximum likelihood with bias-corrected calibration is hard-to-beat at
    label shift adaptation", 2020, arXiv 1901.06852.
    """
    n_classes = log_density.shape[1]
    # No temperature and no offset can save a row that is impossible in its own class.
    is_possible = np.isfinite(log_density[np.arange(len(label)), label])
    log_density, label, weight = log_density[is_possible], label[is_possible], weight[is_possible]
    # Only differences between classes count.
    evidence = log_density - log_density.max(1, keepdims=True)
    impossible = np.isneginf(evidence)
    evidence[impossible] = 0.0
    one_hot = np.eye(n_classes)[label]
    log_prior = np.log(weight @ one_hot / weight.sum())

    def logits(parameters: np.ndarray) -> np.ndarray:
        return np.where(impossible, -np.inf, parameters[0] * evidence + parameters[1:] + log_prior)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        log_probability = log_softmax(logits(parameters), axis=1)
        residual = weight[:, None] * (np.exp(log_probability) - one_hot)
        value = -(weight * log_probability[np.arange(len(label)), label]).sum()
        deviation = parameters - start
        gradient = np.concatenate([[(residual * evidence).sum()], residual.sum(0)])
        return value + 0.5 * _PRIOR_COUNT * float(deviation @ deviation), gradient + _PRIOR_COUNT * deviation

    start = np.concatenate([[1.0], np.zeros(n_classes)])
    bounds = [_SCALE_RANGE, *[(None, None)] * n_classes]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 1000})
    probability = softmax(logits(found.x), axis=1)
    information = np.diag(weight @ probability) - (weight[:, None] * probability).T @ probability
    covariance = np.linalg.inv(information + _PRIOR_COUNT * np.eye(n_classes))
    return Calibration(float(found.x[0]), found.x[1:], covariance)
