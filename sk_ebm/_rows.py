"""From arrays to folds: merge equal rows, check that a density exists, shuffle, and deal."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sk_ebm._folds import Folds

# Share of the largest weight that is nothing in single precision, in which energies train.
_NEGLIGIBLE = 1e-12
# Odd constants of the hash of a row, from the 64-bit variant of Fowler, Noll and Vo.
_HASH_START = np.uint64(0xCBF29CE484222325)
_HASH_FACTOR = np.uint64(0x100000001B3)


class DistinctRows(NamedTuple):
    """The different rows of positive weight in X, in an order that depends neither on that of X nor on its units."""

    # Where in X the first of each kind is, their summed weights with mean 1, and of which kind each row of X is, or -1.
    first: np.ndarray
    weight: np.ndarray
    kind: np.ndarray


def find_distinct_rows(
    X: np.ndarray, sample_weight: np.ndarray | None, names: Sequence[Any] | None = None
) -> DistinctRows:
    """Merge equal rows; `names` is what errors call the features."""
    is_counted = np.ones(len(X), dtype=bool)
    if sample_weight is not None:
        if not sample_weight.max() > 0:
            raise ValueError("sample_weight is zero for every row; at least two different rows need a positive weight.")
        is_counted = sample_weight > _NEGLIGIBLE * sample_weight.max()
        if not is_counted.all():
            X, sample_weight = X[is_counted], sample_weight[is_counted]
        sample_weight = sample_weight / sample_weight.max()
    kept, weight, kind_of_counted = _merge_equal_rows(X, sample_weight)
    if len(kept) < 2:
        raise ValueError(
            "All rows of positive weight are equal (1 sample in effect); a density needs at least two different rows."
        )
    _check_spread(X, range(X.shape[1]) if names is None else names)
    kind = np.full(len(is_counted), -1)
    kind[is_counted] = kind_of_counted
    return DistinctRows(np.flatnonzero(is_counted)[kept], weight * (len(weight) / weight.sum()), kind)


def deal_to_folds(
    X: np.ndarray,
    distinct: DistinctRows,
    validation_fraction: float,
    n_estimators: int,
    generator: torch.Generator,
) -> tuple[Folds, np.ndarray]:
    """Shuffle the different rows and deal them to folds.

    Also return where each row of X went, or -1 for a row of no weight.
    """
    n_rows = len(distinct.first)
    order = torch.randperm(n_rows, generator=generator).numpy()
    n_folds = min(n_rows, max(n_estimators, round(min(n_rows, 1 / validation_fraction)), 2))
    data = Folds(
        torch.from_numpy(X[distinct.first[order]]),
        torch.from_numpy(distinct.weight[order]),
        torch.arange(n_rows) % n_folds,
        min(n_estimators, n_folds),
    )
    return data, np.where(distinct.kind >= 0, np.argsort(order)[distinct.kind], -1)


def _merge_equal_rows(X: np.ndarray, weight: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the index of one row of each kind, in lexical order, their summed weights, and the kind of each row."""
    _, first, inverse = np.unique(_hash_rows(X), return_index=True, return_inverse=True)
    if not all(np.array_equal(column, column[first][inverse]) for column in X.T):
        # Two different rows share a hash: rare enough to compare whole rows, slowly.
        _, first, inverse = np.unique(X, axis=0, return_index=True, return_inverse=True)
    inverse = inverse.ravel()
    weight = np.bincount(inverse, weights=weight, minlength=len(first)).astype(np.float64)
    # An order that depends neither on the order of X nor on its units.
    order = np.argsort(X[first, 0], kind="stable")
    if (np.diff(X[first[order], 0]) == 0).any():
        order = np.lexsort(X[first].T[::-1])
    return first[order], weight[order], np.argsort(order)[inverse]


def _hash_rows(X: np.ndarray) -> np.ndarray:
    """Hash each row: sorting the hashes is far faster than sorting rows."""
    key = np.full(len(X), _HASH_START)
    for column in X.T:
        # Adding zero turns -0.0, which equals 0.0, into it.
        bits = (column + 0.0).view(np.uint64 if X.dtype == np.float64 else np.uint32).astype(np.uint64)
        bits ^= bits >> np.uint64(32)
        key = (key ^ bits) * _HASH_FACTOR
        key ^= key >> np.uint64(29)
    return key


def _check_spread(X: np.ndarray, names: Sequence[Any]) -> None:
    """Raise if a feature is constant, or if its variance is no floating-point number."""
    low, high = X.min(0), X.max(0)
    constant = np.flatnonzero(low == high).tolist()
    if constant:
        values = ", ".join(f"feature {names[j]!r} (value {X[0, j]:g})" for j in constant)
        raise ValueError(
            f"Constant features have no finite density: {values}. Drop them, for instance with "
            "sklearn.feature_selection.VarianceThreshold."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        spread, deviation = high - low, np.array([column.std(dtype=np.float64) for column in X.T])
    if not np.isfinite(deviation).all() or deviation.min() == 0:
        raise ValueError(
            f"Features span from {spread.min():g} to {spread.max():g}, too small or too large for the variance to be "
            "a floating-point number. Rescale them."
        )
