"""Stacking: the shares of candidate densities in a mixture that makes held-out rows most likely."""

import torch

_N_ITER = 500


def stacking_shares(held_out: torch.Tensor, held_out_weight: torch.Tensor) -> torch.Tensor:
    """Maximise the weighted mean of ``log sum_c a_c p_c(row)`` over the simplex by EM, a concave problem.

    Parameters
    ----------
    held_out : tensor of shape (C, K, n)
        Normalised log density (nats) of each row under member k of candidate c.
    held_out_weight : tensor of shape (K, n)
        Weight of each row for the members that have not seen it, 0 elsewhere.

    Returns
    -------
    tensor of shape (C,)
        Shares, non-negative with sum one.

    References
    ----------
    P. Smyth, D. Wolpert, "Linearly combining density estimators via stacking", Machine Learning 36, 1999.
    """
    is_held_out = held_out_weight > 0
    log_density = held_out[:, is_held_out].double()
    weight = held_out_weight[is_held_out].double()
    log_share = torch.full((len(log_density),), 1 / len(log_density), dtype=torch.float64, device=weight.device).log()
    for _ in range(_N_ITER):
        responsibility = (log_share.unsqueeze(-1) + log_density).softmax(0)
        log_share = ((responsibility @ weight) / weight.sum()).log()
    return log_share.exp()
