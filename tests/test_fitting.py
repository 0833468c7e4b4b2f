"""What is done with trained candidates: energies scaled down, pools mixed and normalised."""

from types import SimpleNamespace

import pytest
import torch
from helpers import folds, integral, normal, seeded
from torch import nn

from sk_ebm._energy import SeparateEnergies
from sk_ebm._fitting import Candidate, _stack, _Trainer
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
    settings = SimpleNamespace(train=SimpleNamespace(tol=0.002, min_effective_sample_size=least))
    trainer = SimpleNamespace(judged=folds(X, 2), settings=settings, common_generator=seeded())
    return _Trainer.temper(trainer, candidates)


def test_a_member_that_its_proposals_do_not_cover_is_scaled_down_further():
    X = 3 + normal(500, 1)
    (both,) = temper([candidate(Slope(1.0), Slope(4.0))], X)
    # Draws of a normal weighted to another have an effective sample size of exp(-distance^2), about, which is .37 here
    # and 1e-7, or .02 at half the slope.
    assert both.model.scale.tolist() == [1.0, 0.5]
    torch.testing.assert_close(both.model.log_normalizers, torch.tensor([0.0, -2.0]).double(), atol=0.3, rtol=0)
    (both,) = temper([candidate(Slope(1.0), Slope(4.0))], X, least=0.0)
    assert both.model.scale.tolist() == [1.0, 1.0]


def test_energies_that_make_rows_less_likely_are_switched_off_and_nothing_is_drawn_for_them(monkeypatch):
    (useless,) = temper([candidate(Slope(1.0), Slope(-1.0))], normal(500, 1))
    assert useless.model.is_flat
    monkeypatch.setattr("sk_ebm._fitting.draw_pool", lambda *arguments: pytest.fail("drawn"))
    assert temper([useless], normal(500, 1)) == [useless]
    _, log_normalizer = _stack([useless], [1.0], seeded(), 0.01)
    assert log_normalizer == (0.0, 0.0, 1.0)


def test_a_mixture_of_pools_is_normalised_by_the_proposals_of_each():
    first, second = candidate(Slope(0.5, 2.0), Slope(0.7, -1.0)), candidate(Slope(-1.2, 5.0))
    model, log_normalizer = _stack([first, second], [0.75, 0.25], seeded(), 0.002)
    value, std_error, fraction = log_normalizer
    assert 0 < std_error < 0.003
    assert integral(lambda z: model.log_density(z) - value, 1) == pytest.approx(1, abs=5 * std_error)
    parts = [integral(part.log_density, 1) for part in model.parts()]
    assert parts[0] == pytest.approx(parts[1], rel=0.02)
    alone = [_stack([part], [1.0], seeded(), 0.002)[1].effective_sample_size for part in (first, second)]
    assert fraction == pytest.approx(1 / (0.75 / alone[0] + 0.25 / alone[1]), rel=0.02)
    assert alone[1] < 0.5 * alone[0]
