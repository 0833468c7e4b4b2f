"""Importance sampling: log Z with its standard error, and the effective sample size of log weights."""

import math
from typing import NamedTuple

import torch


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


def estimate_log_normalizer(log_weight: torch.Tensor) -> LogNormalizer:
    """Estimate log Z = log E[w] from importance weights w = p_unnormalised / proposal.

    Parameters
    ----------
    log_weight : tensor of shape (n,)
        Log importance weights (nats) of independent proposals.

    Returns
    -------
    LogNormalizer
        The standard error is that of the mean weight carried to the log by the delta method.
    """
    n = log_weight.shape[-1]
    fraction = float(effective_sample_size(log_weight))
    value = float(log_weight.cpu().double().logsumexp(-1)) - math.log(n)
    # var(mean w) / (mean w)^2 = (1 / ESS fraction - 1) / (n - 1)
    std_error = math.sqrt(max(1 / fraction - 1, 0.0) / (n - 1)) if fraction > 0 and n > 1 else math.inf
    return LogNormalizer(value, std_error, fraction)
