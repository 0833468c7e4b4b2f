"""Monotone rational-quadratic splines, as those of normflows but faster and safe in single precision.

Features come first and rows last here, so that all sums over bins run along whole vectors.
"""

from typing import NamedTuple

import torch
from torch import nn

# Of the interval, the share that a bin has at least; and the least slope at a knot.
_MIN_SHARE, MIN_SLOPE = 1e-3, 1e-3


class Splines(NamedTuple):
    """One spline on [-bound, bound] for each feature and row.

    Parameters
    ----------
    sizes : tensor of shape (d, 2, B, n)
        Widths and heights of the bins.
    slopes : tensor of shape (d, B - 1, n)
        Derivatives at the knots between them; at both ends it is 1.
    bound : float
        Outside, the splines are the identity.
    """

    sizes: torch.Tensor
    slopes: torch.Tensor
    bound: float

    def expand(self, n_rows: int) -> "Splines":
        """Use the splines of one row for all."""
        sizes, slopes = (part.expand(*part.shape[:-1], n_rows) for part in self[:2])
        return Splines(sizes, slopes, self.bound)

    def followed_by(self, other: "Splines") -> "Splines":
        """Return the splines of these features and of those."""
        return Splines(torch.cat([self.sizes, other.sizes]), torch.cat([self.slopes, other.slopes]), self.bound)


def splines_of(parameters: torch.Tensor, bound: float) -> Splines:
    """Make splines of free parameters for their widths, heights and slopes, shape (d, 3 B - 1, n)."""
    n_bins = (parameters.shape[1] + 1) // 3
    shares = parameters[:, : 2 * n_bins].unflatten(1, (2, n_bins)).softmax(2)
    sizes = 2 * bound * (_MIN_SHARE + (1 - n_bins * _MIN_SHARE) * shares)
    return Splines(sizes, MIN_SLOPE + nn.functional.softplus(parameters[:, 2 * n_bins :]), bound)


def evaluate_splines(splines: Splines, x: torch.Tensor, *, inverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Map x of shape (d, n), or map it back; also return the log derivatives, shape (d, n).

    References
    ----------
    C. Durkan, A. Bekasov, I. Murray, G. Papamakarios, "Neural Spline Flows", 2019, arXiv 1906.04032.
    """
    # What is no number is outside too.
    is_inside = x.abs() <= splines.bound
    inside = torch.where(is_inside, x, 0.0)
    (width, height), (left, bottom), (slope, next_slope) = _bins_of(splines, inside, inverse)
    steepness = height / width
    bend = slope + next_slope - 2 * steepness
    if inverse:
        rise = inside - bottom
        a, b, c = rise * bend + height * (steepness - slope), height * slope - rise * bend, -steepness * rise
        # Rounding can make the discriminant negative.
        place = 2 * c / (-b - (b * b - 4 * a * c).clamp(min=0).sqrt())
    else:
        place = (inside - left) / width
    rest, square = 1 - place, place * place
    both = place * rest
    denominator = steepness + bend * both
    numerator = next_slope * square + 2 * steepness * both + slope * rest * rest
    log_slope = (steepness * steepness * numerator / (denominator * denominator)).log()
    if inverse:
        out, log_slope = left + width * place, -log_slope
    else:
        out = bottom + height * (steepness * square + slope * both) / denominator
    return torch.where(is_inside, out, x), torch.where(is_inside, log_slope, 0.0)


def _bins_of(splines: Splines, x: torch.Tensor, inverse: bool) -> tuple[tuple[torch.Tensor, ...], ...]:
    """Return the size of the bin that each value is in, its lower left corner, and the slopes at both of its ends."""
    sizes, slopes, bound = splines
    n_bins = sizes.shape[2]
    # A product with this matrix is faster than a cumulative sum, both ways.
    is_before = torch.ones(n_bins, n_bins, dtype=x.dtype, device=x.device).tril(-1)
    corners = is_before @ sizes - bound
    bin_ = (x.unsqueeze(1) >= corners[:, int(inverse), 1:]).sum(1, keepdim=True)
    index = bin_.unsqueeze(1).expand(-1, 2, -1, -1)
    size, corner = sizes.gather(2, index).squeeze(2), corners.gather(2, index).squeeze(2)
    with_ends = nn.functional.pad(slopes, (0, 0, 1, 1), value=1.0)
    return size.unbind(1), corner.unbind(1), with_ends.gather(1, torch.cat([bin_, bin_ + 1], dim=1)).unbind(1)
