"""Groups of features that do not depend on each other, and densities that are products over such groups."""

import math
from collections.abc import Sequence

import torch

from sk_ebm._types import Density, ModuleList

# Rows that are looked at, rows per cell that the table of two features should have, and bins of a feature, fewer where
# there are many features.
_MAX_ROWS, _ROWS_PER_CELL, _MIN_BINS, _MAX_BINS, _MAX_BINS_OF_ALL = 8000, 8, 3, 8, 2000
# Probability that any two of features that are all independent seem to depend on each other: what few rows hardly show
# is left to the rows held out.
_SIGNIFICANCE = 0.001
# Groups at most, or to treat each by itself would take long: the smallest are joined.
_MAX_GROUPS = 16


class ProductDensity(Density):
    """Density of z under which groups of the features of ``z @ frame`` are independent.

    Parameters
    ----------
    factors : sequence of modules
        Density of each group.
    groups : sequence of tensors
        Numbers of the features in each group.
    frame : tensor of shape (d, d)
        Matrix from z to the features.
    """

    matrix: torch.Tensor
    inverse: torch.Tensor
    log_det: torch.Tensor

    def __init__(self, factors: Sequence[Density], groups: Sequence[torch.Tensor], frame: torch.Tensor) -> None:
        super().__init__()
        self.factors = ModuleList(factors)
        self.sizes = [len(group) for group in groups]
        # One group after the other.
        matrix = frame[:, torch.cat(list(groups))]
        self.register_buffer("matrix", matrix)
        self.register_buffer("inverse", torch.linalg.inv(matrix))
        self.register_buffer("log_det", torch.linalg.slogdet(matrix).logabsdet)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return the normalised log density (nats) of each row, shape (n,)."""
        parts = (z @ self.matrix).split(self.sizes, dim=1)
        of_parts = [factor.log_prob(part) for factor, part in zip(self.factors, parts, strict=True)]
        return torch.stack(of_parts).sum(0) + self.log_det

    def sample(self, n_samples: int, generator: torch.Generator) -> torch.Tensor:
        """Draw `n_samples` rows."""
        return torch.cat([factor.sample(n_samples, generator) for factor in self.factors], dim=1) @ self.inverse


def independent_groups(rows: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """Divide the features into groups, between which no feature clearly depends on another.

    Every two features are tested by the table of their bins (likelihood ratio, with Bonferroni's correction).

    Parameters
    ----------
    rows : tensor of shape (n, d)
        Rows.
    weight : tensor of shape (n,)
        Non-negative row weights.

    Returns
    -------
    list of tensors
        Numbers of the features in each group, ascending; the largest group comes first.
    """
    rows, weight = rows[:_MAX_ROWS], weight[:_MAX_ROWS]
    # Uneven weights say less: they count for as many rows as would say as much.
    weight = weight * (weight.sum() / weight.square().sum())
    d = rows.shape[1]
    n_bins = min(_MAX_BINS, math.isqrt(len(rows) // _ROWS_PER_CELL), _MAX_BINS_OF_ALL // d)
    n_bins = max(_MIN_BINS, n_bins)
    is_in_bin = torch.cat([_is_in_bin(feature, weight, n_bins) for feature in rows.T])
    count = (weight * is_in_bin) @ is_in_bin.T
    of_bin = count.diagonal()
    expected = of_bin * of_bin.unsqueeze(-1) / weight.sum()
    ratio = torch.where(count > 0, count / expected, 1.0)
    statistic = 2 * (count * ratio.log()).reshape(d, n_bins, d, n_bins).sum((1, 3))
    n_free = (of_bin > 0).reshape(d, n_bins).sum(1) - 1
    # A feature of a single bin depends on nothing.
    n_free_of_two = (n_free * n_free.unsqueeze(-1)).clamp(min=1).to(statistic)
    p_value = torch.special.gammaincc(n_free_of_two / 2, statistic / 2)
    n_tests = d * (d - 1) / 2
    is_linked = (n_tests * p_value < _SIGNIFICANCE) | torch.eye(d, dtype=torch.bool, device=rows.device)
    # Each feature takes the lowest number among those it is linked to, until none changes.
    label, before = torch.arange(d, device=rows.device), None
    while before is None or bool((label != before).any()):
        label, before = torch.where(is_linked, label, d).amin(1), label
    groups = [(label == number).nonzero().squeeze(-1) for number in label.unique()]
    groups.sort(key=len, reverse=True)
    rest = (
        [torch.cat(groups[_MAX_GROUPS - 1 :]).sort().values] if len(groups) > _MAX_GROUPS else groups[_MAX_GROUPS - 1 :]
    )
    return [*groups[: _MAX_GROUPS - 1], *rest]


def _is_in_bin(feature: torch.Tensor, weight: torch.Tensor, n_bins: int) -> torch.Tensor:
    """Return whether each value lies in each of bins of about as much weight, 0 or 1, shape (n_bins, n)."""
    values, kind = feature.unique(return_inverse=True)
    weight_of_value = torch.zeros_like(values).scatter_add_(0, kind, weight)
    # Equal values share a bin, that of their middle rank.
    rank = (weight_of_value.cumsum(0) - 0.5 * weight_of_value) / weight_of_value.sum()
    bin_of_value = (n_bins * rank).floor()
    return (bin_of_value[kind] == torch.arange(n_bins, device=feature.device).unsqueeze(-1)).to(feature)
