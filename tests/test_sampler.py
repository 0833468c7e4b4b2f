"""Pools, chains and draws: they follow the model, and survive when nothing works."""

import math

import pytest
import torch
from torch import nn

from sk_ebm._energy import MLPEnergies, SeparateEnergies
from sk_ebm._fitting import estimate_log_normalizer_of
from sk_ebm._flow import make_flow
from sk_ebm._log_normalizer import effective_sample_size
from sk_ebm._mixture import fit_gaussian, fit_mixtures, mixture_of_mixtures
from sk_ebm._model import StackedDensity, TiltedEnsemble
from sk_ebm._sampler import (
    Chains,
    _prepare_sampling,
    defensive_proposal,
    draw_from_density,
    draw_pool,
    log_weight,
    pool_log_weight,
    start_chains,
)
from sk_ebm._stacking import DensityMixture


class Shift(nn.Module):
    """Energy that moves a standard normal by `offset` in every feature."""

    def __init__(self, offset):
        super().__init__()
        self.offset = offset

    def forward(self, z):
        return (0.5 * self.offset**2 - self.offset * z).sum(-1)


def untilted(base):
    """Return a density of energy zero."""
    ensemble = TiltedEnsemble([base], MLPEnergies(1, 2, (4,))).double()
    return alone(ensemble)


def alone(ensemble, log_normalizer=0.0):
    return StackedDensity([ensemble], torch.ones(1).double(), torch.tensor([log_normalizer]).double())


@pytest.fixture
def model(generator):
    z = torch.randn(4000, 2, dtype=torch.float64, generator=generator)
    bases = [fit_gaussian(z, torch.ones(4000, dtype=torch.float64)) for _ in range(2)]
    return TiltedEnsemble(bases, SeparateEnergies([Shift(0.0), Shift(0.7)]))


@pytest.fixture
def proposal(model):
    return defensive_proposal(make_flow("spline", 2).double(), list(model.bases), 0.3)


def test_proposal_log_prob_is_that_of_the_mixture(proposal, generator):
    z = proposal.sample(500, generator)
    densities = [
        share * c.log_prob(z).exp() for share, c in zip(proposal.proportions, proposal.components, strict=True)
    ]
    torch.testing.assert_close(proposal.log_prob(z).exp(), torch.stack(densities).sum(0))
    assert sum(proposal.proportions) == pytest.approx(1)


def test_controls_of_a_pool_are_component_ratios_of_mean_one(proposal, generator):
    pool = draw_pool(proposal, 20_000, generator)
    first = (proposal.components[0].log_prob(pool.position) - pool.log_proposal).exp()
    shares = torch.tensor(proposal.proportions).double()
    torch.testing.assert_close(shares @ torch.cat([first.unsqueeze(0), pool.controls]), torch.ones(20_000).double())
    std_error = pool.controls.std(-1) / math.sqrt(20_000)
    assert bool(((pool.controls.mean(-1) - 1).abs() < 4 * std_error + 1e-12).all())


def test_a_pool_knows_the_bases_it_was_drawn_from(model, proposal, generator, monkeypatch):
    monkeypatch.setattr("sk_ebm._sampler.CHUNK", 20)
    pool = draw_pool(proposal, 50, generator)
    other = TiltedEnsemble([fit_gaussian(pool.position, torch.ones(50).double()), model.bases[1]], model.energies)
    for ensemble in (model, other):
        expected = ensemble.base_log_prob(pool.position)
        for part, rows in zip(pool.split(), expected.split(20, dim=-1), strict=True):
            torch.testing.assert_close(part.base_log_prob(ensemble), rows)
    model.bases[1].log_prob = None
    torch.testing.assert_close(pool.base_log_prob(model), pool.component_log_prob[1:])


def test_few_proposals_come_from_each_component_as_often_as_its_share():
    """Components at -100 and 100 whose counts can be read off the draws."""
    components = [fit_gaussian(centre + torch.eye(2).double(), torch.ones(2).double()) for centre in (-100, 100)]
    proposal, generator = DensityMixture(components, [0.9, 0.1]), torch.Generator().manual_seed(0)
    n_second = [int((proposal.sample(3, generator)[:, 0] > 0).sum()) for _ in range(2000)]
    assert sum(n_second) / 6000 == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize("n_samples", [1, 2, 3, 7, 1000])
def test_proposal_draws_as_many_as_asked(proposal, generator, n_samples):
    assert proposal.sample(n_samples, generator).shape == (n_samples, 2)


