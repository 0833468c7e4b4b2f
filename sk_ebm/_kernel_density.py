"""Kernel density of the training rows: structure that is too fine for whatever else is fitted to few of them."""

import math

import torch

from sk_ebm._bases import Bases, cross_fit
from sk_ebm._folds import Folds
from sk_ebm._types import Density

# From so many rows on, a mixture whose components have many rows each does as well, and takes less time to score.
MAX_ROWS_OF_KERNELS = 640
# Standard deviations of kernels that are tried, from .02 to 1.
_BANDWIDTHS = tuple(0.02 * 50 ** (j / 19) for j in range(20))
# Distances as differences of large squares would be of no use in single precision.
_EXACT = "donot_use_mm_for_euclid_dist"


class GaussianKernels(Density):
    """Gaussians of one width around rows, spherical in the coordinates ``z @ frame``.

    Parameters
    ----------
    centers : tensor of shape (m, d)
        Rows z.
    weight : tensor of shape (m,)
        Weight of each, not all zero.
    frame : tensor of shape (d, d)
        Matrix from z to the coordinates in which the kernels are spheres.
    bandwidth : float
        Their standard deviation there.
    """

    matrix: torch.Tensor
    inverse: torch.Tensor
    centers: torch.Tensor
    log_constants: torch.Tensor

    def __init__(self, centers: torch.Tensor, weight: torch.Tensor, frame: torch.Tensor, bandwidth: float) -> None:
        super().__init__()
        matrix = frame / bandwidth
        self.register_buffer("matrix", matrix)
        self.register_buffer("inverse", torch.linalg.inv(matrix))
        self.register_buffer("centers", centers @ matrix)
        log_det = torch.linalg.slogdet(matrix).logabsdet
        log_share = (weight / weight.sum()).log()
        self.register_buffer("log_constants", log_share + log_det - 0.5 * len(frame) * math.log(2 * math.pi))

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return the normalised log density (nats) of each row, shape (n,)."""
        distance = torch.cdist(z @ self.matrix, self.centers, compute_mode=_EXACT)
        return (self.log_constants - 0.5 * distance.square()).logsumexp(-1)

    def sample(self, n_samples: int, generator: torch.Generator) -> torch.Tensor:
        """Draw `n_samples` rows."""
        share = self.log_constants.softmax(0)
        index = torch.multinomial(share, n_samples, replacement=True, generator=generator)
        center = self.centers[index]
        noise = torch.randn(center.shape, generator=generator, device=center.device, dtype=center.dtype)
        return (center + noise) @ self.inverse


def cross_fit_kernels(data: Folds, standardised: torch.Tensor) -> Bases:
    """Cross-fit kernel densities, spherical in standardised or in whitened coordinates, of the likeliest bandwidth.

    `standardised` is the matrix from the rows, which are whitened, to standardised features.
    """
    frames = (standardised, torch.eye(len(standardised)).to(standardised))
    scores = torch.stack([_held_out_log_likelihoods(data, frame) for frame in frames])
    best_frame, best_width = divmod(int(scores.argmax()), len(_BANDWIDTHS))
    frame, width = frames[best_frame], _BANDWIDTHS[best_width]
    return cross_fit(lambda z, weights: [GaussianKernels(z[w > 0], w[w > 0], frame, width) for w in weights], data)


def _held_out_log_likelihoods(data: Folds, frame: torch.Tensor) -> torch.Tensor:
    """Return the log-likelihood (nats) of all held-out rows for each bandwidth."""
    rows = data.rows @ frame
    widths = torch.tensor(_BANDWIDTHS, dtype=rows.dtype, device=rows.device)
    log_volume = len(frame) * widths.log() - torch.linalg.slogdet(frame).logabsdet
    total = torch.zeros_like(widths)
    for train_weight, weight in zip(data.train_weight(), data.held_out_weight(), strict=True):
        is_seen, is_held_out = train_weight > 0, weight > 0
        distance = torch.cdist(rows[is_held_out], rows[is_seen], compute_mode=_EXACT)
        log_share = (train_weight[is_seen] / train_weight.sum()).log()
        log_prob = [(log_share - 0.5 * (distance / width).square()).logsumexp(-1) for width in widths]
        total += (torch.stack(log_prob) - log_volume.unsqueeze(-1)) @ weight[is_held_out]
    return total
