"""Base densities q0, normalised and with sane tails: Gaussian mixtures (one component included) and Student t.

Fits are weighted: a row of weight 2 counts twice, a row of weight 0 not at all.
"""

import math

import torch
from torch import nn

from sk_ebm._types import Density

COVARIANCE_TYPES = ("full", "tied", "diag", "tied_diag", "spherical", "tied_spherical")
_MAX_ITER = 200
_TOL = 1e-4
_KMEANS_RUNS = 4
# Pseudo-counts of the prior that pulls every covariance a little towards a sphere: fits stay positive
# definite with fewer rows than features.
_PRIOR_COUNT = 1.0


class Mixture(Density):
    """Mixture of Gaussians with full Cholesky factors; one component is a plain Gaussian.

    Parameters
    ----------
    log_proportions : tensor of shape (k,)
        Logarithms of the mixture proportions.
    means : tensor of shape (k, d)
        Component means.
    scale_trils : tensor of shape (k, d, d)
        Lower Cholesky factors of the component covariances.
    """

    log_proportions: torch.Tensor
    means: torch.Tensor
    scale_trils: torch.Tensor
    whiteners: torch.Tensor

    def __init__(self, log_proportions: torch.Tensor, means: torch.Tensor, scale_trils: torch.Tensor) -> None:
        super().__init__()
        identity = torch.eye(means.shape[-1], dtype=means.dtype, device=means.device).expand_as(scale_trils)
        self.register_buffer("log_proportions", log_proportions)
        self.register_buffer("means", means)
        self.register_buffer("scale_trils", scale_trils)
        self.register_buffer("whiteners", torch.linalg.solve_triangular(scale_trils, identity, upper=False))

    def component_log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return log(proportion) + log density (nats) of each row under each component, shape (n, k)."""
        n_components, d = self.means.shape
        # (z - mean) W^T for all components in one matrix product: flattening to (n, k d) is fastest on CPU.
        whiteners = self.whiteners.reshape(n_components * d, d)
        offsets = (self.whiteners @ self.means.unsqueeze(-1)).reshape(n_components * d)
        scaled = (z @ whiteners.T - offsets).reshape(len(z), n_components, d)
        log_det = self.whiteners.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.log_proportions + log_det - 0.5 * (scaled.square().sum(-1) + d * math.log(2 * math.pi))

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return the normalised log density (nats) of each row, shape (n,)."""
        return self.component_log_prob(z).logsumexp(-1)

    def pulled_back(self, matrix: torch.Tensor) -> "Mixture":
        """Return the density of z when this one is the density of ``z @ matrix``."""
        inverse = torch.linalg.inv(matrix)
        factors = inverse.T @ self.scale_trils
        return Mixture(self.log_proportions, self.means @ inverse, _cholesky(factors @ factors.mT))

    def sample(self, n_samples: int, generator: torch.Generator) -> torch.Tensor:
        """Draw `n_samples` rows."""
        component = torch.multinomial(self.log_proportions.exp(), n_samples, replacement=True, generator=generator)
        noise = torch.randn(
            n_samples, self.means.shape[-1], generator=generator, device=self.means.device, dtype=self.means.dtype
        )
        z = torch.empty_like(noise)
        for k in range(len(self.means)):
            rows = component == k
            z[rows] = self.means[k] + noise[rows] @ self.scale_trils[k].T
        return z


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


def fit_gaussian(z: torch.Tensor, weight: torch.Tensor) -> Mixture:
    """Fit one full-covariance Gaussian by weighted maximum a posteriori."""
    responsibility = torch.ones(len(z), 1, dtype=z.dtype, device=z.device)
    return _mixture_m_step(z, weight, responsibility, "full", _PRIOR_COUNT)


def fit_student_t(z: torch.Tensor, weight: torch.Tensor) -> StudentT:
    """Fit a multivariate Student t by weighted EM, its degrees of freedom by likelihood on a grid."""
    fits = [_fit_student_t_given_df(z, weight, df) for df in (1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 30.0)]
    return max(fits, key=lambda fit: float((weight * fit.log_prob(z)).sum()))


def fit_mixture(
    z: torch.Tensor,
    weight: torch.Tensor,
    n_components: int,
    *,
    covariance_type: str,
    generator: torch.Generator,
    prior_count: float = _PRIOR_COUNT,
    tol: float = _TOL,
) -> Mixture:
    """Fit a Gaussian mixture by weighted EM from a k-means++ start.

    Parameters
    ----------
    z : tensor of shape (n, d)
        Rows.
    weight : tensor of shape (n,)
        Non-negative row weights.
    n_components : int
        Number of components.
    covariance_type : one of COVARIANCE_TYPES
        Shape of the component covariances; "tied" ones are the same for every component.
    generator : torch.Generator
        Source of randomness.
    prior_count : float
        Pseudo-rows that pull each covariance to the pooled within-component covariance.
    tol : float
        EM stops when the mean log-likelihood (nats) gains less than this.
    """
    mixture = _mixture_m_step(z, weight, _kmeans(z, weight, n_components, generator), covariance_type, prior_count)
    previous = -math.inf
    total = weight.sum()
    for _ in range(_MAX_ITER):
        joint = mixture.component_log_prob(z)
        log_prob = joint.logsumexp(-1, keepdim=True)
        mean_log_prob = float((weight * log_prob.squeeze(-1)).sum() / total)
        if mean_log_prob - previous < tol:
            break
        previous = mean_log_prob
        mixture = _mixture_m_step(z, weight, (joint - log_prob).exp(), covariance_type, prior_count)
    return mixture


