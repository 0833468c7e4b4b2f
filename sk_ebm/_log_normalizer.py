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
    return estimate_log_normalizers(log_weight.unsqueeze(0), controls)[0]


def estimate_log_normalizers(log_weights: torch.Tensor, controls: torch.Tensor | None = None) -> list[LogNormalizer]:
    """Estimate several log Z as `estimate_log_normalizer` does, from weights (m, n) of the same proposals."""
    n = log_weights.shape[-1]
    log_weights = log_weights.cpu().double()
    largest = log_weights.amax(-1, keepdim=True)
    # Where no weight is positive there is nothing to regress.
    weights = (log_weights - largest).exp().nan_to_num(nan=0.0)
    means, std_errors = _means_and_std_errors(weights, weights.new_empty(n, 0))
    if controls is not None and n > _MIN_DRAWS_PER_CONTROL * len(controls):
        controlled_means, controlled_errors = _means_and_std_errors(weights, controls.T.to(weights) - 1)
        is_better = (controlled_means > 0) & (controlled_errors < std_errors)
        means, std_errors = (
            torch.where(is_better, controlled, plain)
            for controlled, plain in ((controlled_means, means), (controlled_errors, std_errors))
        )
    fractions = effective_sample_size(log_weights)
    is_known = (fractions > 0) & (n > 1)
    values = largest.squeeze(-1) + torch.where(is_known, means, 1.0).log()
    std_errors = torch.where(is_known, std_errors / means, math.inf)
    return [LogNormalizer(*of_one) for of_one in torch.stack([values, std_errors, fractions], dim=-1).tolist()]


def _means_and_std_errors(weights: torch.Tensor, controls: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Regress weights (m, n) on controls of expectation zero, (n, J); return the intercepts and their errors, (m,)."""
    n, n_controls = controls.shape
    design = torch.cat([controls.new_ones(n, 1), controls], dim=-1)
    # Components that are all but equal differ at a few draws alone, which would decide the fit: their differences are
    # left out, and what they might explain stays in the residuals. Not every driver can do that.
    coefficients = torch.linalg.lstsq(design, weights.T, rcond=_MIN_SINGULAR_VALUE, driver="gelsd").solution
    variance = (weights.T - design @ coefficients).square().sum(0) / (n - 1 - n_controls)
    return coefficients[0], (variance / n).sqrt()
