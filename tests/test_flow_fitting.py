"""Flows are fitted by maximum likelihood, side by side as each would be alone."""

import copy
import math

import pytest
import torch
from helpers import normal, seeded

from sk_ebm._flow import make_flow
from sk_ebm._flow_fitting import _Stack, fit_flows

SETTINGS = {"max_steps": 150, "batch_size": 128}


@pytest.fixture
def rows():
    """Two clusters."""
    return (normal(400, 2) * 0.3 + 2.0 * (normal(400, 1, seed=1) > 0) - 1).float()


def make_flows(n_flows, n_features=2, kind="spline"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [make_flow(kind, n_features, hidden_units=16) for _ in range(n_flows)]


def folds(n_flows):
    is_held_out = torch.arange(400) % 4 == torch.arange(n_flows).unsqueeze(-1)
    return 1.0 * ~is_held_out, 1.0 * is_held_out


@torch.no_grad()
def mean_log_prob(flow, rows, weight):
    return float(weight @ flow.log_prob(rows) / weight.sum())


def test_weighted_rows_pull_the_flow(rows):
    (flow,) = make_flows(1)
    weight = torch.where(rows[:, 0] > 0, 1.0, 0.05)
    fit_flows([flow], rows, weight[None], weight[None], generator=seeded(), **SETTINGS)
    with torch.no_grad():
        share = float((flow.sample(2000, seeded())[:, 0] > 0).float().mean())
    assert share == pytest.approx(float(weight[rows[:, 0] > 0].sum() / weight.sum()), abs=0.1)


@pytest.mark.parametrize("n_flows", [1, 3])
def test_every_flow_is_left_at_its_best_held_out_score(rows, n_flows):
    flows = make_flows(n_flows)
    weight, held_out = folds(n_flows)
    before = [mean_log_prob(flow, rows, of_flow) for flow, of_flow in zip(flows, held_out, strict=True)]
    scores = fit_flows(flows, rows, weight, held_out, generator=seeded(), **SETTINGS)
    for flow, of_flow, score, at_first in zip(flows, held_out, scores, before, strict=True):
        assert score == pytest.approx(mean_log_prob(flow, rows, of_flow), abs=1e-4)
        assert score > at_first + 0.2
        assert all(parameter.requires_grad for parameter in flow.parameters())


@pytest.mark.parametrize("max_steps", [16, 49])
def test_the_last_steps_count_however_few_there_are(rows, max_steps):
    (flow,) = make_flows(1)
    weight, held_out = folds(1)
    before = mean_log_prob(flow, rows, held_out[0])
    fit_flows([flow], rows, weight, held_out, generator=seeded(), max_steps=max_steps, batch_size=128)
    assert mean_log_prob(flow, rows, held_out[0]) > before + 0.3


def test_a_flow_of_few_rows_goes_back_to_before_it_learnt_them_by_heart(rows):
    flows = make_flows(2)
    weight, held_out = folds(2)
    weight[0] *= torch.arange(400) < 20
    scores = fit_flows(flows, rows, weight, held_out, generator=seeded(), max_steps=300, batch_size=128)
    assert scores[0] == pytest.approx(mean_log_prob(flows[0], rows, held_out[0]), abs=1e-4)
    # The other one has learnt more meanwhile.
    assert scores[1] > scores[0] + 0.1


def test_what_is_kept_of_a_stack_goes_on_as_it_would_have():
    z = normal(3, 50, 2).float()

    def take_steps(kept):
        stack = _Stack(make_flows(3))
        optimizer = torch.optim.AdamW(stack.parameters.values(), lr=0.01, fused=True)
        for part in (torch.arange(3), kept):
            if len(part) < 3:
                stack.keep(torch.tensor([True, False, True]), optimizer)
            for _ in range(5):
                optimizer.zero_grad()
                stack.log_prob(z[part]).sum().neg().backward()
                optimizer.step()
        return stack.log_prob(z[part]).detach()

    everyone, kept = torch.arange(3), torch.tensor([0, 2])
    torch.testing.assert_close(take_steps(kept), take_steps(everyone)[kept], rtol=1e-4, atol=1e-4)


def test_flows_that_have_stopped_cost_nothing(rows, monkeypatch):
    sizes = []
    log_prob = _Stack.log_prob

    def counted(stack, z):
        sizes.append(len(z))
        return log_prob(stack, z)

    monkeypatch.setattr(_Stack, "log_prob", counted)
    weight, held_out = folds(3)
    weight[0] *= torch.arange(400) < 20
    fit_flows(make_flows(3), rows, weight, held_out, generator=seeded(), max_steps=300, batch_size=128)
    assert sizes[0] == 3
    assert sizes[-1] < 3


def test_folds_of_unlike_size_are_judged_by_their_own_rows(rows):
    flows = make_flows(2)
    weight, held_out = folds(2)
    held_out[1] *= torch.arange(400) < 100
    held_out[1] *= 1 + (torch.arange(400) % 3)
    scores = fit_flows(flows, rows, weight, held_out, generator=seeded(), **SETTINGS)
    for flow, of_flow, score in zip(flows, held_out, scores, strict=True):
        assert score == pytest.approx(mean_log_prob(flow, rows, of_flow), abs=1e-4)


@pytest.mark.parametrize(("kind", "n_features"), [("spline", 1), ("spline", 2), ("spline", 5), ("affine", 5)])
def test_side_by_side_they_are_evaluated_as_one_by_one(kind, n_features):
    flows = make_flows(3, n_features, kind)
    for k, flow in enumerate(flows):
        flow.start_at(torch.full((n_features,), float(k)), torch.eye(n_features) * (1 + k))
        for parameter in flow.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=seeded(k))
    z = 2 * normal(3, 50, n_features).float()
    expected = torch.stack([flow.log_prob(part) for flow, part in zip(flows, z, strict=True)])
    stack = _Stack(flows)
    torch.testing.assert_close(stack.log_prob(z), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_Stack(flows[:1]).log_prob(z[:1]), expected[:1], rtol=1e-4, atol=1e-4)
    stack.log_prob(z).sum().backward()
    expected.sum().backward()
    for name, parameter in flows[1].named_parameters():
        gradient = stack.parameters[f"density.{name}"].grad[1]
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-3)


def test_a_flow_that_breaks_stays_at_its_best_and_leaves_the_others_alone(rows):
    flows = make_flows(2)
    healthy = copy.deepcopy(flows[1])
    with torch.no_grad():
        next(flows[0].parameters()).fill_(math.nan)
    weight, held_out = folds(2)
    scores = fit_flows(flows, rows, weight, held_out, generator=seeded(), **SETTINGS)
    assert scores[0] == -math.inf
    assert scores[1] > mean_log_prob(healthy, rows, held_out[1]) + 0.2
