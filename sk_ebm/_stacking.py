"""Shares of known densities in a mixture, by maximum likelihood."""

import math

import torch

_MAX_ITER = 2000
# Nats by which the likelihood of all rows together may fall short of its maximum.
_MAX_SHORTFALL = 1e-6
# Smaller shares are not worth the time that scoring their candidate takes.
_MIN_SHARE = 0.1


def mixture_shares(log_density: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Maximise the weighted mean of ``log sum_c a_c p_c(row)`` over the simplex, a concave problem.

    EM steps are extrapolated, because plain EM all but stops long before the maximum where densities overlap.

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
    Neural Computation 14, 2002;
    R. Varadhan, C. Roland, "Simple and globally convergent methods for accelerating the convergence of any EM
    algorithm", Scandinavian Journal of Statistics 35, 2008.
    """
    # A row counts only by the ratios of its densities, so each row is scaled by its largest.
    density = (log_density.double() - log_density.double().amax(0)).exp()
    weight = weight.double() / weight.double().sum()
    share = torch.full((len(density),), 1 / len(density), dtype=torch.float64, device=weight.device)

    def gain(share: torch.Tensor) -> torch.Tensor:
        """Factor by which EM multiplies each share, the gradient of the mean log-likelihood."""
        return density @ (weight / (share @ density))

    for _ in range(_MAX_ITER):
        first_gain = gain(share)
        # Concavity bounds what is left to gain by the largest slope towards a vertex of the simplex.
        if float(first_gain.max() - 1) * density.shape[1] < _MAX_SHORTFALL:
            break
        once = share * first_gain
        twice = once * gain(once)
        step, curvature = once - share, twice - 2 * once + share
        length = (step.norm() / curvature.norm().clamp(min=1e-300)).clamp(min=1.0)
        trial = share + 2 * length * step + length.square() * curvature
        # EM never brings a share back from zero.
        trial = torch.where(trial > 0, trial, twice)
        trial = trial / trial.sum()
        is_better = weight @ (trial @ density).log() > weight @ (twice @ density).log()
        share = trial if bool(is_better) else twice
    return share / share.sum()


def stacking_shares(held_out: torch.Tensor, weight: torch.Tensor, is_covered: torch.Tensor) -> list[float]:
    """Return each candidate's share of a pool that makes rows most likely that no candidate has seen.

    A candidate whose proposals miss some of its mass gets no share if there is another: its log Z is too low, which
    flatters it.

    Parameters
    ----------
    held_out : tensor of shape (C, n)
        Log density (nats) of each row under each candidate; nan where a row was seen.
    weight : tensor of shape (n,)
        Non-negative row weights.
    is_covered : tensor of shape (C,)
        Whether the proposals cover the candidate.
    """
    is_covered = is_covered if is_covered.any() else ~is_covered
    is_held_out = held_out[is_covered].isfinite().all(0)
    log_density = torch.where(is_covered.unsqueeze(-1), held_out, -math.inf)[:, is_held_out]
    shares = mixture_shares(log_density, weight[is_held_out])
    shares = torch.where(shares < _MIN_SHARE, 0.0, shares)
    return [float(share) for share in shares / shares.sum()]
