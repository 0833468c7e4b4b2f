"""From arrays to folds: equal rows are one row, in whatever order and units they come."""

import numpy as np
import pytest
import torch

from sk_ebm import _rows
from sk_ebm._rows import deal_to_folds, find_distinct_rows


def deal(X, weight=None, seed=0):
    X = np.asarray(X)
    return deal_to_folds(X, find_distinct_rows(X, weight), 0.25, 4, torch.Generator().manual_seed(seed))[0]


@pytest.fixture
def X():
    return np.random.default_rng(0).normal(size=(200, 3))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_rows_come_back_once_each_in_their_own_precision(X, dtype):
    X = X.astype(dtype)
    data = deal(np.concatenate([X, X[:50]]))
    assert data.rows.numpy().dtype == dtype
    np.testing.assert_array_equal(np.unique(data.rows.numpy(), axis=0), np.unique(X, axis=0))
    assert sorted(data.weight.unique().tolist()) == pytest.approx([200 / 250, 400 / 250])


def test_order_of_rows_does_not_matter(X):
    shuffled = X[np.random.default_rng(1).permutation(len(X))]
    torch.testing.assert_close(deal(X), deal(shuffled), rtol=0, atol=0)


def test_units_do_not_matter(X):
    torch.testing.assert_close(deal(X).rows * 1e6, deal(X * 1e6).rows)


def test_ties_in_the_first_feature_do_not_matter(X):
    X[:, 0] = np.sign(X[:, 0])
    torch.testing.assert_close(deal(X).rows, deal(X[::-1]).rows, rtol=0, atol=0)


def test_negative_zero_is_zero():
    data = deal([[0.0, 1.0], [-0.0, 1.0], [1.0, 2.0]])
    assert len(data.rows) == 2
    assert sorted(data.weight.tolist()) == pytest.approx([2 / 3, 4 / 3])


def test_rows_that_share_a_hash_stay_apart(X, monkeypatch):
    monkeypatch.setattr(_rows, "_hash_rows", lambda X: np.zeros(len(X)))
    assert len(deal(X).rows) == 200


def test_weights_are_repetitions(X):
    weight = np.arange(200) % 3 + 1
    weighted, repeated = deal(X, weight.astype(float)), deal(X.repeat(weight, axis=0))
    torch.testing.assert_close(weighted, repeated)


def test_every_row_is_found_again(X):
    X, weight = np.concatenate([X, X[:50]]), np.ones(250)
    weight[[3, 60]] = 0
    data, position = deal_to_folds(X, find_distinct_rows(X, weight), 0.25, 4, torch.Generator())
    assert (position[[3, 60]] == -1).all()
    np.testing.assert_array_equal(data.rows.numpy()[position[weight > 0]], X[weight > 0])
