"""Bounds of features: a bijection from bounded features to the real line, with its log-Jacobian."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

# A value that float32 cannot tell from a bound lies on it, unless that is far on the scale of the feature.
_RESOLUTION, _LARGEST_TOLERANCE = 2.0**-23, 1e-4
# exp of it, times any reasonable scale, is still a number.
_MAX_EXPONENT = 600.0


class BoundsMap(nn.Module):
    """Send features with two bounds to the line by the logit, with one bound by the logarithm; leave the others.

    A row on a bound would go to infinity; it counts as a clearance away from it.

    Parameters
    ----------
    low, high : tensor of shape (d,)
        Bounds of each feature, infinite where there is none.
    span : tensor of shape (d,)
        Distance of the bounds; the scale of a feature that has only one.
    clearance : tensor of shape (2, d)
        What rows on the low and on the high bound count as being away from it.
    """

    low: torch.Tensor
    high: torch.Tensor
    span: torch.Tensor
    clearance: torch.Tensor

    def __init__(self, low: torch.Tensor, high: torch.Tensor, span: torch.Tensor, clearance: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("span", span)
        self.register_buffer("clearance", clearance)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map x of shape (n, d) to the real line; also return the log-Jacobian, -inf outside the bounds, shape (n,)."""
        is_outside = self.is_outside(x)
        has_low, has_high = self.low.isfinite(), self.high.isfinite()
        above, below = x - self.low, self.high - x
        above, below = (
            torch.where(above > 0, above, self.clearance[0]),
            torch.where(below > 0, below, self.clearance[1]),
        )
        log_above = (torch.where(has_low, above, self.span) / self.span).log()
        log_below = (torch.where(has_high, below, self.span) / self.span).log()
        is_bounded = has_low | has_high
        s = torch.where(is_bounded, log_above - log_below, x)
        log_det = torch.where(is_bounded, -log_above - log_below - self.span.log(), 0.0)
        return s, log_det.masked_fill(is_outside, -math.inf).sum(-1)

    def is_outside(self, x: torch.Tensor) -> torch.Tensor:
        """Return which values of x, of shape (n, d) or (d,), lie outside the bounds."""
        most = _LARGEST_TOLERANCE * self.span
        return (x < self.low - torch.minimum(_RESOLUTION * self.low.abs(), most)) | (
            x > self.high + torch.minimum(_RESOLUTION * self.high.abs(), most)
        )

    def inverse(self, s: torch.Tensor) -> torch.Tensor:
        """Map s of shape (n, d) back between the bounds."""
        is_bounded = self.low.isfinite() | self.high.isfinite()
        s = torch.where(is_bounded, s.clamp(-_MAX_EXPONENT, _MAX_EXPONENT), s)
        has_low, has_high = self.low.isfinite(), self.high.isfinite()
        from_low = self.low + self.span * torch.where(has_high, s.sigmoid(), s.exp())
        from_high = self.high - self.span * torch.where(has_low, (-s).sigmoid(), (-s).exp())
        # Between two bounds from the nearer one, so that rounding loses nothing.
        is_nearer_to_low = has_low & (~has_high | (s < 0))
        x = torch.where(is_nearer_to_low, from_low, torch.where(has_high, from_high, s))
        return x.clamp(self.low, self.high)


def make_bounds(bounds: Any, rows: torch.Tensor, names: Sequence[Any] | None = None) -> BoundsMap:
    """Build the map from what the user wrote: one (low, high) for all features, a list with one per feature, or a dict.

    Parameters
    ----------
    bounds : array-like or dict
        Pairs of numbers or None; a dict has them by name, and features that it does not name have none.
    rows : tensor of shape (n, d)
        Training rows.
    names : sequence of d str or int, default=None
        What errors call the features; None is their numbers.

    Raises
    ------
    ValueError
        If there are not as many pairs as features, or pairs of unknown features, a pair is no pair of increasing
        numbers or None, or a row lies outside.
    """
    rows = rows.double()
    names = range(rows.shape[1]) if names is None else names
    low, high = torch.tensor(_pairs(bounds, names), dtype=torch.float64).T
    span = torch.where((high - low).isfinite(), high - low, rows.std(0))
    bounds_map = BoundsMap(low, high, span, torch.stack([_clearance(rows - low), _clearance(high - rows)]))
    is_outside = bounds_map.is_outside(rows)
    for j in is_outside.any(0).nonzero().flatten().tolist():
        outside = rows[is_outside[:, j], j]
        raise ValueError(
            f"{len(outside)} values of feature {names[j]!r} lie outside its bounds ({low[j]:g}, {high[j]:g}), such as "
            f"{outside[0]:g}. Widen the bounds, or drop those rows."
        )
    return bounds_map


def _clearance(distance: torch.Tensor) -> torch.Tensor:
    """Half the smallest positive distance of each feature, zero where it is not bounded."""
    return 0.5 * torch.where(distance > 0, distance, math.inf).amin(0).nan_to_num(posinf=0.0)


def plain_bounds(bounds: Any) -> dict[Any, Any] | list[Any]:
    """Return bounds as lists, or as a dict of lists, whatever kinds of arrays or frames they are."""
    if isinstance(bounds, Mapping):
        return {name: np.array(pair, dtype=object).tolist() for name, pair in bounds.items()}
    # Frames are iterated by column.
    rows = np.asarray(bounds, dtype=object) if hasattr(bounds, "columns") else bounds
    return [np.array(row, dtype=object).tolist() for row in rows]


def _pairs(bounds: Any, names: Sequence[Any]) -> list[tuple[float, float]]:
    if isinstance(bounds, Mapping):
        unknown = [name for name in bounds if name not in list(names)]
        if unknown:
            raise ValueError(
                f"bounds has no such feature: {unknown[0]!r}. The features are {', '.join(map(repr, names))}."
            )
    n_features = len(names)
    plain = plain_bounds(bounds)
    pairs: list[Any] = [plain.get(name) for name in names] if isinstance(plain, dict) else plain
    # (0, None) is one pair; [None, None] says the same of two features or of all.
    if len(pairs) == 2 and all(np.ndim(bound) == 0 for bound in pairs) and not isinstance(plain, dict):
        pairs = [tuple(pairs)] * n_features
    if len(pairs) != n_features:
        raise ValueError(
            f"bounds must be one (low, high) for all features or a list of {n_features}, one per feature, got "
            f"{len(pairs)}: {bounds!r}."
        )
    checked = []
    for name, pair in zip(names, pairs, strict=True):
        try:
            low, high = (None, None) if pair is None else pair
            low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
        except (TypeError, ValueError):
            raise ValueError(
                f"The bounds of feature {name!r} must be (low, high), each a number or None, or None for no bounds, "
                f"got {pair!r}."
            ) from None
        if not low < high:
            raise ValueError(f"The bounds of feature {name!r} must increase, got {pair!r}.")
        checked.append((low, high))
    return checked
