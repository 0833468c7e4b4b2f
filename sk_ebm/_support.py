"""Feature map S: bijections from the user's features to whitened z-space, each with its log-Jacobian."""

import math
from typing import NamedTuple

import torch
from torch import nn

from sk_ebm._bounds import BoundsMap

_MAX_COMPONENTS = 6
_MAX_ITER = 200
# Narrowest component of a marginal mixture, in standard deviations of the feature: keeps ties from becoming spikes.
_MIN_SCALE = 0.03
_WIDE_SCALE = 2.0
# Sizes of a marginal mixture that may follow the best one without improvement.
_SIZE_PATIENCE = 2
_MAX_GROUPS = 1000
_N_BISECTIONS = 50
# Below it, the exponential comes too near to underflow.
_LEAST_LOG_P = -600.0
# Grid of normal scores on which the inverse of a margin is tabulated, and how it is mended between the knots.
_N_KNOTS, _LAST_KNOT, _N_NEWTON_STEPS, _MAX_ERROR = 1000, 6.0, 2, 1e-10


class FeatureMap(nn.Module):
    """Bijection S: optionally undo bounds, standardise, optionally send each margin to normal scores, then whiten.

    Parameters
    ----------
    shift, scale : tensor of shape (d,)
        Location and scale of each feature.
    margins : MarginalMap or None
        Map of each standardised feature to normal scores.
    mean : tensor of shape (d,)
        Mean before whitening.
    whitener : tensor of shape (d, d)
        Symmetric inverse square root of the correlation matrix: of all whitenings the one nearest to
        the identity, so axis-aligned structure stays axis-aligned.
    bounds : module, default=None
        Map of bounded features to the real line, before all else.
    """

    shift: torch.Tensor
    scale: torch.Tensor
    mean: torch.Tensor
    whitener: torch.Tensor
    unwhitener: torch.Tensor
    log_det: torch.Tensor

    def __init__(
        self,
        shift: torch.Tensor,
        scale: torch.Tensor,
        margins: "MarginalMap | None",
        mean: torch.Tensor,
        whitener: torch.Tensor,
        bounds: BoundsMap | None = None,
    ) -> None:
        super().__init__()
        self.margins = margins
        self.bounds = bounds
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self.register_buffer("mean", mean)
        self.register_buffer("whitener", whitener)
        self.register_buffer("unwhitener", torch.linalg.inv(whitener))
        self.register_buffer("log_det", torch.linalg.slogdet(whitener).logabsdet - scale.log().sum())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map x of shape (n, d) to z; also return log |det dz/dx| per row, -inf outside bounds, shape (n,)."""
        log_det = self.log_det.expand(len(x))
        if self.bounds is not None:
            x, log_det_bounds = self.bounds(x)
            log_det = log_det + log_det_bounds
        s = (x - self.shift) / self.scale
        if self.margins is not None:
            s, log_det_margins = self.margins(s)
            log_det = log_det + log_det_margins
        return (s - self.mean) @ self.whitener, log_det

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """Map z of shape (n, d) back to x."""
        s = z @ self.unwhitener + self.mean
        if self.margins is not None:
            s = self.margins.inverse(s)
        x = s * self.scale + self.shift
        return x if self.bounds is None else self.bounds.inverse(x)


class MarginalMap(nn.Module):
    """Send each feature to normal scores, z = Phi^-1(F(s)), F the CDF of its own small Gaussian mixture.

    Far outside the data the map is linear, so tails stay sane.

    Parameters
    ----------
    proportions, means, scales : tensor of shape (d, k)
        Mixture of each feature; unused components have proportion 0.
    """

    log_proportions: torch.Tensor
    means: torch.Tensor
    scales: torch.Tensor

    def __init__(self, proportions: torch.Tensor, means: torch.Tensor, scales: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("log_proportions", proportions.log())
        self.register_buffer("means", means)
        self.register_buffer("scales", scales)

    def forward(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map s of shape (n, d) to normal scores; also return the summed log derivative, shape (n,)."""
        z, log_slope = self._score_and_log_slope(s)
        return z, log_slope.sum(-1)

    def _score_and_log_slope(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the normal scores of s and the log derivative of each, both of shape (n, d)."""
        standardised = (s.unsqueeze(-1) - self.means) / self.scales
        log_cdf, log_sf = self._log_cdf_and_log_sf(standardised)
        z = _normal_quantile(torch.minimum(log_cdf, log_sf))
        z = torch.where(log_cdf < log_sf, z, -z)
        log_density = (self.log_proportions - self.scales.log() - 0.5 * standardised.square()).logsumexp(-1)
        return z, log_density + 0.5 * z.square()

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """Map normal scores back: look many up between neighbours on a grid, and mend that by Newton steps."""
        if len(z) <= _N_KNOTS:
            return self._inverse_by_bisection(z)
        knots = torch.linspace(-_LAST_KNOT, _LAST_KNOT, _N_KNOTS, dtype=z.dtype, device=z.device)
        values = self._inverse_by_bisection(knots.unsqueeze(-1).expand(-1, z.shape[1]))
        place = (z + _LAST_KNOT) * (_N_KNOTS - 1) / (2 * _LAST_KNOT)
        cell = place.floor().clamp(0, _N_KNOTS - 2)
        index = cell.long()
        low, high = values.gather(0, index), values.gather(0, index + 1)
        s = low + (place - cell) * (high - low)
        for _ in range(_N_NEWTON_STEPS):
            score, log_slope = self._score_and_log_slope(s)
            # The root lies between the neighbours, and a step that leaves them was taken on a bend.
            s = torch.minimum(torch.maximum(s + (z - score) * (-log_slope).exp(), low), high)
        error = (self._score_and_log_slope(s)[0] - z).abs()
        is_far = ~((error < _MAX_ERROR) & (z.abs() < _LAST_KNOT)).all(-1)
        s[is_far] = self._inverse_by_bisection(z[is_far])
        return s

    def _inverse_by_bisection(self, z: torch.Tensor) -> torch.Tensor:
        """Map normal scores back, by bisection between the quantiles of the components."""
        quantiles = self.means + self.scales * z.unsqueeze(-1)
        is_used = self.log_proportions > -math.inf
        low = quantiles.masked_fill(~is_used, math.inf).amin(-1)
        high = quantiles.masked_fill(~is_used, -math.inf).amax(-1)
        log_target = torch.special.log_ndtr(-z.abs())
        for _ in range(_N_BISECTIONS):
            middle = 0.5 * (low + high)
            log_cdf, log_sf = self._log_cdf_and_log_sf((middle.unsqueeze(-1) - self.means) / self.scales)
            # Compare in the nearer tail, where the logarithm keeps its precision.
            is_below = torch.where(z < 0, log_cdf < log_target, log_sf > log_target)
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        return 0.5 * (low + high)

    def _log_cdf_and_log_sf(self, standardised: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_cdf = (self.log_proportions + torch.special.log_ndtr(standardised)).logsumexp(-1)
        log_sf = (self.log_proportions + torch.special.log_ndtr(-standardised)).logsumexp(-1)
        return log_cdf, log_sf


def fit_feature_map(x: torch.Tensor, weight: torch.Tensor, *, use_margins: bool) -> FeatureMap:
    """Fit the feature map to weighted rows.

    Parameters
    ----------
    x : tensor of shape (n, d)
        Rows, float64; no feature may be constant.
    weight : tensor of shape (n,)
        Non-negative row weights.
    use_margins : bool
        Whether to send margins to normal scores.
    """
    total = weight.sum()
    shift = (weight @ x) / total
    scale = ((weight @ (x - shift).square()) / total).sqrt()
    # A feature may be constant over the rows of one fold.
    scale = torch.where(scale > 0, scale, 1.0)
    s = (x - shift) / scale
    margins = fit_marginal_map(s, weight) if use_margins else None
    if margins is not None:
        s = margins(s)[0]
    mean = (weight @ s) / total
    covariance = (weight.unsqueeze(-1) * (s - mean)).T @ (s - mean) / total
    return FeatureMap(shift, scale, margins, mean, _symmetric_whitener(covariance, float(total)))


def fit_marginal_map(s: torch.Tensor, weight: torch.Tensor) -> MarginalMap:
    """Fit a 1-D Gaussian mixture to every standardised feature by weighted EM, its size chosen by BIC."""
    groups, n_features, total = _group(s, weight), s.shape[1], float(weight.sum())
    best_bic = torch.full((n_features,), math.inf, dtype=s.dtype, device=s.device)
    best_size = torch.zeros(n_features, dtype=torch.long, device=s.device)
    shape = (n_features, _MAX_COMPONENTS)
    best = [torch.zeros(shape, dtype=s.dtype, device=s.device) for _ in range(2)]
    best.append(torch.ones(shape, dtype=s.dtype, device=s.device))
    for n_components in range(1, _MAX_COMPONENTS + 1):
        searched = (n_components - best_size <= _SIZE_PATIENCE).nonzero().squeeze(-1)
        if not len(searched):
            break
        fitted, log_likelihood = _fit_margins(_Groups(*(part[:, searched] for part in groups)), n_components)
        bic = (3 * n_components - 1) * math.log(total) - 2 * log_likelihood
        is_better = bic < best_bic[searched]
        improved = searched[is_better]
        best_bic[improved], best_size[improved] = bic[is_better], n_components
        for kept, new, unused in zip(best, fitted, (0.0, 0.0, 1.0), strict=True):
            padded = nn.functional.pad(new, (0, _MAX_COMPONENTS - n_components), value=unused)
            kept[improved] = padded[is_better]
    return MarginalMap(*_with_wide_component(*best, n_samples=total))


def _with_wide_component(
    proportions: torch.Tensor, means: torch.Tensor, scales: torch.Tensor, *, n_samples: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add one wide component of the mass of one row, so that the map is nowhere flat, not even between modes."""
    share = 1 / (n_samples + 1)
    column = torch.ones_like(means[:, :1])
    return (
        torch.cat([(1 - share) * proportions, share * column], dim=-1),
        torch.cat([means, 0 * column], dim=-1),
        torch.cat([scales, _WIDE_SCALE * column], dim=-1),
    )


class _Groups(NamedTuple):
    """Neighbouring values of each feature: their weight, mean and variance, each of shape (g, d), sorted."""

    weight: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor


def _group(s: torch.Tensor, weight: torch.Tensor) -> _Groups:
    """Sort each feature and pool neighbours, so that EM costs the same however many rows there are."""
    ordered, order = s.sort(0)
    ordered_weight = weight[order]
    n_rows, n_features = s.shape
    n_groups = min(n_rows, _MAX_GROUPS)
    label = (torch.arange(n_rows, device=s.device) * n_groups // n_rows).unsqueeze(-1).expand(-1, n_features)

    def pooled(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(n_groups, n_features).scatter_add_(0, label, values)

    total = pooled(ordered_weight)
    safe = total.clamp(min=1e-12)
    mean = pooled(ordered_weight * ordered) / safe
    variance = pooled(ordered_weight * (ordered - mean.gather(0, label)).square()) / safe
    return _Groups(total, mean, variance)


def _fit_margins(
    groups: _Groups, n_components: int
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Run EM on all features at once; return (proportions, means, scales) and the log-likelihoods (d,)."""
    # Groups last, so that sums over components and groups run along whole vectors: (d, k, g).
    weight, mean, variance = (part.T.unsqueeze(1).contiguous() for part in groups)
    total = weight.sum((1, 2))
    # Start from equal-mass slices of the sorted feature; a group across a border is shared, so that a weight
    # does what repetition does.
    stop = weight.cumsum(-1)
    shares = torch.arange(n_components + 1, dtype=weight.dtype, device=weight.device) / n_components
    edges = stop[..., -1:] * shares.unsqueeze(-1)
    overlap = (torch.minimum(stop, edges[:, 1:]) - torch.maximum(stop - weight, edges[:, :-1])).clamp(min=0)
    # Every row's responsibilities times its weight.
    mass = torch.where(weight > 0, overlap, 0.0)
    previous = torch.full_like(total, -math.inf)
    for _ in range(_MAX_ITER):
        counts = mass.sum(-1, keepdim=True) + 1e-9
        means = (mass * mean).sum(-1, keepdim=True) / counts
        # The variance about the means of a group whose values spread by its own.
        spread = (mean - means).square_().add_(variance)
        scales = ((mass * spread).sum(-1, keepdim=True) / counts).sqrt().clamp(min=_MIN_SCALE)
        proportions = counts / counts.sum(1, keepdim=True)
        # The mean log density over such a group.
        log_constant = (proportions / scales).log() - 0.5 * math.log(2 * math.pi)
        joint = torch.addcmul(log_constant, spread, scales.square().reciprocal(), value=-0.5)
        highest = joint.amax(1, keepdim=True)
        density = joint.sub_(highest).exp_()
        of_all = density.sum(1, keepdim=True)
        log_likelihood = (weight * (highest + of_all.log())).sum((1, 2))
        if bool((log_likelihood - previous < 1e-5 * total).all()):
            break
        previous = log_likelihood
        mass = density.mul_(weight / of_all)
    return (proportions.squeeze(-1), means.squeeze(-1), scales.squeeze(-1)), log_likelihood


def _symmetric_whitener(covariance: torch.Tensor, n_samples: float) -> torch.Tensor:
    """Inverse square root of a covariance shrunk towards its diagonal, more so with few rows per feature."""
    d = len(covariance)
    shrinkage = min(1.0, 0.1 * (d / n_samples) ** 2)
    variances = covariance.diagonal()
    covariance = covariance + torch.diag((variances == 0).to(variances))
    shrunk = (1 - shrinkage) * covariance + shrinkage * torch.diag(covariance.diagonal())
    eigenvalues, eigenvectors = torch.linalg.eigh(shrunk)
    eigenvalues = eigenvalues.clamp(min=1e-8 * float(eigenvalues[-1]))
    return (eigenvectors / eigenvalues.sqrt()) @ eigenvectors.T


def _normal_quantile(log_p: torch.Tensor) -> torch.Tensor:
    """Solve log Phi(z) = log_p for log_p <= log(1/2), by Newton steps where exp(log_p) would underflow."""
    z = torch.special.ndtri(log_p.clamp(min=_LEAST_LOG_P).exp())
    is_far = ~(log_p > _LEAST_LOG_P)
    if is_far.any():
        far_log_p = log_p[is_far]
        far = -(-2 * far_log_p).clamp(min=0).sqrt()
        for _ in range(4):
            log_cdf = torch.special.log_ndtr(far)
            log_slope = -0.5 * far.square() - 0.5 * math.log(2 * math.pi) - log_cdf
            far = far - (log_cdf - far_log_p) * (-log_slope).exp()
        z = z.masked_scatter(is_far, far)
    return z
