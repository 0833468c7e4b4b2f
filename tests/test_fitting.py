"""What is done with trained candidates: energies scaled down, pools mixed and normalised."""

from types import SimpleNamespace

import pytest
import torch
from helpers import folds, integral, normal, seeded
from torch import nn

from sk_ebm._energy import SeparateEnergies
from sk_ebm._fitting import Candidate, _covering_proposal, _joint_proposal, _stack, _Trainer
from sk_ebm._mixture import fit_gaussian
from sk_ebm._model import TiltedEnsemble
from sk_ebm._training import Outcome, TrainResult


class Slope(nn.Module):
    """Energy that moves a standard normal to `mean`, and whose log Z is off by `log_normalizer`."""

    def __init__(self, mean, log_normalizer=0.0):
        super().__init__()
        self.mean, self.log_normalizer = mean, log_normalizer

    def forward(self, z):
        return 0.5 * self.mean**2 - self.mean * z.sum(-1) - self.log_normalizer


def candidate(*energies):
    """Return a candidate of energies on standard normals, which a standard normal proposes for."""
    z = normal(20_000, 1)
    base = fit_gaussian((z - z.mean()) / z.std(), torch.ones(20_000).double())
    model = TiltedEnsemble([base] * len(energies), SeparateEnergies(energies)).double()
    return Candidate("gaussian", model, base, TrainResult(model, base, [], 1, Outcome.MAX_ITER, 0.0, {}))


def temper(candidates, X, *, least=0.02):
    trainer = _Trainer.__new__(_Trainer)
    trainer.settings = SimpleNamespace(train=SimpleNamespace(tol=0.002, min_effective_sample_size=least))
    trainer.data = trainer.judged = folds(X, 2)
    trainer.common_generator = seeded()
    return trainer.temper(candidates)


def stack(candidates, shares, std_error):
    return _stack(candidates, shares, _joint_proposal(candidates, shares), seeded(), std_error)


def test_a_member_that_its_proposals_do_not_cover_is_scaled_down_further():
    X = 3 + normal(500, 1)
    (both,) = temper([candidate(Slope(1.0), Slope(4.0))], X)
    # Draws of a normal weighted to another have an effective sample size of exp(-distance^2), about, which is .37 here
    # and 1e-7, or .02 at half the slope.
    assert both.model.scale.tolist() == [1.0, 0.5]
    (both,) = temper([candidate(Slope(1.0), Slope(4.0))], X, least=0.0)
    assert both.model.scale.tolist() == [1.0, 1.0]


def test_energies_that_make_rows_less_likely_are_switched_off_and_need_no_log_normalizer(monkeypatch):
    (useless,) = temper([candidate(Slope(1.0), Slope(-1.0))], normal(500, 1))
    assert useless.model.is_flat
    monkeypatch.setattr("sk_ebm._fitting.draw_pool", lambda *arguments: pytest.fail("drawn"))
    assert stack([useless], [1.0], 0.01)[1] == (0.0, 0.0, 1.0)


def test_a_mixture_of_pools_is_normalised():
    first, second = candidate(Slope(0.5, 2.0), Slope(0.7, -1.0)), candidate(Slope(-1.2, 5.0))
    model, (value, std_error, fraction) = stack([first, second], [0.75, 0.25], 0.002)
    assert 0 < std_error < 0.003
    assert integral(lambda z: model.log_density(z) - value, 1) == pytest.approx(1, abs=5 * std_error)
    parts = [integral(part.log_density, 1) for part in model.parts()]
    assert parts[0] == pytest.approx(parts[1], rel=0.02)
    assert 0.3 < fraction < 1


def test_one_base_that_no_energy_tilts_stands_for_all_beside_energies():
    tilted, flat = candidate(Slope(0.5), Slope(0.7)), candidate(Slope(0.0), Slope(0.0), Slope(0.0))
    flat.model.rescale(0.0)
    proposal = _covering_proposal([tilted, flat])
    assert len(proposal.components) == 1 + 2 + 1
    assert proposal.proportions == pytest.approx([0.35, 0.075, 0.075, 0.5])
    # Draws are made from all of them.
    assert len(_joint_proposal([tilted, flat], [0.5, 0.5]).components) == 1 + 2 + 3
