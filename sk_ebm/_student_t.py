"""Multivariate Student t base: heavy tails in every direction."""

import math

import torch

from sk_ebm._mixture import MAX_START_ROWS, cholesky
from sk_ebm._types import Density

_MAX_ITER = 200
_TOL = 1e-4
# Pseudo-rows that pull the scale towards a sphere.
_PRIOR_COUNT = 1.0
_DF_GRID = (1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 30.0)


class StudentT(Density):
    """Multivariate Student t density.

    Parameters
    ----------
    mean : tensor of shape (d,)
        Location.
    scale_tril : tensor of shape (d, d)
        Lower Cholesky factor of the scale matrix.
    df : float
        Degrees of freedom.
    """

    mean: torch.Tensor
    scale_tril: torch.Tensor

    def __init__(self, mean: torch.Tensor, scale_tril: torch.Tensor, df: float) -> None:
        super().__init__()
        self.df = df
        self.register_buffer("mean", mean)
        self.register_buffer("scale_tril", scale_tril)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return the normalised log density (nats) of each row, shape (n,)."""
        d, df = len(self.mean), self.df
        distance = _squared_distance(z, self.mean, self.scale_tril)
        log_constant = math.lgamma((df + d) / 2) - math.lgamma(df / 2) - d / 2 * math.log(df * math.pi)
        log_det = self.scale_tril.diagonal().log().sum()
        return log_constant - log_det - (df + d) / 2 * torch.log1p(distance / df)

    def sample(self, n_samples: int, generator: torch.Generator) -> torch.Tensor:
        """Draw `n_samples` rows."""
        noise = torch.randn(
            n_samples, len(self.mean), generator=generator, device=self.mean.device, dtype=self.mean.dtype
        )
        shape = noise.new_full((n_samples,), self.df / 2)
        chi2 = 2 * torch._standard_gamma(shape, generator=generator)
        return self.mean + (noise @ self.scale_tril.T) * (self.df / chi2).sqrt().unsqueeze(-1)


def fit_student_t(z: torch.Tensor, weight: torch.Tensor) -> StudentT:
    """Fit a multivariate Student t by weighted EM, its degrees of freedom by likelihood on a grid."""
    first, first_weight = z[:MAX_START_ROWS], weight[:MAX_START_ROWS]
    fits = [_fit_student_t_given_df(first, first_weight, df) for df in _DF_GRID]
    best = max(fits, key=lambda fit: float((first_weight * fit.log_prob(first)).sum()))
    return best if len(z) <= MAX_START_ROWS else _fit_student_t_given_df(z, weight, best.df)


def _fit_student_t_given_df(z: torch.Tensor, weight: torch.Tensor, df: float) -> StudentT:
    n_features = z.shape[1]
    precision_weight = torch.ones_like(weight)
    total = weight.sum()
    previous = -math.inf
    for _ in range(_MAX_ITER):
        mass = weight * precision_weight
        mean = (mass @ z) / mass.sum()
        scatter = (mass.unsqueeze(-1) * (z - mean)).T @ (z - mean)
        sphere = (scatter.diagonal().mean() / total).clamp(min=1e-6)
        eye = torch.eye(n_features, dtype=z.dtype, device=z.device)
        fit = StudentT(mean, cholesky((scatter + _PRIOR_COUNT * sphere * eye) / (total + _PRIOR_COUNT)), df)
        mean_log_prob = float((weight * fit.log_prob(z)).sum() / total)
        if mean_log_prob - previous < _TOL:
            break
        previous = mean_log_prob
        distance = _squared_distance(z, fit.mean, fit.scale_tril)
        precision_weight = (df + n_features) / (df + distance)
    return fit


def _squared_distance(z: torch.Tensor, mean: torch.Tensor, scale_tril: torch.Tensor) -> torch.Tensor:
    """Squared Mahalanobis distance of each row from `mean`."""
    return torch.linalg.solve_triangular(scale_tril, (z - mean).T, upper=False).square().sum(0)
