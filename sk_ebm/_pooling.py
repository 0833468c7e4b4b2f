"""Logarithmic opinion pool: the shares of candidate densities that make held-out rows most likely."""

import torch

_N_STEPS = 300
_STEP_SIZE = 0.5


def pooling_shares(
    held_out: torch.Tensor, held_out_weight: torch.Tensor, pool: torch.Tensor, log_proposal: torch.Tensor
) -> torch.Tensor:
    """Maximise the held-out log-likelihood of the pool ``log p = sum_c a_c log p_c - log Z(a)`` over the simplex.

    The objective is concave, so exponentiated-gradient steps from equal shares find its maximum.

    Parameters
    ----------
    held_out : tensor of shape (C, K, n)
        Log density (nats) of each row under member k of candidate c; only held-out rows carry weight.
    held_out_weight : tensor of shape (K, n)
        Weight of each row for the members that have not seen it, 0 elsewhere.
    pool : tensor of shape (C, K, m)
        Log density of common proposals.
    log_proposal : tensor of shape (m,)
        Log density of the proposals under the law they were drawn from.

    Returns
    -------
    tensor of shape (C,)
        Shares, non-negative with sum one.

    References
    ----------
    T. Heskes, "Selecting weighting factors in logarithmic opinion pools", NeurIPS 1997.
    """
    held_out, pool, log_proposal = held_out.double(), pool.double(), log_proposal.double()
    member_weight = held_out_weight.double().sum(-1)
    member_weight = member_weight / member_weight.sum()
    data_mean = torch.einsum("ckn,kn->c", held_out, held_out_weight.double()) / held_out_weight.double().sum()
    log_share = torch.full((len(held_out),), 1.0 / len(held_out), dtype=torch.float64).log()
    for step in range(_N_STEPS):
        log_weight = torch.einsum("c,ckm->km", log_share.exp(), pool) - log_proposal
        model_mean = torch.einsum("ckm,km,k->c", pool, log_weight.softmax(-1), member_weight)
        log_share = (log_share + _STEP_SIZE / (1 + step / 50) * (data_mean - model_mean)).log_softmax(0)
    return log_share.exp()
