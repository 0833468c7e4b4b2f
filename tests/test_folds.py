"""Batches of rows."""

import pytest
import torch
from helpers import seeded

from sk_ebm._folds import Batches


@pytest.mark.parametrize("weight", [[1.0, 0.0, 2.0, 5.0, 0.0], [0.0, 3.0, 3.0, 0.0, 3.0]])
def test_rows_are_drawn_in_proportion_to_their_weights(weight):
    weight = torch.tensor(weight)
    counts = torch.bincount(Batches(weight).draw(80_000, seeded()), minlength=len(weight))
    # Of a binomial count, the standard deviation is at most 142.
    torch.testing.assert_close(counts.double(), 80_000 * weight.double() / weight.sum(), atol=600, rtol=0)
    assert (counts[weight == 0] == 0).all()


@pytest.mark.parametrize("light", [1.0, 0.5])
def test_more_rows_than_multinomial_takes(light):
    weight = torch.ones(2**24 + 3)
    weight[: 2**23] = light
    rows = Batches(weight).draw(4000, seeded())
    assert float((rows < 2**23).double().mean()) == pytest.approx(light / (1 + light), abs=0.04)
    assert len(rows.unique()) > 3990
