"""The optimiser of the energies with many rows: what it adds to AdamW, and what it leaves as it is."""

import math

import pytest
import torch
from torch import nn

from sk_ebm import EBMFlowDensity, _density
from sk_ebm._density import MANY_ROWS, VERY_MANY_ROWS
from sk_ebm._soap import SOAP
from sk_ebm._training import _descend

OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.98)}


def soap(parameters, matrix_factor=1.0, **changes):
    optimizer = SOAP(parameters, **OPTIONS | changes, matrix_factor=matrix_factor)
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"] * group["factor"]
    return optimizer


def rotation(size, generator):
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def fit(optimizer, loss, n_steps):
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return loss().item()


def normal_parameter(*shape, seed=0):
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def test_a_rotated_problem_has_the_rotated_solution_at_every_step(generator):
    target, scale = normal_parameter(2, 4, 4, seed=1).detach(), torch.arange(1.0, 5.0, dtype=torch.float64)
    left, right = rotation(4, generator), rotation(4, generator)
    straight = normal_parameter(2, 4, 4)
    turned = nn.Parameter(left @ straight.detach() @ right)

    def loss(matrix):
        return ((matrix - target) * scale).square().sum()

    optimizers = soap([straight]), soap([turned])
    # Beyond the first turns of the directions and a later one.
    for _ in range(60):
        fit(optimizers[0], lambda: loss(straight), 1)
        fit(optimizers[1], lambda: loss(left.mT @ turned @ right.mT), 1)
        torch.testing.assert_close(turned.detach(), left @ straight.detach() @ right, atol=1e-6, rtol=1e-6)


def test_what_is_no_matrix_moves_as_by_adamw():
    shapes = [(3,), (2, 1, 4), (2, 4, 1)]
    ours, theirs = ([normal_parameter(*shape, seed=k) for k, shape in enumerate(shapes)] for _ in range(2))
    adamw = torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for parameters, optimizer in ((ours, soap(ours)), (theirs, adamw)):
        fit(optimizer, lambda p=parameters: sum(part.pow(4).sum() for part in p), 30)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def test_stacked_matrices_have_nothing_in_common():
    pair = normal_parameter(2, 4, 3)
    alone = nn.Parameter(pair.detach()[:1].clone())

    def loss(matrices):
        return (matrices - 1).pow(4).sum()

    fit(soap([pair]), lambda: loss(pair), 30)
    fit(soap([alone]), lambda: loss(alone), 30)
    torch.testing.assert_close(pair.detach()[:1], alone.detach())


def test_directions_that_adamw_cannot_see_are_learnt_sooner(generator):
    curvature = torch.logspace(0, -5, 12, dtype=torch.float64).sqrt()
    map_left = rotation(12, generator) * curvature
    map_right = rotation(12, generator) * curvature
    target = normal_parameter(1, 12, 12, seed=1).detach()
    losses = []
    for make in (soap, lambda parameters: torch.optim.AdamW(parameters, **OPTIONS, fused=True)):
        matrix = nn.Parameter(torch.zeros_like(target))
        gap = lambda m=matrix: (map_left.mT @ (m - target) @ map_right).square().sum()  # noqa: E731
        losses.append(fit(make([matrix]), gap, 300))
    assert losses[0] < 0.2 * losses[1]


def test_directions_follow_the_gradients(generator):
    matrix = normal_parameter(4, 4)
    optimizer = soap([matrix], lr=0.0)
    scale = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
    for law in (rotation(4, generator) * scale, rotation(4, generator) * scale):
        for _ in range(400):
            matrix.grad = law @ torch.randn(4, 4, generator=generator, dtype=torch.float64)
            optimizer.step()
        left = optimizer.matrices[0].directions[0]
        # Along the eigenvectors, in order, a law has the scales alone.
        torch.testing.assert_close((left.mT @ law).norm(dim=1), scale, rtol=0.3, atol=0.0)


def test_matrices_move_at_a_rate_of_their_own():
    slow, fast = normal_parameter(3, 4), normal_parameter(3, 4)
    start = slow.detach().clone()
    for matrix, factor in ((slow, 1.0), (fast, 8.0)):
        fit(soap([matrix], factor, weight_decay=0.0), lambda m=matrix: m.sum(), 1)
    torch.testing.assert_close(fast.detach() - start, 8 * (slow.detach() - start))


def test_weights_decay_once_whatever_the_rate_of_matrices():
    matrix, bias = normal_parameter(3, 4), normal_parameter(4)
    start = matrix.detach().clone(), bias.detach().clone()
    fit(soap([matrix, bias], 8.0), lambda: 0.0 * (matrix.sum() + bias.sum()), 10)
    for parameter, before in zip((matrix, bias), start, strict=True):
        torch.testing.assert_close(parameter.detach(), before * (1 - 0.01 * 0.1) ** 10)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_takes_no_step_and_leaves_no_trace(value):
    matrix = nn.Parameter(torch.ones(3, 4))
    optimizer = soap([matrix], weight_decay=0.0)
    for factor in (1.0, value, 1.0):
        before = matrix.detach().clone()
        _descend(factor * matrix.square().sum(), optimizer, [matrix])
        assert torch.equal(matrix.detach(), before) == (not math.isfinite(factor))
        assert matrix.isfinite().all()


@pytest.mark.parametrize(
    ("n_rows", "parameters", "is_used", "max_iter", "n_members"),
    [
        (MANY_ROWS - 1, {}, False, 120, 6),
        (MANY_ROWS, {}, True, 80, 4),
        (VERY_MANY_ROWS - 1, {}, True, 100, 4),
        (VERY_MANY_ROWS, {}, True, 100, 6),
        (30_000, {}, True, 120, 6),
        (MANY_ROWS, {"energy": nn.Linear}, False, 120, 4),
        (MANY_ROWS, {"max_iter": 7, "n_estimators": 3}, True, 7, 3),
    ],
)
def test_it_fits_fewer_default_energies_in_fewer_iterations_where_rows_are_many(
    n_rows, parameters, is_used, max_iter, n_members, rng, monkeypatch
):
    class Started(Exception):
        pass

    def start(data, settings, *others):
        assert settings.train.soap is is_used
        assert settings.train.max_iter == max_iter
        assert data.n_members == n_members
        raise Started

    monkeypatch.setattr(_density, "fit_model", start)
    # Every row twice: only different ones count.
    with pytest.raises(Started):
        EBMFlowDensity(**parameters).fit(rng.normal(size=(n_rows, 1)).repeat(2, axis=0))
