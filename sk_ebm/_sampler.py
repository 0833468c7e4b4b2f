"""Draws from the model: the defensive proposal, the pool of its draws, and chains with local and global moves."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from sk_ebm._kernels import GlobalState, Info, LogDensityAndGrad, imh_step, init_local, isir_step, mala_step
from sk_ebm._log_normalizer import effective_sample_size
from sk_ebm._mixture import Mixture, fit_mixtures
from sk_ebm._model import StackedDensity, TiltedEnsemble
from sk_ebm._stacking import DensityMixture, mixture_shares, rounded_counts
from sk_ebm._types import Density

LogDensity = Callable[[torch.Tensor], torch.Tensor]

TARGET_ACCEPTANCE = 0.6
_DEFENSIVE_FRACTION = 0.3
_SAMPLE_CHUNK = 8192
# Proposals that tell how to draw, the effective sample size that makes do without a flow, and the least share of the
# proposals that goes to all bases alike.
_MAX_PILOT, _LEAST_LEAN_SAMPLE_SIZE, _LEAST_SHARE = 4096, 0.15, 0.05
# Gaussians at most, and draws for each of their parameters at least.
_MAX_GAUSSIANS, _DRAWS_PER_PARAMETER = 32, 10
# Least draws and proposals at a time, and how many times the proposals that should do are tried.
_MIN_DRAWS, _MAX_PROPOSED = 1024, 20
# Proposals per draw, of which the least that leaves few enough draws to repeat an earlier one is taken.
_CAPS, _MAX_REPEATED = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0), 0.01
# Rows evaluated at once: few enough for hidden layers to stay in the cache of a processor.
CHUNK = 1024
_SEPARATION_STEPS = (0.1, 0.03, 0.01, 0.003)


def defensive_proposal(
    flow: Density, bases: Sequence[Density], defensive_fraction: float = _DEFENSIVE_FRACTION
) -> DensityMixture:
    """Mix (1 - a) of a flow that proposes well with a of the bases, which keep the weights bounded."""
    shares = [defensive_fraction / len(bases)] * len(bases)
    return DensityMixture([flow, *bases], [1 - defensive_fraction, *shares])


class Pool(NamedTuple):
    """Positions (n, d) with what does not change when the energy does.

    That is the log density there of the proposal (n,) and of its components (J, n).
    """

    position: torch.Tensor
    log_proposal: torch.Tensor
    component_log_prob: torch.Tensor
    components: tuple[Density, ...]

    @property
    def controls(self) -> torch.Tensor:
        """Ratios of the components to the proposal: their expectation is one, so they are control variates for log Z.

        The mean of all ratios, each with its component's share, is one: the first says nothing that the others do not.
        """
        return (self.component_log_prob[1:] - self.log_proposal).exp().nan_to_num(nan=0.0)

    def base_log_prob(self, model: TiltedEnsemble) -> torch.Tensor:
        """Return the log density (nats) of each position under each base of the model, shape (K, n)."""
        index_of = {id(component): j for j, component in enumerate(self.components)}
        known = [index_of.get(id(base)) for base in model.bases]
        return torch.stack(
            [
                base.log_prob(self.position) if j is None else self.component_log_prob[j]
                for base, j in zip(model.bases, known, strict=True)
            ]
        )

    def split(self) -> Iterator["Pool"]:
        """Yield pools of few positions."""
        for start in range(0, len(self.position), CHUNK):
            rows = slice(start, start + CHUNK)
            yield Pool(self.position[rows], self.log_proposal[rows], self.component_log_prob[:, rows], self.components)


class SamplerReport(NamedTuple):
    """Mean acceptance rate of the local and of the global moves of one round.

    With them comes the smallest effective sample size of a member on the pool, a fraction.
    """

    local_acceptance: torch.Tensor
    global_acceptance: torch.Tensor
    effective_sample_size: torch.Tensor


@torch.no_grad()
def draw_pool(proposal: DensityMixture, n_samples: int, generator: torch.Generator) -> Pool:
    """Draw a pool of `n_samples` proposals; one that overflowed gets weight zero."""
    position = proposal.sample(n_samples, generator)
    is_finite = position.isfinite().all(-1)
    pool = _evaluate(proposal, torch.where(is_finite.unsqueeze(-1), position, 0.0))
    log_proposal = torch.where(is_finite, pool.log_proposal, math.inf)
    return pool._replace(log_proposal=log_proposal)


def _evaluate(proposal: DensityMixture, position: torch.Tensor) -> Pool:
    component_log_prob = torch.cat([proposal.component_log_prob(part) for part in position.split(CHUNK)], dim=-1)
    return Pool(position, proposal.mix(component_log_prob), component_log_prob, tuple(proposal.components))


@torch.no_grad()
def pool_log_weight(model: TiltedEnsemble, pool: Pool) -> torch.Tensor:
    """Return every member's log importance weights of the pool, shape (K, n)."""
    log_density = [model.log_density(part.position, part.base_log_prob(model)) for part in pool.split()]
    return finite_or_zero_weight(torch.cat(log_density, dim=-1) - pool.log_proposal)