@pytest.mark.parametrize("global_kernel", ["isir", "imh"])
@pytest.mark.parametrize("n_local_steps", [0, 2])
def test_chains_reach_each_members_own_density(model, proposal, generator, global_kernel, n_local_steps):
    start = torch.full((2, 400, 2), 1.0, dtype=torch.float64)
    chains = Chains(start, global_kernel=global_kernel, n_local_steps=n_local_steps)
    means = []
    for _ in range(30):
        report = chains.move(model, proposal, draw_pool(proposal, 800, generator), generator)
        means.append(chains.position.mean(1))
    inside = torch.stack(means[5:]).mean(0)
    torch.testing.assert_close(inside[0], torch.zeros(2).double(), atol=0.08, rtol=0)
    # The ball the energy is pulled into shortens the shift a little.
    assert 0.55 < inside[1].mean() < 0.75
    assert 0 < report.global_acceptance <= 1
    pool = draw_pool(proposal, 800, generator)
    smallest = min(effective_sample_size(weight) for weight in pool_log_weight(model, pool))
    assert float(chains.move(model, proposal, pool, generator).effective_sample_size) == pytest.approx(float(smallest))


def test_step_size_adapts_towards_its_target(model, proposal, generator):
    chains = Chains(
        start_chains(model, draw_pool(proposal, 800, generator), 400, generator), global_kernel="isir", n_local_steps=2
    )
    chains.step_size = chains.step_size * 0 + 1.9
    for _ in range(30):
        report = chains.move(model, proposal, draw_pool(proposal, 800, generator), generator)
    assert 0.5 < report.local_acceptance < 0.7


def test_draws_follow_a_density_with_unequal_modes(generator):
    modes = torch.tensor([[-3.0, 0.0]] * 300 + [[3.0, 0.0]] * 100, dtype=torch.float64)
    rows = modes + 0.5 * torch.randn(400, 2, dtype=torch.float64, generator=generator)
    target = fit_mixtures(rows, torch.ones(1, 400).double(), 2, covariance_type="full", generator=generator)[0]
    wide = fit_gaussian(rows, torch.ones(400).double())
    proposal = defensive_proposal(make_flow("spline", 2).double(), [wide], 0.9)
    draws = draw_from_density(untilted(target), proposal, 20_000, generator)
    assert float((draws[:, 0] > 0).double().mean()) == pytest.approx(0.25, abs=0.02)
    assert len(draws.unique(dim=0)) > 0.9 * len(draws)


def test_draws_of_a_density_that_the_bases_hardly_cover_come_from_the_flow_too(generator):
    narrow = fit_gaussian(torch.randn(400, 2, dtype=torch.float64, generator=generator) / 20, torch.ones(400).double())
    wide = fit_gaussian(torch.randn(400, 2, dtype=torch.float64, generator=generator), torch.ones(400).double())
    energies = FarAway(narrow, wide)
    density = alone(TiltedEnsemble([wide], energies))
    flow = make_flow("spline", 2).double()
    flow.start_at(narrow.means[0], narrow.scale_trils[0])
    draws = draw_from_density(density, defensive_proposal(flow, [wide]), 5000, generator)
    torch.testing.assert_close(draws.std(0), torch.full((2,), 0.05).double(), rtol=0.1, atol=0)
    assert draws.dtype == torch.float64


def test_draws_keep_a_mode_that_the_bases_hardly_propose(generator):
    near = fit_gaussian(torch.randn(400, 2, dtype=torch.float64, generator=generator), torch.ones(400).double())
    away = torch.tensor([[14.0, 0.0]]) + 0.3 * torch.randn(400, 2, dtype=torch.float64, generator=generator)
    far = fit_gaussian(away, torch.ones(400).double())
    shares = torch.tensor([0.9, 0.1]).double()
    both = mixture_of_mixtures([near, far], shares)
    density = alone(TiltedEnsemble([near], FarAway(both, near)))
    flow = make_flow("spline", 2).double()
    flow.start_at(far.means[0], far.scale_trils[0])
    draws = draw_from_density(density, defensive_proposal(flow, [near]), 5000, generator)
    assert float((draws[:, 0] > 7).double().mean()) == pytest.approx(0.1, abs=0.02)


class Ring(nn.Module):
    """Energy that leaves of a base what is at distance one from the origin, more or less."""

    def forward(self, z):
        return 50 * (z.norm(dim=-1) - 1).square().reshape(1, -1)


