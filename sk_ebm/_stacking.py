"""Mixtures of known densities, and their shares by maximum likelihood."""

import itertools
import math
from collections.abc import Iterable, Sequence

import torch

from sk_ebm._types import Density, ModuleList

_MAX_ITER = 2000
# Rows that each density is taken to have before any is seen (Krichevsky and Trofimov): what no held-out row asked for
# may yet be what a new one needs.
_PRIOR_COUNT = 0.5
# Nats that another density adds to the likelihood of all rows together once in fifty times if it is of no use.
_TOTAL_GAIN_BY_CHANCE = 2.0


class DensityMixture(Density):
    """Mixture of normalised densities with known shares.

    Parameters
    ----------
    components : iterable of modules
        Densities with ``log_prob`` and ``sample``.
    proportions : sequence of float
        Their shares, which sum to one.
    """

    def __init__(self, components: Iterable[Density], proportions: Sequence[float]) -> None:
        super().__init__()
        self.components = ModuleList(components)
        self.proportions = list(proportions)
        # A user's own base need not say.
        self.is_slow = any(getattr(component, "is_slow", False) for component in self.components)

    def sample(self, n_samples: int, generator: torch.Generator) -> torch.Tensor:
        """Draw `n_samples` rows in random order, from each component as many as its share, rounded up or down."""
        counts = rounded_counts(n_samples, self.proportions, generator)
        z = torch.cat(
            [c.sample(n, generator) for c, n in zip(self.components, counts, strict=True) if n],
        )
        return z[torch.randperm(n_samples, generator=generator, device=z.device)]

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return the log density (nats) of each row, shape (n,)."""
        return self.mix(self.component_log_prob(z))

    def component_log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return the log density (nats) of each row under each component, shape (J, n)."""
        return torch.stack([component.log_prob(z) for component in self.components])

    def mix(self, component_log_prob: torch.Tensor) -> torch.Tensor:
        """Return the log density (nats) of rows from those under the components."""
        return (component_log_prob + component_log_prob.new_tensor(self.proportions).log().unsqueeze(-1)).logsumexp(0)


def rounded_counts(n_samples: int, shares: Sequence[float], generator: torch.Generator) -> list[int]:
    """Divide draws by shares that sum to one, rounding up or down at random.

    One random offset rounds all, so the expected number of each is exact however few rows are drawn.
    """
    offset = float(torch.rand(1, generator=generator, device=generator.device, dtype=torch.float32))
    edges = [math.floor(n_samples * share + offset) for share in itertools.accumulate(shares)]
    edges[-1] = n_samples
    return [stop - start for start, stop in itertools.pairwise([0, *edges])]


def mixture_shares(log_density: torch.Tensor, weight: torch.Tensor, max_shortfall: float = 1e-6) -> torch.Tensor:
    """Maximise the weighted mean of ``log sum_c a_c p_c(row)`` over the simplex, a concave problem.

    EM steps are extrapolated, because plain EM all but stops long before the maximum where densities overlap.

    Parameters
    ----------
    log_density : tensor of shape (C, n)
        Log density (nats) of each row under each density; -inf where a density is zero, but not under all.
    weight : tensor of shape (n,)
        Non-negative row weights.
    max_shortfall : float, default=1e-6
        Nats by which the likelihood of all rows together may fall short of its maximum.

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
    # A row without weight may be impossible under what the others are likely under.
    log_density, weight = log_density[:, weight > 0].double(), weight[weight > 0].double()
    # A row counts only by the ratios of its densities, so each row is scaled by its largest.
    density = (log_density - log_density.amax(0)).exp()
    weight = weight / weight.sum()
    share = torch.full((len(density),), 1 / len(density), dtype=torch.float64, device=weight.device)

    def gain(share: torch.Tensor) -> torch.Tensor:
        """Factor by which EM multiplies each share, the gradient of the mean log-likelihood."""
        return density @ (weight / (share @ density))

    for _ in range(_MAX_ITER):
        first_gain = gain(share)
        # Concavity bounds what is left to gain by the largest slope towards a vertex of the simplex.
        if float(first_gain.max() - 1) * density.shape[1] < max_shortfall:
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


def shares_with_prior(log_density: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the shares that make rows most likely, with half a row more for each density.

    It costs some 1 / n nats, and a row that only one of them can explain costs log n more than under that one, about.
    """
    shares = mixture_shares(log_density, weight)
    n_rows = _effective_count(weight)
    return (n_rows * shares + _PRIOR_COUNT) / (n_rows + _PRIOR_COUNT * len(shares))


def _effective_count(weight: torch.Tensor) -> float:
    """Return how many rows of equal weight say as much."""
    return float(weight.double().sum().square() / weight.double().square().sum())


def mean_and_std_error(values: torch.Tensor, weight: torch.Tensor) -> tuple[float, float]:
    """Return the weighted mean of values of rows and its standard error."""
    share = weight / weight.sum()
    mean = share @ values
    return float(mean), float((share.square() @ (values - mean).square()).sqrt())


def gain_by_chance(weight: torch.Tensor) -> float:
    """Return the nats per row that a density of no use seldom adds to a mixture fitted to rows of these weights."""
    return _TOTAL_GAIN_BY_CHANCE / _effective_count(weight)


def stacking_shares(
    held_out: torch.Tensor, weight: torch.Tensor, is_covered: torch.Tensor, least_gain: Sequence[float]
) -> list[float]:
    """Return each candidate's share of a pool that makes rows most likely that no candidate has seen.

    A candidate whose proposals miss some of its mass gets no share if there is another: its log Z is too low, which
    flatters it. Nor does one get any that adds next to nothing: it would cost time in every score, and its errors.

    Parameters
    ----------
    held_out : tensor of shape (C, n)
        Log density (nats) of each row under each candidate; nan where a row was seen.
    weight : tensor of shape (n,)
        Non-negative row weights.
    is_covered : tensor of shape (C,)
        Whether the proposals cover the candidate.
    least_gain : sequence of float
        Nats per row that each candidate must add to the others; -inf for one that takes so little time to score that
        any share is welcome.
    """
    kept = is_covered.nonzero().flatten().tolist() or list(range(len(held_out)))
    is_held_out = held_out[kept].isfinite().all(0)
    log_density, weight = held_out[:, is_held_out], weight[is_held_out]

    def score(kept: list[int]) -> float:
        log_shares = mixture_shares(log_density[kept], weight).log().unsqueeze(-1)
        return float(weight.double() @ (log_shares + log_density[kept].double()).logsumexp(0) / weight.double().sum())

    while len(kept) > 1:
        whole = score(kept)
        surplus = {c: whole - score([j for j in kept if j != c]) - least_gain[c] for c in kept}
        worst = min(surplus, key=surplus.__getitem__)
        if surplus[worst] >= 0:
            break
        kept.remove(worst)
    shares = torch.zeros(len(held_out), dtype=torch.float64)
    shares[kept] = shares_with_prior(log_density[kept], weight)
    return [float(share) for share in shares]