@torch.no_grad()
def log_weight(density: StackedDensity, pool: Pool) -> torch.Tensor:
    """Return the log importance weights of the pool for the whole density, shape (n,)."""
    log_density = [
        density.log_density(part.position, [part.base_log_prob(ensemble) for ensemble in density.ensembles])
        for part in pool.split()
    ]
    return finite_or_zero_weight(torch.cat(log_density) - pool.log_proposal)


def finite_or_zero_weight(weight: torch.Tensor) -> torch.Tensor:
    """Count a log weight that is no number as weight zero."""
    return torch.where(weight.isfinite(), weight, -math.inf)


def _probability(weight: torch.Tensor) -> torch.Tensor:
    """Normalise log weights along the last dimension; where all are zero, every draw is as good."""
    is_hopeless = weight.isneginf().all(-1, keepdim=True)
    return torch.where(is_hopeless, 0.0, weight).softmax(-1)


class Chains:
    """Persistent chains of every member, moved locally by MALA and globally by proposals from the pool.

    Parameters
    ----------
    position : tensor of shape (K, n_chains, d)
        Starting positions.
    global_kernel : {"isir", "imh"}
        Kernel of the global moves.
    n_local_steps : int
        MALA steps per round.
    """

    def __init__(self, position: torch.Tensor, *, global_kernel: str, n_local_steps: int) -> None:
        self.position = position
        self.global_kernel = global_kernel
        self.n_local_steps = n_local_steps
        n_members, _, d = position.shape
        self.step_size = torch.full((n_members, 1), 0.1 / d ** (1 / 3), dtype=position.dtype, device=position.device)

    @torch.no_grad()
    def move(
        self, model: TiltedEnsemble, proposal: DensityMixture, pool: Pool, generator: torch.Generator
    ) -> SamplerReport:
        """Run one round of global and local moves of all chains."""
        pool_weight = pool_log_weight(model, pool)
        global_info = self._move_globally(model, proposal, pool, pool_weight, generator)
        local_rates = [info.acceptance_rate for info in self._move_locally(model, generator)]
        local_rate = torch.stack(local_rates).mean((0, 2)) if local_rates else self.position.new_full((1,), math.nan)
        if local_rates:
            # Adapted between rounds only, so that every accepted or rejected step had a fixed step size.
            self.step_size = (self.step_size * torch.exp(0.5 * (local_rate - TARGET_ACCEPTANCE)).unsqueeze(-1)).clamp(
                1e-6, 2.0
            )
        global_rate = global_info.is_accepted.to(self.position.dtype).mean()
        return SamplerReport(local_rate.mean(), global_rate, effective_sample_size(pool_weight).amin())

    def _move_globally(
        self,
        model: TiltedEnsemble,
        proposal: DensityMixture,
        pool: Pool,
        pool_weight: torch.Tensor,
        generator: torch.Generator,
    ) -> Info:
        n_members, n_chains, d = self.position.shape
        here = _evaluate(proposal, self.position.reshape(-1, d))
        members = torch.arange(n_members, device=self.position.device)
        log_base = here.base_log_prob(model).reshape(n_members, n_members, n_chains)[members, members]
        log_proposal = here.log_proposal.reshape(n_members, n_chains)
        state = GlobalState(self.position, model.log_density(self.position, log_base) - log_proposal)
        n_candidates = max(1, len(pool.position) // n_chains)
        # Every member deals the pool out to its chains in its own random order.
        key = torch.rand(pool_weight.shape, generator=generator, device=pool_weight.device, dtype=torch.float32)
        order = key.argsort(-1)
        index = order[:, : n_chains * n_candidates].reshape(n_members, n_chains, n_candidates)
        candidates = GlobalState(pool.position[index], pool_weight.gather(-1, index.flatten(1)).reshape(index.shape))
        if self.global_kernel == "isir":
            state, info = isir_step(state, candidates, generator=generator)
        else:
            for j in range(n_candidates):
                candidate = GlobalState(candidates.position[:, :, j], candidates.log_weight[:, :, j])
                state, info = imh_step(state, candidate, generator=generator)
        self.position = state.position
        return info

    def _move_locally(self, model: TiltedEnsemble, generator: torch.Generator) -> list[Info]:
        infos: list[Info] = []
        if self.n_local_steps:
            target = differentiable(model.log_density)
            state = init_local(self.position, target)
            for _ in range(self.n_local_steps):
                state, info = mala_step(state, target, step_size=self.step_size, generator=generator)
                infos.append(info)
            self.position = state.position
        return infos


def differentiable(log_density: LogDensity) -> LogDensityAndGrad:
    """Return a function that gives the log density of each position together with its gradient."""

    def log_density_and_grad(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            value = log_density(z)
            (grad,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), grad

    return log_density_and_grad


@torch.no_grad()
def start_chains(model: TiltedEnsemble, pool: Pool, n_chains: int, generator: torch.Generator) -> torch.Tensor:
    """Draw starting positions of every member's chains from the pool by weight, shape (K, n_chains, d)."""
    probability = _probability(pool_log_weight(model, pool))
    index = torch.multinomial(probability, n_chains, replacement=True, generator=generator)
    return pool.position[index]


@torch.no_grad()
def draw_from_density(
    density: StackedDensity, proposal: DensityMixture, n_samples: int, generator: torch.Generator
) -> torch.Tensor:
    """Draw rows from a density, from each ensemble as many as its share, rounded up or down."""
    counts = rounded_counts(n_samples, density.shares.tolist(), generator)
    # Rounding to single precision is nothing beside the noise of the weights.
    density, proposal = copy.deepcopy((density, proposal))
    density.float(), proposal.float()
    pairs = zip(density.parts(), counts, strict=True)
    draws = torch.cat([_draw_from_ensemble(part, proposal, n, generator) for part, n in pairs if n])
    return draws[torch.randperm(n_samples, generator=generator)].double()


def _draw_from_ensemble(
    density: StackedDensity, proposal: DensityMixture, n_samples: int, generator: torch.Generator
) -> torch.Tensor:
    """Draw rows from one ensemble: keep each proposal as often as its weight asks, then move those kept twice apart.

    A weight is rounded up or down at random, so that every proposal is kept as often as it should be on average. More
    rows than few are drawn in any case, and some of them returned, since that average is one over many proposals.
    Where no energy tilts the bases, their own draws are those of the ensemble, and nothing is weighted.
    """
    (ensemble,) = density.ensembles
    untilted = ensemble.untilted()
    if untilted is not None:
        sizes = [len(rows) for rows in torch.arange(n_samples).split(_SAMPLE_CHUNK)]
        z = torch.cat([untilted.sample(size, generator) for size in sizes])
        if z.isfinite().all():
            return z
    n_wanted = max(n_samples, _MIN_DRAWS)
    proposal, log_cap, n_per_draw = _prepare_sampling(density, proposal, min(_MAX_PILOT, n_wanted), generator)
    draws: list[torch.Tensor] = []
    n_left, n_proposed = n_wanted, 0
    while n_left > 0:
        pool = draw_pool(proposal, min(_SAMPLE_CHUNK, max(_MIN_DRAWS, math.ceil(1.1 * n_per_draw * n_left))), generator)
        weight = log_weight(density, pool)
        n_proposed += len(weight)
        if log_cap == -math.inf:
            # No draw of the pilot was any good, so each is as good as any other.
            index = torch.arange(len(weight))
        elif n_proposed > _MAX_PROPOSED * n_per_draw * n_wanted:
            # The pilot met a weight next to which nearly all others round to none.
            index = torch.multinomial(_probability(weight), n_left, replacement=True, generator=generator).sort().values
        else:
            uniform = torch.rand(weight.shape, generator=generator, dtype=weight.dtype)
            n_kept = ((weight - log_cap).exp() + uniform).floor()
            index = torch.arange(len(weight)).repeat_interleave(n_kept.clamp(max=n_wanted).long())
        position = pool.position[index]
        is_repeat = torch.zeros(len(index), dtype=torch.bool)
        is_repeat[1:] = index[1:] == index[:-1]
        if is_repeat.any():
            parts = position[is_repeat].split(CHUNK)
            position[is_repeat] = torch.cat([_separate(density.log_density, part, generator) for part in parts])
        draws.append(position)
        n_left -= len(position)
    all_draws = torch.cat(draws)
    return all_draws[torch.randperm(len(all_draws), generator=generator)[:n_samples]]


def _prepare_sampling(
    density: StackedDensity, proposal: DensityMixture, n_pilot: int, generator: torch.Generator
) -> tuple[DensityMixture, float, float]:
    """Choose what to propose from, and a cap of the log weights below which a proposal is kept once at most.

    Flows are slow. In few features Gaussians fitted to the density propose better, and the bases, mixed as suits it,
    often well enough; if neither do, the whole proposal has to. Also return how many proposals make one draw.
    """
    pool = draw_pool(proposal, n_pilot, generator)
    weight = log_weight(density, pool)
    best, best_weight, best_size = proposal, weight, _LEAST_LEAN_SAMPLE_SIZE
    for lean in _lean_proposals(density, pool, weight, generator):
        lean_weight = log_weight(density, draw_pool(lean, n_pilot, generator))
        # Judged on draws of the whole proposal too, which see what the lean one would miss.
        size = min(float(effective_sample_size(lean_weight)), _sample_size_of(lean, pool, weight))
        if size > best_size:
            best, best_weight, best_size = lean, lean_weight, size
    return best, *_cap(best_weight)


def _lean_proposals(
    density: StackedDensity, pool: Pool, log_weight: torch.Tensor, generator: torch.Generator
) -> Iterator[DensityMixture]:
    """Yield proposals for what the weighted pool stands for that do without a flow."""
    gaussians = _fit_gaussians(pool.position, log_weight, generator)
    if gaussians is not None:
        (ensemble,) = density.ensembles
        yield defensive_proposal(gaussians, list(ensemble.bases), _LEAST_SHARE)
    is_cheap = [not getattr(part, "is_slow", False) for part in pool.components]
    log_prob, probability = pool.component_log_prob[torch.tensor(is_cheap)], _probability(log_weight)
    rows = (log_prob > -math.inf).any(0) & (probability > 0)
    if rows.any():
        shares = mixture_shares(log_prob[:, rows], probability[rows], max_shortfall=1.0)
        # No component is left out: the density may need it where the pilot did not look.
        shares = (1 - _LEAST_SHARE) * shares + _LEAST_SHARE / len(shares)
        yield DensityMixture(itertools.compress(pool.components, is_cheap), shares.tolist())


def _fit_gaussians(position: torch.Tensor, log_weight: torch.Tensor, generator: torch.Generator) -> Mixture | None:
    """Fit as many Gaussians to weighted draws as these say enough of, if they do of two."""
    n_effective, d = len(position) * float(effective_sample_size(log_weight)), position.shape[1]
    n_parameters = (d + 1) * (d + 2) // 2
    n_components = min(_MAX_GAUSSIANS, int(n_effective / (_DRAWS_PER_PARAMETER * n_parameters)))
    if n_components < 2:
        return None
    probability = _probability(log_weight.double())
    rows = probability > 0
    draws, weight = position[rows].double(), len(rows) * probability[rows].unsqueeze(0)
    (gaussians,) = fit_mixtures(draws, weight, n_components, covariance_type="full", generator=generator, tol=1e-3)
    return gaussians.to(position.dtype)


def _sample_size_of(proposal: DensityMixture, pool: Pool, log_weight: torch.Tensor) -> float:
    """Return the effective sample size of another proposal, a fraction, as the draws of the pool see it."""
    log_ratio = log_weight + pool.log_proposal - proposal.log_prob(pool.position)
    log_mean_square = (log_weight + log_ratio)[log_weight > -math.inf].logsumexp(0)
    return float((2 * log_weight.logsumexp(0) - log_mean_square - math.log(len(log_weight))).exp())


def _cap(log_weight: torch.Tensor) -> tuple[float, float]:
    """Return the cap of the log weights, and how many proposals make one draw."""
    largest = float(log_weight.max())
    if largest == -math.inf:
        return -math.inf, 1.0
    weight = (log_weight.double() - largest).exp()
    for factor in _CAPS:
        cap = factor * float(weight.mean())
        if float((weight - cap).clamp(min=0).sum()) <= _MAX_REPEATED * float(weight.sum()):
            break
    return largest + math.log(cap), factor


def _separate(log_density: LogDensity, position: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move draws by MALA, so that those resampled from the same proposal part."""
    target = differentiable(log_density)
    state = init_local(position, target)
    # Step sizes on a ladder, shared by all draws: one of them suits the narrowest direction of the density.
    for step_size in _SEPARATION_STEPS:
        step = position.new_full((1,), step_size / position.shape[-1] ** (1 / 3))
        state, _ = mala_step(state, target, step_size=step, generator=generator)
    return state.position
