"""Shares of known densities in a mixture, by maximum likelihood."""

import torch

_MAX_ITER = 2000
_TOL = 1e-9


def mixture_shares(log_density: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Maximise the weighted mean of ``log sum_c a_c p_c(row)`` over the simplex by EM, a concave problem.

    Over densities scored on rows they have not seen, this is stacking.

    Parameters
    ----------
    log_density : tensor of shape (C, n)
        Log density (nats) of each row under each density; -inf where a density is zero, but not under all.
    weight : tensor of shape (n,)
        Non-negative row weights.

    Returns
    -------
    tensor of shape (C,)
        Shares in float64, non-negative with sum one.

    References
    ----------
    P. Smyth, D. Wolpert, "Linearly combining density estimators via stacking", Machine Learning 36, 1999;
    M. Saerens, P. Latinne, C. Decaestecker, "Adjusting the outputs of a classifier to new a priori probabilities",
    Neural Computation 14, 2002.
    """
    # A row counts only by the ratios of its densities, so each row is scaled by its largest.
    density = (log_density.double() - log_density.double().amax(0)).exp()
    weight = weight.double() / weight.double().sum()
    share = torch.full((len(density),), 1 / len(density), dtype=torch.float64, device=weight.device)
    for _ in range(_MAX_ITER):
        previous = share
        share = share * (density @ (weight / (share @ density)))
        if float((share - previous).abs().max()) < _TOL:
            break
    return share / share.sum()
