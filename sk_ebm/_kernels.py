"""Markov kernels on functions, not networks: MALA, independence Metropolis-Hastings and i-SIR.

Positions have shape (..., d) and every other quantity shape (...); leading dimensions are independent chains.
A state carries its position together with all that was computed there, so nothing cached can go stale:
when the target or the proposal changes, build a new state.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

LogDensityAndGrad = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class LocalState(NamedTuple):
    """Position with the log density (nats, unnormalised) and its gradient there."""

    position: torch.Tensor
    log_density: torch.Tensor
    grad: torch.Tensor


class GlobalState(NamedTuple):
    """Position with its log importance weight (nats): log target minus log proposal."""

    position: torch.Tensor
    log_weight: torch.Tensor


class Info(NamedTuple):
    """What a step did: which chains moved, and how likely each was to."""

    is_accepted: torch.Tensor
    acceptance_rate: torch.Tensor


def init_local(position: torch.Tensor, log_density_and_grad: LogDensityAndGrad) -> LocalState:
    """Return the state of chains that start at `position`."""
    return LocalState(position, *log_density_and_grad(position))


def mala_step(
    state: LocalState,
    log_density_and_grad: LogDensityAndGrad,
    *,
    step_size: torch.Tensor,
    generator: torch.Generator,
) -> tuple[LocalState, Info]:
    """Move each chain by one Metropolis-adjusted Langevin step.

    Parameters
    ----------
    state : LocalState
        Current chains.
    log_density_and_grad : callable
        Maps positions (..., d) to log densities (...) and gradients (..., d).
    step_size : tensor broadcastable to (...)
        Variance of the proposal noise is 2 * step_size.
    generator : torch.Generator
        Source of randomness.

    References
    ----------
    G. Roberts, R. Tweedie, "Exponential convergence of Langevin distributions and their discrete
    approximations", Bernoulli 2(4), 1996.
    """
    step = step_size.unsqueeze(-1)
    noise = torch.randn(
        state.position.shape, generator=generator, device=state.position.device, dtype=state.position.dtype
    )
    position = state.position + step * state.grad + (2 * step).sqrt() * noise
    proposal = LocalState(position, *log_density_and_grad(position))
    log_ratio = (
        proposal.log_density
        - state.log_density
        + _log_langevin_kernel(proposal, state.position, step)
        - _log_langevin_kernel(state, position, step)
    )
    is_accepted, info = _metropolis(log_ratio, generator)
    moved = is_accepted.unsqueeze(-1)
    return LocalState(
        torch.where(moved, proposal.position, state.position),
        torch.where(is_accepted, proposal.log_density, state.log_density),
        torch.where(moved, proposal.grad, state.grad),
    ), info


def imh_step(state: GlobalState, proposal: GlobalState, *, generator: torch.Generator) -> tuple[GlobalState, Info]:
    """Move each chain by one independence Metropolis-Hastings step to its own independent proposal.

    A chain where the target is zero accepts any proposal where it is not; a non-finite proposal is rejected.
    """
    log_weight = torch.where(proposal.log_weight.isfinite(), proposal.log_weight, -math.inf)
    is_accepted, info = _metropolis(log_weight - state.log_weight, generator)
    return GlobalState(
        torch.where(is_accepted.unsqueeze(-1), proposal.position, state.position),
        torch.where(is_accepted, proposal.log_weight, state.log_weight),
    ), info


def isir_step(state: GlobalState, proposals: GlobalState, *, generator: torch.Generator) -> tuple[GlobalState, Info]:
    """Move each chain by one step of iterated sampling importance resampling (i-SIR).

    The current position competes with N independent proposals; one of the N + 1 is drawn by weight.

    Parameters
    ----------
    state : GlobalState
        Current chains, positions of shape (..., d).
    proposals : GlobalState
        N candidates per chain, positions of shape (..., N, d); non-finite weights are never chosen.
    generator : torch.Generator
        Source of randomness.

    References
    ----------
    C. Andrieu, A. Lee, M. Vihola, "Uniform ergodicity of the iterated conditional SMC and geometric ergodicity
    of particle Gibbs samplers", Bernoulli 24(2), 2018.
    """
    log_weight = torch.cat([state.log_weight.unsqueeze(-1), proposals.log_weight], dim=-1)
    log_weight = torch.where(log_weight.isfinite(), log_weight, -math.inf)
    position = torch.cat([state.position.unsqueeze(-2), proposals.position], dim=-2)
    # A chain that sits where every weight is zero stays where it is.
    competing = log_weight.clone()
    competing[..., 0] = torch.where(log_weight.isneginf().all(-1), 0.0, log_weight[..., 0])
    probability = competing.softmax(-1)
    flat = probability.reshape(-1, probability.shape[-1])
    index = torch.multinomial(flat, 1, generator=generator).reshape(log_weight.shape[:-1])
    chosen = index.unsqueeze(-1)
    new = GlobalState(
        position.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, position.shape[-1])).squeeze(-2),
        log_weight.gather(-1, chosen).squeeze(-1),
    )
    return new, Info(index > 0, 1 - probability[..., 0])


def _log_langevin_kernel(start: LocalState, end: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Log density of a Langevin proposal from `start` to `end`, up to a constant that cancels."""
    return -((end - start.position - step * start.grad).square() / (4 * step)).sum(-1)


def _metropolis(log_ratio: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, Info]:
    """Accept with probability min(1, exp(log_ratio)); a NaN ratio rejects."""
    acceptance_rate = log_ratio.nan_to_num(nan=-math.inf).clamp(max=0).exp()
    uniform = torch.rand(log_ratio.shape, generator=generator, device=log_ratio.device, dtype=log_ratio.dtype)
    is_accepted = uniform < acceptance_rate
    return is_accepted, Info(is_accepted, acceptance_rate)
