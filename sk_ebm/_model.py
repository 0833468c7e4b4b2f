"""The model: energies that tilt base densities. The one file where the sign of the energy flips."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import nn

from sk_ebm._types import Density, ModuleList


class TiltedEnsemble(nn.Module):
    """K energy-based densities on one kind of base, and their pool.

    Member k is ``log p_k(z) = -E_k(z) + log q0_k(z) - log Z_k``. The pool averages the energies and mixes the
    bases, ``log p(z) = -mean_k E_k(z) + log mean_k q0_k(z) - log Z``: again an energy-based density. Averaging
    energies cancels their errors; averaging log q0_k instead of mixing would thin out modes where bases differ.

    Every energy sees z pulled into a ball, so it is bounded and the model integrates on any base,
    however heavy its tails.

    Parameters
    ----------
    bases : sequence of K modules
        Normalised base densities q0_k with ``log_prob`` and ``sample``; never trained here.
    energies : module
        K networks at once, from rows (n, d) or (K, m, d) to energies (K, n) or (K, m).
    """

    def __init__(self, bases: Sequence[Density], energies: nn.Module) -> None:
        super().__init__()
        self.bases = ModuleList(bases).requires_grad_(False)
        self.energies = energies
        # A user's energy may hold parameters that are not to be trained.
        self._is_trained = [parameter.requires_grad for parameter in energies.parameters()]

    def __len__(self) -> int:
        return len(self.bases)

    def energy(self, z: torch.Tensor) -> torch.Tensor:
        """Return every member's energy at shared rows z (n, d), or at its own rows z (K, m, d).

        The result has shape (K, n) or (K, m).
        """
        return self.energies(_into_ball(z))

    def base_log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return every member's base log density (nats), shaped as by `energy`."""
        rows = [z] * len(self) if z.ndim == 2 else z
        return torch.stack([base.log_prob(own) for base, own in zip(self.bases, rows, strict=True)])

    def log_density(self, z: torch.Tensor) -> torch.Tensor:
        """Return every member's unnormalised log density (nats), shaped as by `energy`."""
        return self.base_log_prob(z) - self.energy(z)

    def pooled_log_density(self, z: torch.Tensor) -> torch.Tensor:
        """Return the pooled log density (nats), unnormalised, at rows z (n, d); shape (n,)."""
        log_base = self.base_log_prob(z).logsumexp(0) - math.log(len(self))
        return log_base - self.energy(z).mean(0)

    def frozen_copy(self) -> "TiltedEnsemble":
        """Return a copy, on the same bases, whose energies no longer train."""
        frozen = TiltedEnsemble(list(self.bases), copy.deepcopy(self.energies).requires_grad_(False))
        frozen._is_trained = self._is_trained
        return frozen

    def thaw(self) -> None:
        """Let the energies train again, but for those parameters that were not trained from the start."""
        for parameter, is_trained in zip(self.energies.parameters(), self._is_trained, strict=True):
            parameter.requires_grad_(is_trained)


class StackedDensity(nn.Module):
    """Mixture of pooled ensembles, ``log p(z) = log sum_c exp(s_c) p_c(z) - log Z`` with p_c unnormalised.

    Parameters
    ----------
    ensembles : sequence of C modules
        Ensembles, each on its own kind of base.
    log_shares : tensor of shape (C,)
        s_c, the log share of each ensemble less its own log normalizer (nats).
    """

    log_shares: torch.Tensor

    def __init__(self, ensembles: Sequence[TiltedEnsemble], log_shares: torch.Tensor) -> None:
        super().__init__()
        self.ensembles = ModuleList(ensembles)
        self.register_buffer("log_shares", log_shares)

    def log_density(self, z: torch.Tensor) -> torch.Tensor:
        """Return the unnormalised log density (nats) at rows z (n, d); shape (n,)."""
        pooled = torch.stack([ensemble.pooled_log_density(z) for ensemble in self.ensembles])
        return (self.log_shares.unsqueeze(-1) + pooled).logsumexp(0)


def _into_ball(z: torch.Tensor) -> torch.Tensor:
    """Leave whitened data nearly as it is, and keep any point within four times its typical radius."""
    radius = 4 * (z.shape[-1] ** 0.5 + 1)
    return z / (1 + (z / radius).square().sum(-1, keepdim=True)).sqrt()
