"""The training loop: stopping rule, restoring the best, and backing off."""

import math
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from sk_ebm._energy import MLPEnergies, SeparateEnergies
from sk_ebm._flow import make_flow
from sk_ebm._folds import Folds
from sk_ebm._mixture import fit_gaussian
from sk_ebm._model import TiltedEnsemble
from sk_ebm._training import Monitor, Outcome, TrainSettings, _descend, _TrainState, train

SETTINGS = {
    "max_iter": 20,
    "learning_rate": 0.01,
    "weight_decay": 0.0,
    "batch_size": 128,
    "n_chains": 128,
    "pool_size": 256,
    "global_kernel": "isir",
    "n_local_steps": 1,
    "early_stopping": True,
    "n_iter_no_change": 2,
    "tol": 1e-3,
}


def settings(**changes):
    return TrainSettings(**{**SETTINGS, **changes})


def problem(make_energy=None, n_members=2):
    """Two clusters, Gaussian bases and a flow at the identity."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400, 2, generator=generator) * 0.3 + 2.0 * (torch.rand(400, 1, generator=generator) < 0.5) - 1
    data = Folds(z, torch.ones(400), torch.arange(400) % max(n_members, 2), n_members)
    bases = [fit_gaussian(z, weight) for weight in data.train_weight()]
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(0)
    own = make_energy and SeparateEnergies([make_energy(2) for _ in bases])
    model = TiltedEnsemble(bases, own or MLPEnergies(n_members, 2, (32, 32)))
    flow = make_flow("spline", 2)
    torch.set_rng_state(state)
    return model, flow, data, generator


@pytest.mark.parametrize("n_members", [1, 2])
@pytest.mark.parametrize("global_kernel", ["isir", "imh"])
def test_training_improves_the_held_out_likelihood(n_members, global_kernel):
    model, flow, data, generator = problem(n_members=n_members)
    result = train(model, flow, data, settings(max_iter=25, global_kernel=global_kernel), generator)
    assert result.history[0]["iteration"] == 0
    assert result.held_out_log_likelihood > result.history[0]["validation_log_likelihood"] + 0.2


def test_soap_improves_the_held_out_likelihood_and_moves_matrices_at_a_higher_rate():
    model, flow, data, generator = problem()
    result = train(model, flow, data, settings(max_iter=25, soap=True), generator)
    assert result.held_out_log_likelihood > result.history[0]["validation_log_likelihood"] + 0.2
    state = _TrainState(model, flow, data, settings(soap=True), generator)
    for n_steps in (1, 2):
        state._set_learning_rate()
        rates = [group["lr"] for group in state.energy_optimizer.param_groups]
        assert rates[0] == pytest.approx(0.01 * n_steps / 200, rel=0.02)
        assert rates[1] == pytest.approx(8 * rates[0])


def test_the_best_check_is_what_is_returned():
    model, flow, data, generator = problem()
    result = train(model, flow, data, settings(), generator)
    assert result.held_out_log_likelihood == max(check["validation_log_likelihood"] for check in result.history)
    log_prob = result.model.base_log_prob(data.rows) - result.model.energy(data.rows)
    grid = torch.cartesian_prod(torch.linspace(-5, 5, 300), torch.linspace(-5, 5, 300))
    log_z = result.model.log_density(grid).logsumexp(-1) + 2 * math.log(10 / 299)
    exact = data.held_out_mean(log_prob - log_z.unsqueeze(-1))
    assert result.held_out_log_likelihood == pytest.approx(exact, abs=0.06)


def test_an_energy_that_cannot_improve_converges():
    class Constant(nn.Module):
        def __init__(self, n_features):
            super().__init__()
            self.level = nn.Parameter(torch.zeros(()))

        def forward(self, z):
            return self.level.expand(len(z))

    model, flow, data, generator = problem(Constant)
    result = train(model, flow, data, settings(max_iter=60, tol=0.05), generator)
    assert result.outcome is Outcome.CONVERGED
    assert result.n_iter < 60


def test_a_sampler_that_cannot_follow_stops_training_by_name():
    class Spikes(nn.Module):
        def __init__(self, n_features):
            super().__init__()
            self.height = nn.Parameter(torch.tensor(1000.0))

        def forward(self, z):
            return self.height * torch.sin(50 * z).sum(-1)

    model, flow, data, generator = problem(Spikes)
    result = train(model, flow, data, settings(max_iter=60, n_iter_no_change=100), generator)
    assert result.outcome is Outcome.SAMPLER_TOO_WEAK


def check(iteration, score, effective_sample_size=0.5):
    return {
        "iteration": iteration,
        "validation_log_likelihood": score,
        "effective_sample_size": effective_sample_size,
    }


def test_monitor_stops_after_the_agreed_number_of_stale_checks_and_keeps_the_best():
    monitor = Monitor(settings(n_iter_no_change=2, tol=0.1))
    scores = [1.0, 2.0, 2.05, 1.5]
    stops = []
    for iteration, score in enumerate(scores):
        monitor.record(check(iteration, score), lambda i=iteration: i)
        stops.append(monitor.reason_to_stop())
    assert stops == [None, None, None, Outcome.CONVERGED]
    assert monitor.best == 2


def test_energies_that_do_not_beat_the_start_are_given_up_early():
    monitor = Monitor(settings(n_iter_no_change=9, n_iter_first_gain=2))
    stops = []
    for iteration, score in enumerate([1.0, 0.9, 0.8]):
        monitor.record(check(iteration, score), lambda: None)
        stops.append(monitor.reason_to_stop())
    assert stops == [None, None, Outcome.CONVERGED]
    assert monitor.gain() == 0


@pytest.mark.parametrize(
    ("gain", "by_chance", "reason"),
    [(0.002, 0.01, Outcome.CONVERGED), (0.004, 0.01, None), (0.0005, 0.0004, Outcome.CONVERGED), (0.001, 0.0004, None)],
)
def test_energies_that_gain_next_to_nothing_at_first_are_given_up_too(gain, by_chance, reason):
    monitor = Monitor(settings(tol=0.001, n_iter_no_change=9, n_iter_first_gain=2), by_chance)
    for iteration, score in enumerate([-1.0, -1.0 + gain, -1.0 + gain]):
        assert monitor.reason_to_stop() is None
        monitor.record(check(iteration, score), lambda: None)
    assert monitor.reason_to_stop() is reason


def test_a_first_gain_is_due_only_once_scores_count():
    monitor = Monitor(settings(n_iter_no_change=9, n_iter_first_gain=2))
    stops = []
    for iteration, effective_sample_size in enumerate([0.001, 0.001, 0.5, 0.5, 0.5]):
        monitor.record(check(iteration, -1.0, effective_sample_size), lambda: None)
        stops.append(monitor.reason_to_stop())
    assert stops == [None, None, None, None, Outcome.CONVERGED]


@pytest.mark.parametrize(("soap", "promise"), [(False, -0.7), (True, -0.5)])
def test_a_base_that_gains_fast_is_given_more_time(soap, promise):
    monitor = Monitor(settings(tol=0.0, soap=soap))
    for iteration, score in enumerate([-2.0, -1.0]):
        monitor.record(check(iteration, score), lambda: None)
    assert monitor.promise() == pytest.approx(promise)


def test_monitor_keeps_the_start_unless_energies_beat_it_clearly():
    monitor = Monitor(settings(tol=0.1))
    for iteration, score in enumerate([1.0, 1.09, 1.08]):
        monitor.record(check(iteration, score), lambda i=iteration: i)
    assert monitor.best == 0


def test_monitor_without_early_stopping_keeps_the_last():
    monitor = Monitor(settings(early_stopping=False, n_iter_no_change=1))
    for iteration, score in enumerate([3.0, 2.0, 1.0]):
        monitor.record(check(iteration, score), lambda i=iteration: i)
    assert monitor.best == 2
    assert monitor.reason_to_stop() is None


@pytest.mark.parametrize("early_stopping", [True, False])
def test_monitor_does_not_believe_scores_whose_normalizer_is_uncertain(early_stopping):
    monitor = Monitor(settings(early_stopping=early_stopping, min_effective_sample_size=0.02))
    for iteration, (score, effective_sample_size) in enumerate([(1.0, 0.5), (2.0, 0.5), (9.0, 0.001)]):
        monitor.record(check(iteration, score, effective_sample_size), lambda i=iteration: i)
    assert monitor.best == 1
    assert monitor.best_score == 2.0


def test_a_first_score_that_is_uncertain_gives_way_to_one_that_is_not():
    monitor = Monitor(settings(n_iter_no_change=3))
    for iteration, (score, effective_sample_size) in enumerate([(9.0, 0.001), (1.0, 0.5), (2.0, 0.5)]):
        monitor.record(check(iteration, score, effective_sample_size), lambda i=iteration: i)
    assert monitor.best == 2
    assert monitor.best_score == 2.0


def test_nothing_but_uncertain_scores_is_no_convergence():
    monitor = Monitor(settings(n_iter_no_change=2))
    monitor.record(check(0, 1.0), lambda: 0)
    for iteration in (1, 2):
        assert monitor.reason_to_stop() is None
        monitor.record(check(iteration, 1.0, 0.001), lambda: 1)
    assert monitor.reason_to_stop() is Outcome.SAMPLER_TOO_WEAK


@pytest.mark.parametrize(("soap", "n_iter"), [(False, 6), (True, 9)])
def test_training_gives_up_a_base_that_trails_another_too_far(soap, n_iter):
    model, flow, data, generator = problem()
    result = train(model, flow, data, settings(max_iter=24, soap=soap, validate_every=1), generator, rival_score=1e3)
    assert result.outcome is Outcome.LEFT_BEHIND
    assert result.n_iter == n_iter


@pytest.mark.parametrize(("rival_score", "outcome"), [(1e3, Outcome.LEFT_BEHIND), (-1e3, Outcome.CONVERGED)])
def test_a_base_that_gains_nothing_may_be_left_behind_sooner(rival_score, outcome):
    model, flow, data, generator = problem()
    checks = {"n_iter_no_change": 9, "n_iter_first_gain": 3, "validate_every": 1}
    nothing = settings(max_iter=24, learning_rate=1e-9, **checks)
    result = train(model, flow, data, nothing, generator, rival_score=rival_score)
    assert result.outcome is outcome
    assert result.n_iter == 3


@pytest.mark.parametrize(("stop_at", "n_iter"), [(0, 0), (5, 5), (7, 7)])
def test_training_stops_at_the_check_where_it_is_asked_to(stop_at, n_iter):
    model, flow, data, generator = problem()
    result = train(
        model, flow, data, settings(max_iter=7), generator, lambda check, snapshot: check["iteration"] == stop_at
    )
    assert result.outcome is Outcome.STOPPED
    assert result.n_iter == n_iter


def test_a_gradient_that_is_no_number_takes_no_step():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0, fused=True)
    _descend((parameter * math.nan).sum(), optimizer, [parameter])
    assert parameter.tolist() == [1, 1]
    _descend(parameter.sum(), optimizer, [parameter])
    assert parameter.tolist() == pytest.approx([0.9, 0.9])


def test_backing_off_returns_to_the_best_energies_at_half_the_rate():
    best = nn.Linear(2, 1)
    state = Mock(learning_rate=0.4, model=Mock(energies=nn.Linear(2, 1)), average=Mock(energies=nn.Linear(2, 1)))
    _TrainState.back_off(state, Mock(energies=best))
    assert state.learning_rate == pytest.approx(0.2)
    assert state.energy_optimizer is state._new_energy_optimizer.return_value
    for target in (state.model, state.average):
        assert torch.equal(target.energies.weight, best.weight)
