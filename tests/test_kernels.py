"""Kernels keep their target, whatever it is; the check of that catches kernels that do not."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import global_rng_untouched, normal, seeded
from scipy import stats
from torch.distributions import MixtureSameFamily, MultivariateNormal, Normal, StudentT

from sk_ebm import _kernels
from sk_ebm._kernels import GlobalState, imh_step, init_local, isir_step, mala_step

N_CHAINS = 20_000


class Target(NamedTuple):
    """A law with its log density, exact draws, and the Rosenblatt map that makes them independent uniforms."""

    n_features: int
    log_density: Callable
    sample: Callable
    to_uniform: Callable

    def log_density_and_grad(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            value = self.log_density(x)
            return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def student_t_draws(df, *shape, generator):
    noise = torch.randn(*shape, df + 1, generator=generator, dtype=torch.float64)
    return noise[..., 0] / noise[..., 1:].square().mean(-1).sqrt()


def gaussian():
    mean, tril = torch.tensor([1.0, -1.0]).double(), torch.tensor([[1.0, 0.0], [1.2, 0.5]]).double()
    return Target(
        2,
        MultivariateNormal(mean, scale_tril=tril).log_prob,
        lambda n, generator: mean + torch.randn(n, 2, generator=generator, dtype=torch.float64) @ tril.T,
        lambda x: torch.special.ndtr(torch.linalg.solve(tril, (x - mean).T).T).numpy(),
    )


def two_modes():
    shares, means, scales = torch.tensor([[0.7, 0.3], [-2.0, 2.0], [0.5, 0.8]]).double()
    law = MixtureSameFamily(torch.distributions.Categorical(shares), Normal(means, scales))

    def sample(n, generator):
        k = torch.multinomial(shares, n, replacement=True, generator=generator)
        return (means[k] + scales[k] * torch.randn(n, generator=generator, dtype=torch.float64)).unsqueeze(-1)

    return Target(1, lambda x: law.log_prob(x.squeeze(-1)), sample, lambda x: law.cdf(x).numpy())


def heavy_tailed_banana():
    across = StudentT(torch.tensor(4.0).double(), 0.0, 0.5)

    def log_density(x):
        return Normal(0.0, 1.0).log_prob(x[..., 0]) + across.log_prob(x[..., 1] - 0.5 * x[..., 0].square())

    def sample(n, generator):
        along = torch.randn(n, generator=generator, dtype=torch.float64)
        return torch.stack(
            [along, 0.5 * along.square() + 0.5 * student_t_draws(4, n, generator=generator)],
            dim=-1,
        )

    def to_uniform(x):
        x = x.numpy()
        return np.stack([stats.norm.cdf(x[:, 0]), stats.t.cdf((x[:, 1] - 0.5 * x[:, 0] ** 2) / 0.5, 4)], axis=-1)

    return Target(2, log_density, sample, to_uniform)


TARGETS = {law.__name__: law() for law in (gaussian, two_modes, heavy_tailed_banana)}


def proposals(target, *shape, generator):
    """Draw wide independent proposals, with tails heavy enough to bound every weight."""
    return global_state(target, 2 * student_t_draws(3, *shape, target.n_features, generator=generator))


def global_state(target, position):
    log_proposal = StudentT(torch.tensor(3.0).double(), 0.0, 2.0).log_prob(position).sum(-1)
    return GlobalState(position, target.log_density(position) - log_proposal)


def local_state(target, position):
    return init_local(position, target.log_density_and_grad)


def mala(target, state, generator):
    return mala_step(state, target.log_density_and_grad, step_size=torch.tensor(0.3).double(), generator=generator)


def imh(target, state, generator):
    return imh_step(state, proposals(target, *state.log_weight.shape, generator=generator), generator=generator)


def isir(target, state, generator):
    return isir_step(state, proposals(target, *state.log_weight.shape, 4, generator=generator), generator=generator)


KERNELS = {"mala": (local_state, mala), "imh": (global_state, imh), "isir": (global_state, isir)}


def run(kernel, target, position, *, n_steps, seed=1):
    init, step = KERNELS[kernel]
    generator, state = seeded(seed), init(target, position)
    for _ in range(n_steps):
        state, _ = step(target, state, generator)
    return state.position


def run_composed(target, position, *, n_steps, seed=1, refresh=True):
    """Alternate local and global moves; without `refresh`, the weights are those of before the local moves."""
    generator, state = seeded(seed), global_state(target, position)
    for _ in range(n_steps):
        local = local_state(target, state.position)
        for _ in range(3):
            local, _ = mala(target, local, generator)
        state = global_state(target, local.position) if refresh else state._replace(position=local.position)
        state, _ = imh(target, state, generator)
        state, _ = isir(target, state, generator)
    return state.position


def law_p_value(target, position):
    """Return the smallest p-value of tests that the Rosenblatt transforms of the chains are independent uniforms."""
    u = target.to_uniform(position)
    p_values = [stats.kstest(column, "uniform").pvalue for column in u.T]
    centred = u - 0.5
    moments = [
        (centred, 1 / 12),
        (centred**2 - 1 / 12, 1 / 180),
        (centred.prod(-1, keepdims=True), 12.0 ** -u.shape[1]),
    ]
    for values, variance in moments:
        p_values += list(2 * stats.norm.sf(np.abs(values.mean(0)) * math.sqrt(len(u) / variance)))
    return min(p_values)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
class TestLaw:
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_kernel_keeps_its_target(self, kernel, target):
        assert law_p_value(target, run(kernel, target, target.sample(N_CHAINS, seeded()), n_steps=6)) > 1e-4

    def test_composed_kernels_keep_their_target(self, target):
        assert law_p_value(target, run_composed(target, target.sample(N_CHAINS, seeded()), n_steps=5)) > 1e-4

    @pytest.mark.parametrize(("kernel", "n_steps"), [("imh", 120), ("isir", 40)])
    def test_global_kernels_reach_the_target_from_elsewhere(self, kernel, n_steps, target):
        far = torch.full((N_CHAINS, target.n_features), 7.0).double()
        assert law_p_value(target, far) < 1e-12
        assert law_p_value(target, run(kernel, target, far, n_steps=n_steps)) > 1e-4

    def test_stale_cache_breaks_the_law(self, target):
        stale = run_composed(target, target.sample(N_CHAINS, seeded()), n_steps=5, refresh=False)
        assert law_p_value(target, stale) < 1e-8

    @pytest.mark.parametrize("kernel", ["mala", "imh"])
    def test_accepting_always_breaks_the_law(self, kernel, target, monkeypatch):
        def accept_always(log_ratio, generator):
            return torch.ones_like(log_ratio, dtype=torch.bool), None

        monkeypatch.setattr(_kernels, "_metropolis", accept_always)
        assert law_p_value(target, run(kernel, target, target.sample(N_CHAINS, seeded()), n_steps=6)) < 1e-8

    def test_isir_without_weights_breaks_the_law(self, target):
        unweighted = target._replace(log_density=lambda x: torch.zeros(x.shape[:-1]).double())
        start = target.sample(N_CHAINS, seeded())
        assert law_p_value(target, run("isir", unweighted, start, n_steps=6)) < 1e-8


def test_mala_accepts_by_the_ratio_of_explicit_densities_chain_by_chain():
    """Detailed balance: pi(x) q(x, y) a(x, y) = pi(y) q(y, x) a(y, x), with q a Gaussian written out."""
    target = TARGETS["heavy_tailed_banana"]
    x, step_size = normal(3, 5, 2), torch.tensor([[0.01], [0.3], [2.0]]).double()
    state, info = mala_step(
        local_state(target, x), target.log_density_and_grad, step_size=step_size, generator=seeded(1)
    )
    generator = seeded(1)
    noise = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64)
    uniform = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    for i, j in np.ndindex(3, 5):
        step = float(step_size[i])

        def kernel(start, step=step):
            drift = target.log_density_and_grad(start)[1]
            return MultivariateNormal(start + step * drift, 2 * step * torch.eye(2).double())

        y = kernel(x[i, j]).mean + math.sqrt(2 * step) * noise[i, j]
        forward = target.log_density(x[i, j]) + kernel(x[i, j]).log_prob(y)
        backward = target.log_density(y) + kernel(y).log_prob(x[i, j])
        rate = min(1.0, math.exp(backward - forward))
        assert float(info.acceptance_rate[i, j]) == pytest.approx(rate, rel=1e-9)
        assert bool(info.is_accepted[i, j]) == bool(uniform[i, j] < rate)
        torch.testing.assert_close(state.position[i, j], y if uniform[i, j] < rate else x[i, j])
    assert 0 < info.is_accepted.sum() < 15


def test_isir_draws_by_weight():
    log_weight = torch.tensor([0.5, -1.0, 2.0, -math.inf, 0.0]).double()
    n = 50_000
    position = torch.arange(5.0).double().expand(n, 5).unsqueeze(-1)
    state = GlobalState(position[:, 0], log_weight[0].expand(n))
    state, info = isir_step(state, GlobalState(position[:, 1:], log_weight[1:].expand(n, 4)), generator=seeded())
    weight = np.exp(log_weight.numpy())
    expected = weight / weight.sum()
    counts = np.bincount(state.position.squeeze(-1).long(), minlength=5)
    assert counts[3] == 0
    assert stats.chisquare(counts[expected > 0], n * expected[expected > 0]).pvalue > 1e-3
    torch.testing.assert_close(info.acceptance_rate, torch.full((n,), 1 - expected[0]).double())
    torch.testing.assert_close(state.log_weight, log_weight[state.position.squeeze(-1).long()])


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
class TestState:
    @pytest.fixture
    def start(self, kernel, target):
        return KERNELS[kernel][0](target, target.sample(60, seeded()))

    def test_cached_values_are_those_of_the_position(self, kernel, target, start):
        init, step = KERNELS[kernel]
        state, info = step(target, start, seeded(1))
        assert 0 < info.is_accepted.sum() < 60
        torch.testing.assert_close(state, init(target, state.position))

    def test_chains_that_reject_stay_and_the_others_move(self, kernel, target, start):
        state, info = KERNELS[kernel][1](target, start, seeded(1))
        assert torch.equal((state.position != start.position).any(-1), info.is_accepted)
        assert bool(((info.acceptance_rate >= 0) & (info.acceptance_rate <= 1)).all())

    def test_state_is_not_mutated(self, kernel, target, start):
        before = [value.clone() for value in start]
        KERNELS[kernel][1](target, start, seeded(1))
        assert all(torch.equal(value, kept) for value, kept in zip(start, before, strict=True))

    def test_seeded_is_equal_and_leaves_the_global_generator(self, kernel, target, start):
        step = KERNELS[kernel][1]
        with global_rng_untouched():
            first, second, other = (step(target, start, seeded(seed))[0].position for seed in (1, 1, 2))
        assert torch.equal(first, second)
        assert not torch.equal(first, other)

    def test_leading_dimensions_are_independent_chains(self, kernel, target, start):
        step = KERNELS[kernel][1]
        batched = type(start)(*[value.reshape(3, 4, 5, *value.shape[1:]) for value in start])
        flat, nested = step(target, start, seeded(1)), step(target, batched, seeded(1))
        for expected, value in zip((*flat[0], *flat[1]), (*nested[0], *nested[1]), strict=True):
            torch.testing.assert_close(value, expected.reshape(value.shape), rtol=1e-12, atol=1e-12)


def test_mala_rejects_where_the_log_density_is_nan():
    def half_normal(x):
        return torch.where(x > 0, -0.5 * x.square(), math.nan).squeeze(-1), -x

    state, any_rejected = init_local(torch.full((1000, 1), 0.2).double(), half_normal), 0
    generator = seeded()
    for _ in range(200):
        state, info = mala_step(state, half_normal, step_size=torch.tensor(0.5).double(), generator=generator)
        any_rejected += int((info.acceptance_rate == 0).sum())
        assert all(bool(value.isfinite().all()) for value in state)
    assert any_rejected > 0
    assert bool((state.position > 0).all())
    assert stats.kstest(state.position.squeeze(-1).numpy(), "halfnorm").pvalue > 1e-3


def test_mala_leaves_a_position_outside_the_support():
    def inside(x):
        return torch.where(x.abs() < 1, 0.0, -math.inf).squeeze(-1), torch.zeros_like(x)

    state = init_local(torch.full((100, 1), 1.01).double(), inside)
    for seed in range(50):
        state, _ = mala_step(state, inside, step_size=torch.tensor(0.1).double(), generator=seeded(seed))
    assert bool(state.log_density.isfinite().all())


def test_imh_rejects_a_weight_that_is_not_finite_and_leaves_a_zero_weight():
    here = GlobalState(torch.zeros(4, 1), torch.tensor([0.0, 0.0, -math.inf, -math.inf]))
    there = GlobalState(torch.ones(4, 1), torch.tensor([math.nan, math.inf, -5.0, -math.inf]))
    state, info = imh_step(here, there, generator=seeded())
    assert info.is_accepted.tolist() == [False, False, True, False]
    torch.testing.assert_close(state.log_weight, torch.tensor([0.0, 0.0, -5.0, -math.inf]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_isir_never_chooses_a_non_finite_weight(bad):
    here = GlobalState(torch.zeros(2000, 1), torch.zeros(2000))
    there = GlobalState(
        torch.tensor([1.0, 2.0]).expand(2000, 2).unsqueeze(-1), torch.tensor([0.0, bad]).expand(2000, 2)
    )
    state, info = isir_step(here, there, generator=seeded())
    assert sorted(state.position.unique().tolist()) == [0.0, 1.0]
    torch.testing.assert_close(info.acceptance_rate, torch.full((2000,), 0.5))


def test_isir_leaves_a_zero_weight_for_any_other():
    here = GlobalState(torch.zeros(100, 1), torch.full((100,), -math.inf))
    there = GlobalState(torch.ones(100, 1, 1), torch.full((100, 1), -700.0))
    state, info = isir_step(here, there, generator=seeded())
    assert bool(info.is_accepted.all())
    assert bool((state.position == 1).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_isir_stays_where_every_weight_is_zero(bad):
    here = GlobalState(torch.zeros(100, 1), torch.full((100,), -math.inf))
    there = GlobalState(torch.ones(100, 3, 1), torch.full((100, 3), bad))
    state, info = isir_step(here, there, generator=seeded())
    assert not bool(info.is_accepted.any())
    assert bool((info.acceptance_rate == 0).all())
    assert bool((state.position == 0).all())
    assert bool((state.log_weight == -math.inf).all())