def test_a_curved_density_is_proposed_for_by_gaussians_and_not_by_the_flow(generator):
    """The flow is untrained, and the base alone proposes one good draw in five."""
    rows = torch.randn(400, 2, dtype=torch.float64, generator=generator)
    wide = fit_gaussian(rows, torch.ones(400).double())
    density, flow = alone(TiltedEnsemble([wide], Ring())), make_flow("spline", 2).double()
    proposal = defensive_proposal(flow, [wide])
    chosen, _, n_per_draw = _prepare_sampling(density, proposal, 4096, generator)
    assert not chosen.is_slow
    fraction, before = (
        float(effective_sample_size(log_weight(density, draw_pool(q, 20_000, generator)))) for q in (chosen, proposal)
    )
    assert before < 0.4
    assert fraction > 0.7
    assert n_per_draw < 4
    z = draw_from_density(density, proposal, 20_000, generator)
    weights = draw_pool(proposal, 200_000, generator)
    share, radius = log_weight(density, weights).softmax(0), weights.position.norm(dim=1)
    mean = float(share @ radius)
    assert float(z.norm(dim=1).mean()) == pytest.approx(mean, abs=0.005)
    assert float(z.norm(dim=1).std()) == pytest.approx(float(share @ (radius - mean).square()) ** 0.5, abs=0.005)
    assert float((z[:, 0] > 0).double().mean()) == pytest.approx(
        float(share @ (weights.position[:, 0] > 0).double()), abs=0.02
    )


def test_few_draws_follow_the_density_as_many_do(generator):
    rows = torch.randn(400, 2, dtype=torch.float64, generator=generator)
    wide = fit_gaussian(rows, torch.ones(400).double())
    spot = fit_gaussian(rows / 30, torch.ones(400).double())
    target = mixture_of_mixtures([wide, spot], torch.tensor([0.5, 0.5]).double())
    density = alone(TiltedEnsemble([wide], FarAway(target, wide)))
    proposal = defensive_proposal(make_flow("spline", 2).double(), [wide])
    drawn = torch.cat([draw_from_density(density, proposal, 1, generator) for _ in range(60)])
    assert 0.3 < float((drawn.norm(dim=1) < 0.2).double().mean()) < 0.75


@pytest.mark.parametrize("half_width", [1.0, 3.0])
def test_draws_on_a_base_without_mass_everywhere(generator, half_width):
    proposal = defensive_proposal(make_flow("spline", 2).double(), [Box(half_width)])
    density = untilted(Box(half_width))
    draws = draw_from_density(density, proposal, 2000, generator)
    assert draws.shape == (2000, 2)
    assert draws.abs().max() <= half_width


class Box(nn.Module):
    """Uniform density on a square."""

    def __init__(self, half_width):
        super().__init__()
        self.half_width = half_width

    def log_prob(self, z):
        inside = z.abs().amax(-1) <= self.half_width
        return torch.where(inside, -2 * math.log(2 * self.half_width), -math.inf).to(z)

    def sample(self, n_samples, generator):
        return self.half_width * (2 * torch.rand(n_samples, 2, generator=generator) - 1)


class FarAway(nn.Module):
    """The energy that turns one density into another."""

    def __init__(self, target, base):
        super().__init__()
        self.target, self.base = target, base

    def forward(self, z):
        # The model pulls rows into a ball; this is where they came from.
        rows = z.reshape(-1, z.shape[-1])
        radius = 4 * (z.shape[-1] ** 0.5 + 1)
        rows = rows / (1 - (rows / radius).square().sum(-1, keepdim=True)).sqrt()
        return (self.base.log_prob(rows) - self.target.log_prob(rows)).reshape(1, -1)


def shifted_untilted(model, generator, distance=5.0):
    shifted = fit_gaussian(distance + model.bases[0].sample(500, generator), torch.ones(500).double())
    other = TiltedEnsemble([shifted], SeparateEnergies([Shift(0.0)]))
    other.rescale(0.0)
    return other


def test_bases_that_no_energy_tilts_are_drawn_from_without_weights(model, proposal, generator, monkeypatch):
    model.rescale(0.0)
    other = shifted_untilted(model, generator)
    density = StackedDensity([model, other], torch.tensor([0.75, 0.25]).double(), torch.zeros(2).double())
    monkeypatch.setattr("sk_ebm._sampler.log_weight", lambda *arguments: pytest.fail("weighted"))
    z = draw_from_density(density, proposal, 20_001, generator)
    assert z.shape == (20_001, 2)
    assert float((z.sum(-1) > 5).double().mean()) == pytest.approx(0.25, abs=0.005)


