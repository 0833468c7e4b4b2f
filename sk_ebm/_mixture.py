"""Gaussian mixtures, fitted by weighted EM: many at once, on the same rows with different weights.

A row of weight 2 counts twice, a row of weight 0 not at all.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from sk_ebm._types import Density

COVARIANCE_TYPES = ("full", "tied", "diag", "tied_diag", "spherical", "tied_spherical")
_MAX_ITER = 200
_KMEANS_RUNS = 4
_KMEANS_ITER = 10
_MIN_VARIANCE = 1e-6
# Rows that a component without any is taken to have at the overall mean.
_LOST_COUNT = 1e-3
# Memory: how many values of the quadratic features are held at once.
_MAX_FEATURE_VALUES = 20_000_000
# What is held at once for every component of every mixture: few enough values to stay in the cache of a processor.
_MAX_VALUES = 2**17
# Rows times components of all mixtures, from which on it saves time to leave out of a step of EM the mixtures that have
# stopped climbing.
_MIN_VALUES_TO_LEAVE_OUT = 1_500_000
# Rows that starts are compared on: with more of them, what matters is the number of rows that EM ends with.
MAX_START_ROWS = 8000
# Pseudo-counts of the prior that pulls every covariance a little towards a sphere: fits stay positive
# definite with fewer rows than features.
PRIOR_COUNT = 1.0


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
    offsets: torch.Tensor
    log_constants: torch.Tensor

    def __init__(self, log_proportions: torch.Tensor, means: torch.Tensor, scale_trils: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("log_proportions", log_proportions)
        self.register_buffer("means", means)
        self.register_buffer("scale_trils", scale_trils)
        self.register_buffer("whiteners", inverse_tril(scale_trils))
        # What does not depend on the rows, in the shapes that `component_log_prob` needs.
        d = means.shape[-1]
        log_det = self.whiteners.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_constants = log_proportions + log_det - 0.5 * d * math.log(2 * math.pi)
        self.register_buffer("offsets", (self.whiteners @ means.unsqueeze(-1)).reshape(-1, 1))
        self.register_buffer("log_constants", log_constants.unsqueeze(-1))

    def component_log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return log(proportion) + log density (nats) of each row under each component, shape (k, n)."""
        n_components, d = self.means.shape
        # W (z - mean) for all components in one matrix product, with rows last: sums over features and components then
        # run along whole vectors.
        scaled = torch.addmm(self.offsets, self.whiteners.flatten(0, 1), z.T, beta=-1)
        squared_distance = scaled.square().reshape(n_components, d, len(z)).sum(1)
        return torch.add(self.log_constants, squared_distance, alpha=-0.5)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return the normalised log density (nats) of each row, shape (n,)."""
        return self.component_log_prob(z).logsumexp(0)

    def pushed_forward(self, matrix: torch.Tensor) -> "Mixture":
        """Return the density of ``z @ matrix``, which may have fewer features than z."""
        factors = matrix.T @ self.scale_trils
        return Mixture(self.log_proportions, self.means @ matrix, cholesky(factors @ factors.mT))

    def pulled_back(self, matrix: torch.Tensor) -> "Mixture":
        """Return the density of z when this one is the density of ``z @ matrix``."""
        return self.pushed_forward(torch.linalg.inv(matrix))

    def sample(self, n_samples: int, generator: torch.Generator) -> torch.Tensor:
        """Draw `n_samples` rows."""
        component = torch.multinomial(self.log_proportions.exp(), n_samples, replacement=True, generator=generator)
        noise = torch.randn(
            n_samples, self.means.shape[-1], generator=generator, device=self.means.device, dtype=self.means.dtype
        )
        order = component.argsort(stable=True)
        # The rows of each component together: a device is asked how many there are only once.
        counts = component.bincount(minlength=len(self.means)).tolist()
        z = torch.empty_like(noise)
        for k, rows in enumerate(order.split(counts)):
            z[rows] = self.means[k] + noise[rows] @ self.scale_trils[k].T
        return z


def mixture_of_mixtures(mixtures: Sequence[Mixture], shares: torch.Tensor) -> Mixture:
    """Return the mixture that draws from each of the given ones with its share."""
    log_proportions = [mixture.log_proportions + share.log() for mixture, share in zip(mixtures, shares, strict=True)]
    return Mixture(
        torch.cat(log_proportions),
        torch.cat([mixture.means for mixture in mixtures]),
        torch.cat([mixture.scale_trils for mixture in mixtures]),
    )


def fit_gaussian(z: torch.Tensor, weight: torch.Tensor) -> Mixture:
    """Fit one full-covariance Gaussian by weighted maximum a posteriori."""
    total, d = weight.sum(), z.shape[1]
    mean = (weight @ z) / total
    scatter = (weight.unsqueeze(-1) * (z - mean)).T @ (z - mean)
    sphere = (scatter.diagonal().mean() / total).clamp(min=_MIN_VARIANCE) * torch.eye(d, dtype=z.dtype, device=z.device)
    covariance = (scatter + PRIOR_COUNT * sphere) / (total + PRIOR_COUNT)
    return Mixture(mean.new_zeros(1), mean[None], cholesky(covariance)[None])


def fit_mixtures(
    z: torch.Tensor,
    weight: torch.Tensor,
    n_components: int,
    *,
    covariance_type: str,
    generator: torch.Generator,
    prior_count: float = PRIOR_COUNT,
    n_runs: int = 1,
    tol: float = 1e-4,
    labels: torch.Tensor | None = None,
) -> list[Mixture]:
    """Fit one Gaussian mixture per set of weights by EM from k-means++ starts.

    Parameters
    ----------
    z : tensor of shape (n, d)
        Rows.
    weight : tensor of shape (B, n)
        Non-negative row weights of each mixture.
    n_components : int
        Number of components.
    covariance_type : one of COVARIANCE_TYPES
        Shape of the component covariances; "tied" ones are the same for every component.
    generator : torch.Generator
        Source of randomness.
    prior_count : float
        Rows that the prior of each covariance counts for: the fewer, the narrower a component may become.
    n_runs : int
        Starts per mixture, of which the likeliest fit is kept: EM has local optima. With very many rows they are fitted
        to the first ones, and EM goes on from the likeliest with all.
    tol : float
        EM stops when the mean log-likelihood (nats) of every fit gains less than this; where a step is large, that of
        each fit as soon as its own does.
    labels : tensor of shape (B * n_runs, n), default=None
        Components of the rows to start from, of the first `MAX_START_ROWS` if there are more, as `kmeans_labels` finds
        them; None finds them here.

    Returns
    -------
    list of B Mixture
    """
    first, first_weight = z[:MAX_START_ROWS], weight[:, :MAX_START_ROWS]
    runs = _BatchedEM(first, first_weight.repeat_interleave(n_runs, 0), n_components, covariance_type, prior_count)
    if labels is None:
        labels = kmeans_labels(first, runs.weight, n_components, generator)
    runs.start_from(labels)
    log_likelihood = runs.climb(tol)
    best = log_likelihood.reshape(-1, n_runs).argmax(-1) + n_runs * torch.arange(len(weight), device=z.device)
    parameters = [part[best] for part in runs.parameters()]
    if len(z) > MAX_START_ROWS:
        em = _BatchedEM(z, weight, n_components, covariance_type, prior_count)
        em.log_proportions, em.means, em.scale_trils = parameters
        em.climb(tol)
        parameters = em.parameters()
    return [Mixture(*of_one) for of_one in zip(*parameters, strict=True)]


class _BatchedEM:
    """EM on B mixtures of k components at once.

    A Gaussian's log density is linear in the features (z_i z_j, z, 1), and its moments are weighted sums of
    them: both steps are one matrix product for all mixtures and components.
    """

    def __init__(
        self, z: torch.Tensor, weight: torch.Tensor, n_components: int, covariance_type: str, prior_count: float
    ) -> None:
        self.z, self.weight, self.n_components, self.covariance_type = z, weight, n_components, covariance_type
        self.prior_count = prior_count
        self.total = weight.sum(-1)
        self.has_products = covariance_type in ("full", "tied")
        d = z.shape[1]
        index = torch.triu_indices(d, d, device=z.device) if self.has_products else torch.arange(d).expand(2, d)
        self.row, self.column = index[0].to(z.device), index[1].to(z.device)
        fits_in_memory = len(z) * (len(self.row) + d + 1) <= _MAX_FEATURE_VALUES
        self.all_features = self._features(z) if fits_in_memory else None

    def start_from(self, labels: torch.Tensor) -> None:
        """Fit each component to the rows of its label, given labels (B, n)."""
        self._maximise(self._moments_of(labels))

    def parameters(self) -> list[torch.Tensor]:
        """Return the log proportions, means and factors of the covariances, (B, k, ...)."""
        return [self.log_proportions, self.means, self.scale_trils]

    def climb(self, tol: float) -> torch.Tensor:
        """Iterate from the parameters as they are; return the mean log-likelihoods (B,)."""
        weight, total, parameters = self.weight, self.total, self.parameters()
        climbing = torch.arange(len(weight), device=self.z.device)
        reached = self.z.new_full((len(weight),), -math.inf)
        leaves_out = self.n_components * weight.numel() >= _MIN_VALUES_TO_LEAVE_OUT
        for _ in range(_MAX_ITER):
            moments, log_likelihood = self._expect()
            climbs = ~(log_likelihood - reached[climbing] < tol)
            reached[climbing] = log_likelihood
            if not bool(climbs.any()):
                break
            if leaves_out and not bool(climbs.all()):
                self._put_into(parameters, climbing)
                climbing, moments = climbing[climbs], moments[climbs]
                self.weight, self.total = self.weight[climbs], self.total[climbs]
            self._maximise(moments)
        if len(climbing) < len(weight):
            self._put_into(parameters, climbing)
            self.weight, self.total = weight, total
            self.log_proportions, self.means, self.scale_trils = parameters
        return reached

    def _put_into(self, parameters: list[torch.Tensor], climbing: torch.Tensor) -> None:
        """Write the parameters of the mixtures that still climb to their places among those of all."""
        for whole, part in zip(parameters, self.parameters(), strict=True):
            whole[climbing] = part

    def _features(self, z: torch.Tensor) -> torch.Tensor:
        return torch.cat([z[:, self.row] * z[:, self.column], z, torch.ones_like(z[:, :1])], dim=1)

    def _moments_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the summed features (B, k, F) of the rows of each label."""
        moments = self.z.new_zeros(())
        component = torch.arange(self.n_components, device=self.z.device).unsqueeze(-1)
        for features, weight, label in self._chunks(labels):
            mass = torch.where(label.unsqueeze(1) == component, weight.unsqueeze(1), 0.0)
            moments = moments + (mass.flatten(0, 1) @ features)
        return moments.reshape(len(self.weight), self.n_components, -1)

    def _expect(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed features (B, k, F) weighted by responsibility, and the mean log-likelihoods (B,)."""
        coefficients = self._coefficients()
        moments, log_likelihood = self.z.new_zeros(()), self.z.new_zeros(())
        for features, weight, _ in self._chunks(self.weight):
            joint = (coefficients @ features.T).reshape(len(weight), self.n_components, -1)
            # The exponentials are most of the work, so the same ones serve the sum and the responsibilities.
            highest = joint.amax(1)
            density = joint.sub_(highest.unsqueeze(1)).exp_()
            total = density.sum(1)
            log_likelihood = log_likelihood + (weight * (highest + total.log())).sum(-1)
            mass = density.mul_((weight / total).unsqueeze(1))
            moments = moments + (mass.flatten(0, 1) @ features)
        return moments.reshape(len(self.weight), self.n_components, -1), log_likelihood / self.total

    def _chunks(self, extra: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield the features of some rows, their weights and what else belongs to them."""
        size = _chunk_size(len(self.weight) * self.n_components)
        for start in range(0, len(self.z), size):
            rows = slice(start, start + size)
            features = self._features(self.z[rows]) if self.all_features is None else self.all_features[rows]
            yield features, self.weight[:, rows], extra[:, rows]

    def _coefficients(self) -> torch.Tensor:
        """Return log(proportion) + log density of every component as coefficients (B k, F) of the features."""
        d = self.z.shape[1]
        whitener = inverse_tril(self.scale_trils)
        precision = whitener.mT @ whitener
        linear = (precision @ self.means.unsqueeze(-1)).squeeze(-1)
        is_square = (self.row == self.column).to(precision)
        quadratic = precision[..., self.row, self.column] * (0.5 * is_square - 1)
        constant = self.log_proportions + whitener.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = constant - 0.5 * ((linear * self.means).sum(-1) + d * math.log(2 * math.pi))
        return torch.cat([quadratic, linear, constant.unsqueeze(-1)], dim=-1).flatten(0, 1)

    def _maximise(self, moments: torch.Tensor) -> None:
        """Set the parameters to those that the summed features (B, k, F) make most likely."""
        d = self.z.shape[1]
        second, first, counts = moments[..., : len(self.row)], moments[..., len(self.row) : -1], moments[..., -1:]
        overall_mean = first.sum(1, keepdim=True) / self.total.reshape(-1, 1, 1)
        # A component that lost its rows falls back on the overall mean and the pooled covariance.
        self.means = (first + _LOST_COUNT * overall_mean) / (counts + _LOST_COUNT)
        self.log_proportions = ((counts + _LOST_COUNT) / (counts + _LOST_COUNT).sum(1, keepdim=True)).log().squeeze(-1)
        products = second.new_zeros(*second.shape[:2], d, d)
        products[..., self.row, self.column] = second
        products[..., self.column, self.row] = second
        cross = self.means.unsqueeze(-1) * first.unsqueeze(-2)
        outer = self.means.unsqueeze(-1) * self.means.unsqueeze(-2)
        scatter = products - cross - cross.mT + counts.unsqueeze(-1) * outer
        if not self.has_products:
            scatter = torch.diag_embed(scatter.diagonal(dim1=-2, dim2=-1))
        self.scale_trils = cholesky(self._covariances(scatter, counts.unsqueeze(-1)))

    def _covariances(self, scatter: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Return the covariances (B, k, d, d), pulled a little to the pooled one, in the shape of their type."""
        eye = torch.eye(scatter.shape[-1], dtype=scatter.dtype, device=scatter.device)
        total = self.total.reshape(-1, 1, 1, 1)
        within = scatter.sum(1, keepdim=True)
        sphere = (_mean_diagonal(within) / total).clamp(min=_MIN_VARIANCE) * eye
        pooled = (within + self.prior_count * sphere) / (total + self.prior_count)
        if self.covariance_type.startswith("tied"):
            covariances = pooled.expand_as(scatter)
        else:
            covariances = (scatter + self.prior_count * pooled) / (counts + self.prior_count)
        if self.covariance_type.endswith("spherical"):
            covariances = _mean_diagonal(covariances) * eye
        return covariances


def kmeans_labels(z: torch.Tensor, weight: torch.Tensor, n_components: int, generator: torch.Generator) -> torch.Tensor:
    """Return labels (B, n) of the best of a few k-means runs for each set of weights (B, n)."""
    if n_components == 1:
        return torch.zeros(weight.shape, dtype=torch.long, device=z.device)
    runs = weight.repeat_interleave(_KMEANS_RUNS, 0)
    center = _kmeans_plus_plus(z, runs, n_components, generator)
    features = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
    size = _chunk_size(len(runs) * n_components)
    chunks = list(zip(features.split(size), runs.split(size, dim=1), strict=True))
    for _ in range(_KMEANS_ITER):
        moments = z.new_zeros(())
        for part, run_weight in chunks:
            closeness = _closeness(part, center)
            is_nearest = closeness == closeness.amax(1, keepdim=True)
            moments = moments + torch.where(is_nearest, run_weight.unsqueeze(1), 0.0) @ part
        counts = moments[..., -1:]
        center = torch.where(counts > 0, moments[..., :-1] / counts.clamp(min=1e-12), center)
    nearest = [_closeness(part, center).max(1) for part, _ in chunks]
    closeness, label = (torch.cat(parts, dim=-1) for parts in zip(*nearest, strict=True))
    inertia = (runs * (z.square().sum(-1) - 2 * closeness)).sum(-1)
    best = inertia.reshape(-1, _KMEANS_RUNS).argmin(-1) + _KMEANS_RUNS * torch.arange(len(weight), device=z.device)
    return label[best]


def _closeness(features: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """Return half the squared norm of each row less half its squared distance to the centers (B, k, d): (B, k, n).

    The features of a row are itself and a one.
    """
    return torch.cat([center, -0.5 * center.square().sum(-1, keepdim=True)], dim=-1) @ features.T


def _chunk_size(n_values: int) -> int:
    """Return how many rows to treat at once when each takes so many values."""
    return max(1, _MAX_VALUES // n_values)


def _kmeans_plus_plus(
    z: torch.Tensor, weight: torch.Tensor, n_components: int, generator: torch.Generator
) -> torch.Tensor:
    """Choose centers (B, k, d) greedily: of a few rows drawn by squared distance, the one that helps most."""
    n_trials = 2 + int(math.log(n_components))
    square = z.square().sum(-1)
    distance = torch.ones_like(weight)
    centers: list[torch.Tensor] = []
    for _ in range(n_components):
        probability = weight * distance
        probability = torch.where(probability.sum(-1, keepdim=True) > 0, probability, weight)
        index = torch.multinomial(probability, n_trials, replacement=True, generator=generator)
        trials = z[index]
        to_trial = (square - 2 * (trials @ z.T) + square[index].unsqueeze(-1)).clamp(min=0)
        distances = torch.minimum(distance.unsqueeze(1), to_trial) if centers else to_trial
        best = (weight.unsqueeze(1) * distances).sum(-1).argmin(-1)
        pick = torch.arange(len(weight), device=z.device), best
        centers.append(trials[pick])
        distance = distances[pick]
    return torch.stack(centers, dim=1)


def _mean_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return the mean of the diagonal, kept as two dimensions of one."""
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def inverse_tril(factor: torch.Tensor) -> torch.Tensor:
    """Invert lower triangular matrices."""
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
    return torch.linalg.solve_triangular(factor, identity, upper=False)


def cholesky(covariance: torch.Tensor) -> torch.Tensor:
    """Cholesky factor of a covariance whose smallest eigenvalues rounding may have made negative."""
    diagonal = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    for jitter in (1e-9, 1e-6, 1e-4, 1e-2):
        factor, info = torch.linalg.cholesky_ex(covariance + jitter * diagonal * eye)
        if not bool(info.any()):
            return factor
    return torch.linalg.cholesky(torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1)))
