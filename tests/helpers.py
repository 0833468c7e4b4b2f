"""Slow references and small tools that several test files share."""

from contextlib import contextmanager

import numpy as np
import torch

from sk_ebm._folds import Folds


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def folds(X, n_members=4):
    """Deal rows of equal weight to folds, one after the other."""
    rows = torch.from_numpy(np.asarray(X, dtype=np.float64))
    return Folds(rows, torch.ones(len(rows), dtype=torch.float64), torch.arange(len(rows)) % n_members, n_members)


@contextmanager
def global_rng_untouched():
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def integral(log_prob, n_features, *, reach=1e4, n_nodes=301):
    """Integrate a density by the trapezoid rule on a grid x = sinh(u): fine near zero, and far-reaching."""
    edge = float(torch.tensor(reach, dtype=torch.float64).asinh())
    u = torch.linspace(-edge, edge, n_nodes, dtype=torch.float64)
    grid = torch.cartesian_prod(*[u] * n_features).reshape(-1, n_features)
    with torch.no_grad():
        log_volume_element = grid.cosh().log().sum(-1)
        return float((log_prob(grid.sinh()) + log_volume_element).exp().sum() * (u[1] - u[0]) ** n_features)