def _mixture_m_step(
    z: torch.Tensor, weight: torch.Tensor, responsibility: torch.Tensor, covariance_type: str, prior_count: float
) -> Mixture:
    n_components, d = responsibility.shape[1], z.shape[1]
    mass = weight.unsqueeze(-1) * responsibility
    counts = mass.sum(0)
    overall_mean = (weight @ z) / weight.sum()
    # A component that lost its rows falls back on the overall mean and the pooled covariance.
    means = (mass.T @ z + 1e-3 * overall_mean) / (counts.unsqueeze(-1) + 1e-3)
    scatter = torch.stack([((mass[:, k : k + 1] * (z - means[k])).T @ (z - means[k])) for k in range(n_components)])
    eye = torch.eye(d, dtype=z.dtype, device=z.device)
    within = scatter.sum(0)
    sphere = (within.diagonal().mean() / counts.sum()).clamp(min=1e-6) * eye
    pooled = (within + _PRIOR_COUNT * sphere) / (counts.sum() + _PRIOR_COUNT)
    if covariance_type.startswith("tied"):
        covariances = pooled.expand(n_components, d, d)
    else:
        covariances = (scatter + prior_count * pooled) / (counts + prior_count).reshape(-1, 1, 1)
    if covariance_type.endswith("diag"):
        covariances = torch.diag_embed(covariances.diagonal(dim1=-2, dim2=-1))
    elif covariance_type.endswith("spherical"):
        covariances = covariances.diagonal(dim1=-2, dim2=-1).mean(-1).reshape(-1, 1, 1) * eye
    log_proportions = ((counts + 1e-3) / (counts + 1e-3).sum()).log()
    return Mixture(log_proportions, means, _cholesky(covariances))


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
        fit = StudentT(mean, _cholesky((scatter + _PRIOR_COUNT * sphere * eye) / (total + _PRIOR_COUNT)), df)
        mean_log_prob = float((weight * fit.log_prob(z)).sum() / total)
        if mean_log_prob - previous < _TOL:
            break
        previous = mean_log_prob
        distance = _squared_distance(z, fit.mean, fit.scale_tril)
        precision_weight = (df + n_features) / (df + distance)
    return fit


def _kmeans(z: torch.Tensor, weight: torch.Tensor, n_components: int, generator: torch.Generator) -> torch.Tensor:
    """Return hard responsibilities (n, k) of the best of a few k-means runs."""
    runs = [_kmeans_once(z, weight, n_components, generator) for _ in range(_KMEANS_RUNS if n_components > 1 else 1)]
    return min(runs, key=lambda run: run[1])[0]


def _kmeans_once(
    z: torch.Tensor, weight: torch.Tensor, n_components: int, generator: torch.Generator
) -> tuple[torch.Tensor, float]:
    """Run greedy k-means++ and ten Lloyd iterations; return hard responsibilities (n, k) and the inertia."""
    n_trials = 2 + int(math.log(n_components))
    distance = torch.full((len(z),), math.inf, dtype=z.dtype, device=z.device)
    centers: list[torch.Tensor] = []
    for _ in range(n_components):
        probability = weight * (distance if centers else torch.ones_like(distance))
        if float(probability.sum()) <= 0:
            probability = weight
        trials = z[torch.multinomial(probability, n_trials, replacement=True, generator=generator)]
        distances = torch.minimum(distance.unsqueeze(-1), torch.cdist(z, trials).square())
        best = (weight @ distances).argmin()
        centers.append(trials[best : best + 1])
        distance = distances[:, best]
    center = torch.cat(centers)
    for _ in range(10):
        label = torch.cdist(z, center).argmin(-1)
        mass = weight.unsqueeze(-1) * nn.functional.one_hot(label, n_components).to(z.dtype)
        counts = mass.sum(0).unsqueeze(-1)
        center = torch.where(counts > 0, (mass.T @ z) / counts.clamp(min=1e-12), center)
    inertia = weight @ torch.cdist(z, center).amin(-1).square()
    return nn.functional.one_hot(label, n_components).to(z.dtype), float(inertia)


def _cholesky(covariance: torch.Tensor) -> torch.Tensor:
    """Cholesky factor of a covariance whose smallest eigenvalues rounding may have made negative."""
    diagonal = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    for jitter in (1e-9, 1e-6, 1e-4, 1e-2):
        factor, info = torch.linalg.cholesky_ex(covariance + jitter * diagonal * eye)
        if not bool(info.any()):
            return factor
    return torch.linalg.cholesky(torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1)))


def _squared_distance(z: torch.Tensor, mean: torch.Tensor, scale_tril: torch.Tensor) -> torch.Tensor:
    """Squared Mahalanobis distance of each row from `mean`."""
    return torch.linalg.solve_triangular(scale_tril, (z - mean).T, upper=False).square().sum(0)
