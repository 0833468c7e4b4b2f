"""Importance sampling: log Z with its standard error, and the effective sample size of log weights."""

import math
from typing import NamedTuple

import torch

_MIN_DRAWS_PER_CONTROL = 10
# Combinations of controls that vary less than this, relative to the one that varies most, are taken not to vary.
_MIN_SINGULAR_VALUE = 1e-3


class LogNormalizer(NamedTuple):
    """Estimate of log Z (nats), its standard error (nats) and the effective sample size as a fraction."""

    value: float
    std_error: float
    effective_sample_size: float


def effective_sample_size(log_weight: torch.Tensor) -> torch.Tensor:
    """Return (sum w)^2 / (n sum w^2) along the last dimension, a fraction in (0, 1]; 0 if no weight is positive."""
    # In float64 and with the largest weight at one: the two sums nearly cancel.
    log_weight = log_weight.cpu().double()
    weight = (log_weight - log_weight.amax(-1, keepdim=True)).exp()
    fraction = weight.sum(-1).square() / (weight.shape[-1] * weight.square().sum(-1))
    return fraction.nan_to_num(nan=0.0).clamp(max=1.0)


def estimate_log_normalizer(log_weight: torch.Tensor, controls: torch.Tensor | None = None) -> LogNormalizer:
    """Estimate log Z = log E[w] from importance weights w = p_unnormalised / proposal.

    Parameters
    ----------
    log_weight : tensor of shape (n,)
        Log importance weights (nats) of independent proposals.
    controls : tensor of shape (J, n), default=None
        Control variates: functions of the proposals whose expectation is one, such as a component of the proposal
        over the proposal. The closer a combination of them is to the weights, the smaller the error.

    Returns
    -------
    LogNormalizer
        The standard error is that of the mean weight, or of what the controls leave of it, carried to the log by the
        delta method.

    References
    ----------
    A. Owen, Y. Zhou, "Safe and Effective Importance Sampling", JASA 95(449), 2000.
    """
    n = log_weight.shape[-1]
    fraction = float(effective_sample_size(log_weight))
    if fraction == 0 or n == 1:
        return LogNormalizer(float(log_weight.cpu().double().amax(-1)), math.inf, fraction)
    scale = float(log_weight.max())
    weight = (log_weight.cpu().double() - scale).exp()
    mean, std_error = _mean_and_std_error(weight, weight.new_empty(n, 0))
    if controls is not None and n > _MIN_DRAWS_PER_CONTROL * len(controls):
        controlled_mean, controlled_error = _mean_and_std_error(weight, controls.T.to(weight) - 1)
        if controlled_mean > 0 and controlled_error < std_error:
            mean, std_error = controlled_mean, controlled_error
    return LogNormalizer(scale + math.log(mean), std_error / mean, fraction)


def _mean_and_std_error(weight: torch.Tensor, controls: torch.Tensor) -> tuple[float, float]:
    """Regress the weights on controls of expectation zero, shape (n, J); return the intercept and its error."""
    design = torch.cat([torch.ones_like(weight).unsqueeze(-1), controls], dim=-1)
    # Components that are all but equal differ at a few draws alone, which would decide the fit: their differences are
    # left out, and what they might explain stays in the residuals. Not every driver can do that.
    coefficients = torch.linalg.lstsq(design, weight.unsqueeze(-1), rcond=_MIN_SINGULAR_VALUE, driver="gelsd").solution
    residual = weight - (design @ coefficients).squeeze(-1)
    n, n_fitted = design.shape
    return float(coefficients[0]), math.sqrt(float(residual.square().sum()) / ((n - n_fitted) * n))