def test_a_mixture_of_bases_that_no_energy_tilts_is_known_to_be_normalised(model, proposal, generator, monkeypatch):
    monkeypatch.setattr("sk_ebm._fitting.draw_pool", lambda *arguments: pytest.fail("drawn"))
    model.rescale(0.0)
    assert estimate_log_normalizer_of(alone(model), proposal, generator, std_error=0.01) == (0.0, 0.0, 1.0)


def test_each_ensemble_is_drawn_by_its_share_and_in_its_own_way(model, proposal, generator, monkeypatch):
    other = shifted_untilted(model, generator, 40.0)
    log_z = estimate_log_normalizer_of(alone(model), proposal, generator, std_error=0.002).value
    shares, log_normalizers = torch.tensor([[0.7, 0.3], [log_z, 0.0]]).double()
    density = StackedDensity([model, other], shares, log_normalizers)
    both = DensityMixture([*proposal.components, other.bases[0]], [0.5 * s for s in proposal.proportions] + [0.5])
    pool = draw_pool(both, 40_000, generator)
    weight = log_weight(density, pool).softmax(0)
    weighed = []
    monkeypatch.setattr("sk_ebm._sampler.log_weight", lambda part, pool: weighed.append(part) or log_weight(part, pool))
    z = draw_from_density(density, proposal, 20_000, generator)
    assert weighed
    assert not any(part.ensembles[0].is_flat for part in weighed)
    is_far, is_far_in_pool = z.sum(-1) > 40, pool.position.sum(-1) > 40
    assert float(is_far.double().mean()) == pytest.approx(float(weight[is_far_in_pool].sum()), abs=0.01)
    near = torch.where(is_far_in_pool, 0.0, weight)
    expected = near @ pool.position / near.sum()
    torch.testing.assert_close(z[~is_far].mean(0), expected, atol=0.05, rtol=0)
    assert (expected - model.bases[0].means.mean(0)).abs().max() > 0.15


def test_draws_without_any_weight_are_the_proposals(proposal, model, generator):
    model.log_normalizers.fill_(math.nan)
    assert draw_from_density(alone(model), proposal, 50, generator).shape == (50, 2)


class Leaky(nn.Module):
    """Standard normal whose every second draw overflows."""

    def log_prob(self, z):
        return -0.5 * z.square().sum(-1) - math.log(2 * math.pi)

    def sample(self, n_samples, generator):
        z = torch.randn(n_samples, 2, dtype=torch.float64, generator=generator)
        return torch.where(torch.arange(n_samples).unsqueeze(1) % 2 == 0, z, math.inf)


def test_proposals_that_overflow_weigh_nothing(model, generator):
    pool = draw_pool(DensityMixture([Leaky(), Leaky()], [0.5, 0.5]), 1000, generator)
    assert pool.position.isfinite().all()
    assert int(pool_log_weight(model, pool)[0].isneginf().sum()) == 500
    assert (pool.controls.isfinite()).all()


class Overflowing(nn.Module):
    """Density that cannot tell how likely its own draws are."""

    def __init__(self, log_prob):
        super().__init__()
        self.value = log_prob

    def log_prob(self, z):
        return torch.full((len(z),), self.value).to(z)

    def sample(self, n_samples, generator):
        return torch.zeros(n_samples, 2).double()


@pytest.mark.parametrize("log_prob", [-math.inf, math.nan])
def test_a_proposal_without_a_density_weighs_nothing(model, generator, log_prob):
    pool = draw_pool(DensityMixture([Overflowing(log_prob), Overflowing(log_prob)], [0.5, 0.5]), 10, generator)
    assert pool_log_weight(model, pool).isneginf().all()
    assert (pool.controls == 0).all()


def test_weights_that_are_no_numbers_count_as_zero(model, proposal, generator):
    pool = draw_pool(proposal, 100, generator)
    broken = pool._replace(log_proposal=torch.where(torch.arange(100) < 50, math.inf, pool.log_proposal))
    assert torch.equal(pool_log_weight(model, broken).isneginf(), (torch.arange(100) < 50).expand(2, -1))
    no_number = alone(model, math.nan)
    assert log_weight(no_number, pool).isneginf().all()


def test_a_failed_sampler_has_no_effective_draws_and_still_starts_chains(model, proposal, generator):
    pool = draw_pool(proposal, 100, generator)
    hopeless = pool._replace(log_proposal=torch.full((100,), math.inf).double())
    start = start_chains(model, hopeless, 7, generator)
    assert start.isfinite().all()
    chains = Chains(start, global_kernel="isir", n_local_steps=1)
    assert float(chains.move(model, proposal, hopeless, generator).effective_sample_size) == 0
