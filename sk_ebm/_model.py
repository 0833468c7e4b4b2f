"""The model: energies that tilt base densities, and their pool. The one file where the sign of the energy flips."""

import copy
from collections.abc import Sequence

import torch
from torch import nn


class TiltedEnsemble(nn.Module):
    """J energy-based densities and their renormalised weighted geometric mean.

    Member j is ``log p_j(z) = -E_j(z) + log q0_j(z) - log Z_j``; the pooled density is
    ``log p(z) = sum_j a_j [-E_j(z) + log q0_j(z)] - log Z`` with weights a_j >= 0 that sum to one,
    again an energy-based density.

    Every energy sees z pulled into a ball, so it is bounded and the model integrates on any base,
    however heavy its tails.

    Parameters
    ----------
    bases : sequence of J modules
        Normalised base densities q0_j with ``log_prob`` and ``sample``; never trained here.
    energies : sequence of J modules
        Networks (n, d) -> (n,).
    weights : tensor of shape (J,), optional
        Pooling weights a_j; equal by default.
    """

    def __init__(
        self, bases: Sequence[nn.Module], energies: Sequence[nn.Module], weights: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.bases = nn.ModuleList(bases).requires_grad_(False)
        self.energies = nn.ModuleList(energies)
        self.register_buffer("weights", torch.full((len(energies),), 1 / len(energies)) if weights is None else weights)

    def __len__(self) -> int:
        return len(self.energies)

    def energy(self, z: torch.Tensor) -> torch.Tensor:
        """Return every member's energy at shared rows z (n, d), or at its own rows z (J, m, d).

        The result has shape (J, n) or (J, m).
        """
        inside = _into_ball(z)
        rows = [inside] * len(self) if z.ndim == 2 else inside
        return torch.stack([energy(own) for energy, own in zip(self.energies, rows, strict=True)])

    def base_log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return every member's base log density (nats), shaped as by `energy`."""
        rows = [z] * len(self) if z.ndim == 2 else z
        return torch.stack([base.log_prob(own) for base, own in zip(self.bases, rows, strict=True)])

    def log_density(self, z: torch.Tensor) -> torch.Tensor:
        """Return every member's unnormalised log density (nats), shaped as by `energy`."""
        return self.base_log_prob(z) - self.energy(z)

    def pooled_log_density(self, z: torch.Tensor) -> torch.Tensor:
        """Return the pooled log density (nats), unnormalised, at rows z (n, d); shape (n,)."""
        return self.weights @ self.log_density(z)

    def frozen_copy(self) -> "TiltedEnsemble":
        """Return a copy, on the same bases, whose energies no longer train."""
        energies = [copy.deepcopy(energy).requires_grad_(False) for energy in self.energies]
        return TiltedEnsemble(list(self.bases), energies, self.weights)


def pool_ensembles(ensembles: Sequence[TiltedEnsemble], shares: Sequence[float]) -> TiltedEnsemble:
    """Join ensembles into one, whose members carry their ensemble's share of the pooling weight."""
    return TiltedEnsemble(
        [base for ensemble in ensembles for base in ensemble.bases],
        [energy for ensemble in ensembles for energy in ensemble.energies],
        torch.cat([share * ensemble.weights for share, ensemble in zip(shares, ensembles, strict=True)]),
    )


def _into_ball(z: torch.Tensor) -> torch.Tensor:
    """Leave whitened data nearly as it is, and keep any point within four times its typical radius."""
    radius = 4 * (z.shape[-1] ** 0.5 + 1)
    return z / (1 + (z / radius).square().sum(-1, keepdim=True)).sqrt()
