"""Kernel density of the training rows: structure that is too fine for whatever else is fitted to few of them."""

import math

import torch

from sk_ebm._bases import Bases, cross_fit
from sk_ebm._folds import Folds
from sk_ebm._types import Density

# Rows from which on a mixture of components of many rows each does as well, and takes less time to score.
MAX_ROWS_OF_KERNELS = 640
# Standard deviations of kernels that are tried, from .02 to 1.
_BANDWIDTHS = tuple(0.02 * 50 ** (j / 19) for j in range(20))


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
        distance = torch.cdist(z @ self.matrix, self.centers, compute_mode="donot_use_mm_for_euclid_dist")
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

    def cross_fitted(frame: torch.Tensor, bandwidth: float) -> Bases:
        return cross_fit(
            lambda z, weights: [GaussianKernels(z[w > 0], w[w > 0], frame, bandwidth) for w in weights], data
        )

    frames = (standardised, torch.eye(len(standardised)).to(standardised))
    return max((cross_fitted(frame, width) for frame in frames for width in _BANDWIDTHS), key=lambda bases: bases.score)
