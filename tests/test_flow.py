"""The flow is a normalised density that starts at the identity, whatever its dimension and dtype."""

import math
import pickle

import pytest
import torch
from helpers import global_rng_untouched, integral, normal, seeded

from sk_ebm._flow import make_flow
from sk_ebm._mixture import fit_gaussian

DTYPES = [torch.float32, torch.float64]
# One feature has no coupling: there, both kinds are the same elementwise spline.
FLOWS = [("spline", 1), ("spline", 2), ("spline", 3), ("spline", 7), ("affine", 2), ("affine", 3), ("affine", 7)]
FLOWS += [("spline on own axes", 2), ("spline on own axes", 7)]


def build(kind, n_features, dtype=torch.float64, *, noise=0.3):
    """Build a flow; `noise` is the standard deviation added to every parameter, zero for the untrained flow."""
    kind, _, own_axes = kind.partition(" on ")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = make_flow(kind, n_features, n_layers=2, hidden_units=16, own_axes=bool(own_axes)).to(dtype)
    generator = seeded(1)
    for parameter in flow.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return flow.requires_grad_(False)


def standard_normal_log_prob(z):
    return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)


def to_noise(flow, z):
    for layer in reversed(flow.layers):
        z = layer.inverse(z)[0]
    return z


@pytest.mark.parametrize(("kind", "n_features"), FLOWS)
class TestFlow:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtype_is_that_of_the_parameters(self, kind, n_features, dtype):
        flow = build(kind, n_features, dtype)
        z, log_prob = flow.sample_and_log_prob(10, seeded())
        assert {z.dtype, log_prob.dtype, flow.log_prob(z).dtype, flow.sample(3, seeded()).dtype} == {dtype}
        assert z.shape == (10, n_features)
        assert log_prob.shape == flow.log_prob(z).shape == (10,)

    # Parameters are born in single precision, so the identity is one up to that.
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
    def test_untrained_flow_is_the_standard_normal(self, kind, n_features, dtype, tolerance):
        z = 3 * normal(500, n_features).to(dtype)
        log_prob = build(kind, n_features, dtype, noise=0).log_prob(z)
        torch.testing.assert_close(log_prob, standard_normal_log_prob(z), rtol=tolerance, atol=tolerance)

    def test_log_density_is_that_of_the_layers(self, kind, n_features):
        flow = build(kind, n_features)
        # Some rows beyond the bound of the splines, some on it.
        z = (3 * normal(200, n_features)).clamp(max=5.0)
        noise, log_det = z, 0.0
        for layer in reversed(flow.layers):
            noise, log_det_layer = layer.inverse(noise)
            log_det = log_det + log_det_layer
        torch.testing.assert_close(flow.log_prob(z), standard_normal_log_prob(noise) + log_det)

    def test_flow_starts_at_the_gaussian_that_it_is_given(self, kind, n_features):
        z = 0.5 + normal(200, n_features) @ (torch.eye(n_features) + 0.3).double()
        gaussian = fit_gaussian(z, torch.ones(200, dtype=torch.float64))
        untrained, flow = build(kind, n_features, noise=0), build(kind, n_features)
        untrained.start_at(gaussian.means[0], gaussian.scale_trils[0])
        torch.testing.assert_close(untrained.log_prob(z), gaussian.log_prob(z), rtol=1e-5, atol=1e-5)
        flow.start_at(gaussian.means[0], gaussian.scale_trils[0])
        draws, log_prob = flow.sample_and_log_prob(100, seeded())
        torch.testing.assert_close(flow.log_prob(draws), log_prob, rtol=1e-6, atol=1e-6)

    def test_perturbed_flow_is_another_density(self, kind, n_features):
        z = normal(500, n_features)
        assert float((build(kind, n_features).log_prob(z) - standard_normal_log_prob(z)).abs().max()) > 0.1

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.float64, 1e-7)])
    def test_draws_carry_their_log_prob(self, kind, n_features, dtype, tolerance):
        flow = build(kind, n_features, dtype)
        z, log_prob = flow.sample_and_log_prob(2000, seeded())
        torch.testing.assert_close(log_prob, flow.log_prob(z), rtol=tolerance, atol=tolerance)

    def test_log_det_agrees_with_autograd(self, kind, n_features):
        flow, z = build(kind, n_features), 2 * normal(20, n_features)
        for row in z:
            jacobian = torch.autograd.functional.jacobian(lambda x: to_noise(flow, x[None])[0], row)
            noise = to_noise(flow, row[None])
            expected = standard_normal_log_prob(noise) + torch.linalg.slogdet(jacobian).logabsdet
            torch.testing.assert_close(flow.log_prob(row[None]), expected, rtol=1e-8, atol=1e-8)

    def test_rows_do_not_depend_on_their_batch(self, kind, n_features):
        flow, z = build(kind, n_features), normal(30, n_features)
        rows = torch.cat([flow.log_prob(row[None]) for row in z])
        torch.testing.assert_close(flow.log_prob(z), rows, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("far", [-1e4, -5.0, 5.0, 1e4])
    def test_far_and_edge_points_are_finite(self, kind, n_features, far, dtype):
        log_prob = build(kind, n_features, dtype).log_prob(torch.full((2, n_features), far, dtype=dtype))
        assert bool(log_prob.isfinite().all())

    def test_seeded_is_equal_and_leaves_the_global_generator(self, kind, n_features):
        flow = build(kind, n_features)
        with global_rng_untouched():
            first, second, other = (flow.sample(20, seeded(seed)) for seed in (1, 1, 2))
            flow.log_prob(first)
        assert torch.equal(first, second)
        assert not torch.equal(first, other)

    def test_pickled_is_the_same(self, kind, n_features):
        flow, z = build(kind, n_features), normal(20, n_features)
        copy = pickle.loads(pickle.dumps(flow))
        assert torch.equal(copy.log_prob(z), flow.log_prob(z))
        assert torch.equal(copy.sample(5, seeded()), flow.sample(5, seeded()))

    def test_every_parameter_has_a_gradient(self, kind, n_features):
        flow = build(kind, n_features).requires_grad_(True)
        flow.log_prob(normal(200, n_features)).sum().backward()
        assert all(bool((parameter.grad != 0).any()) for parameter in flow.parameters())


@pytest.mark.parametrize(("kind", "n_features"), [flow for flow in FLOWS if flow[1] <= 2])
def test_perturbed_flow_integrates_to_one(kind, n_features):
    assert integral(build(kind, n_features).log_prob, n_features, reach=12) == pytest.approx(1, abs=2e-3)


def test_perturbed_flow_in_one_dimension_draws_from_its_density():
    flow, edges = build("spline", 1), torch.linspace(-4, 4, 801).double()
    density = flow.log_prob(edges[:, None]).exp()
    cdf = torch.cumulative_trapezoid(density, edges)
    below = (flow.sample(50_000, seeded()) < edges[1:]).double().mean(0)
    assert float((below - cdf).abs().max()) < 2 / math.sqrt(50_000)
