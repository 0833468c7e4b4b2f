"""Tilted ensembles: signs, pooling, and bounded energies."""

import math

import pytest
import torch
from helpers import normal
from torch import nn

from sk_ebm._energy import MLPEnergies, SeparateEnergies, WhitenedEnergies, resolve_hidden_layer_sizes
from sk_ebm._mixture import fit_gaussian
from sk_ebm._model import StackedDensity, TiltedEnsemble


def ensemble(n_members=2, n_features=2, seed=0):
    """Ensemble whose energies are not zero, in float64."""
    torch_state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    energies = MLPEnergies(n_members, n_features, (8,))
    nn.init.normal_(energies.weights[-1])
    z = torch.randn(50 * n_members, n_features, dtype=torch.float64)
    torch.set_rng_state(torch_state)
    bases = [fit_gaussian(part, torch.ones(50, dtype=torch.float64)) for part in z.split(50)]
    return TiltedEnsemble(bases, energies).double(), z


def test_a_low_energy_is_likely():
    model, z = ensemble(1)
    torch.testing.assert_close(model.log_density(z)[0], model.bases[0].log_prob(z) - model.energy(z)[0])


def test_members_see_shared_rows_or_their_own():
    model, z = ensemble(2)
    own = torch.stack([z[:10], z[10:20]])
    shared = model.log_density(z[:20])
    torch.testing.assert_close(model.log_density(own), torch.stack([shared[0, :10], shared[1, 10:]]))


def test_pool_averages_energies_and_mixes_bases():
    model, z = ensemble(3)
    model.bases = torch.nn.ModuleList([model.bases[0]] * 3)
    model.log_normalizers = torch.tensor([0.1, -0.5, 0.7], dtype=torch.float64)
    torch.testing.assert_close(model.pooled_log_density(z), model.bases[0].log_prob(z) - model.energy(z).mean(0) - 0.1)


def test_energies_count_in_the_pool_by_the_shares_of_their_bases():
    model, z = ensemble(3)
    model.log_normalizers = torch.tensor([0.1, -0.5, 0.7], dtype=torch.float64)
    base = torch.stack([base.log_prob(z).exp() for base in model.bases])
    energy = model.energy(z) + model.log_normalizers.unsqueeze(-1)
    expected = base.mean(0).log() - (base * energy).sum(0) / base.sum(0)
    torch.testing.assert_close(model.pooled_log_density(z), expected)


def test_each_energy_has_its_scale_and_scaled_by_zero_it_is_none():
    model, z = ensemble(2)
    full = model.energy(z)
    model.scale = torch.tensor([0.5, 0.0], dtype=torch.float64)
    model.energies.biases[-1].data[1] = math.inf
    torch.testing.assert_close(model.energy(z), torch.stack([0.5 * full[0], torch.zeros(len(z)).double()]))
    torch.testing.assert_close(model.frozen_copy().energy(z), model.energy(z))
    model.thaw()
    assert model.energy(z)[1].isinf().all()


def test_pool_is_nowhere_above_the_mixture_of_the_members():
    model, z = ensemble(3)
    model.log_normalizers = torch.tensor([0.1, -0.5, 0.7], dtype=torch.float64)
    members = model.log_density(z) - model.log_normalizers.unsqueeze(-1)
    mixture = members.logsumexp(0) - math.log(3)
    assert (model.pooled_log_density(z) <= mixture + 1e-12).all()
    assert (model.pooled_log_density(z) < mixture - 0.1).any()


def test_a_member_without_mass_has_no_say_in_the_pool():
    model, z = ensemble(2)
    expected = model.log_density(z)[0] - math.log(2)
    without_mass = model.bases[1]
    without_mass.log_prob = lambda z: torch.full((len(z),), -math.inf, dtype=z.dtype)
    model.energies.biases[-1].data[1] = math.inf
    torch.testing.assert_close(model.pooled_log_density(z), expected)
    model.bases[0].log_prob = without_mass.log_prob
    assert model.pooled_log_density(z).isneginf().all()


def test_stack_is_the_mixture():
    first, z = ensemble(2, seed=0)
    second, _ = ensemble(1, seed=1)
    shares, log_normalizers = torch.tensor([[0.25, 0.75], [0.5, -0.2]], dtype=torch.float64)
    stack = StackedDensity([first, second], shares, log_normalizers)
    normalised = [
        first.pooled_log_density(z).exp() / math.exp(0.5),
        second.pooled_log_density(z).exp() / math.exp(-0.2),
    ]
    expected = 0.25 * normalised[0] + 0.75 * normalised[1]
    torch.testing.assert_close(stack.log_density(z).exp(), expected)


def test_frozen_copy_does_not_follow_the_original():
    model, z = ensemble(2)
    copy = model.frozen_copy()
    before = copy.energy(z)
    nn.init.zeros_(model.energies.weights[-1])
    torch.testing.assert_close(copy.energy(z), before)
    assert not any(parameter.requires_grad for parameter in copy.parameters())


def test_energies_are_bounded_however_far_out():
    model, _ = ensemble(1)
    direction = torch.randn(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    near, far = model.energy(1e5 * direction), model.energy(1e9 * direction)
    torch.testing.assert_close(near, far, rtol=1e-2, atol=1e-2)


def test_untrained_energy_is_zero():
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(MLPEnergies(2, 3, (4, 4))(z), torch.zeros(2, 5))


@pytest.mark.parametrize(("n_samples", "width"), [(20, 64), (1000, 64), (5000, 96), (10**7, 128)])
def test_network_grows_with_the_data(n_samples, width):
    assert resolve_hidden_layer_sizes(n_samples) == (width,) * 3


def test_energies_that_are_switched_off_are_not_evaluated():
    z = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    base = fit_gaussian(z, torch.ones(5).double())
    model = TiltedEnsemble([base, base], MLPEnergies(2, 2, (4,)).double())
    model.log_normalizers.fill_(0.3)
    model.rescale(0.0)
    expected = model.base_log_prob(z).logsumexp(0) - math.log(len(model))
    model.energies = None
    assert torch.equal(model.energy(z), torch.zeros(len(model), 5).double())
    torch.testing.assert_close(model.pooled_log_density(z), expected)
    assert model.is_flat


def test_a_frozen_copy_keeps_dtype_and_scale():
    base = fit_gaussian(torch.randn(9, 2, dtype=torch.float64), torch.ones(9).double())
    model = TiltedEnsemble([base, base], MLPEnergies(2, 2, (4,))).double()
    model.rescale(0.5)
    frozen = model.frozen_copy()
    assert frozen.scale.dtype == torch.float64
    assert torch.equal(frozen.scale, model.scale)
    assert not frozen.is_flat


def test_whitened_energies_are_those_of_whitened_rows():
    networks = [nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double() for _ in range(2)]
    means, whiteners, z = normal(2, 3), normal(2, 3, 3, seed=1), normal(2, 5, 3, seed=2)
    energies = WhitenedEnergies(SeparateEnergies(networks), means, whiteners)
    for k in range(2):
        torch.testing.assert_close(energies(z)[k], networks[k]((z[k] - means[k]) @ whiteners[k].T))
        torch.testing.assert_close(energies(z[0])[k], networks[k]((z[0] - means[k]) @ whiteners[k].T))
