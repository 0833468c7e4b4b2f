"""The model: energies that tilt base densities. The one file where the sign of the energy flips."""

import copy
import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from sk_ebm._stacking import DensityMixture
from sk_ebm._types import Density, ModuleList


class TiltedEnsemble(nn.Module):
    """K energy-based densities on one kind of base, and their pool.

    Member k is ``log p_k(z) = -E_k(z) + log q0_k(z) - log Z_k``. The pool mixes the bases and averages the energies,
    ``log p(z) = log mean_k q0_k(z) - sum_k r_k(z) (E_k(z) + log Z_k) - log Z``, again an energy-based density.
    Averaging cancels errors of the energies; r_k is base k's share of the mixed bases at z, because an energy says
    nothing where its base has no mass. By Jensen's inequality the pool, before division by Z, is nowhere above the
    mixture of the members: where they propose well, they propose well for the pool.

    Every energy sees z pulled into a ball, so it is bounded and the model integrates on any base,
    however heavy its tails.

    Parameters
    ----------
    bases : sequence of K modules
        Normalised base densities q0_k with ``log_prob`` and ``sample``; never trained here.
    energies : module
        K networks at once, from rows (n, d) or (K, m, d) to energies (K, n) or (K, m).
    """

    scale: torch.Tensor
    log_normalizers: torch.Tensor

    def __init__(self, bases: Sequence[Density], energies: nn.Module) -> None:
        super().__init__()
        self.bases = ModuleList(bases).requires_grad_(False)
        self.energies = energies
        # Less than one where the networks promise more than held-out rows keep.
        self.register_buffer("scale", torch.ones(len(bases)))
        self.is_flat = False
        self.register_buffer("log_normalizers", torch.zeros(len(bases)))
        # A user's energy may hold parameters that are not to be trained.
        self._is_trained = [parameter.requires_grad for parameter in energies.parameters()]

    def __len__(self) -> int:
        return len(self.bases)

    def rescale(self, scale: torch.Tensor | float) -> None:
        """Multiply the energies of the networks by factors of shape (K,), or one for all; zero switches them off."""
        self.scale.copy_(torch.as_tensor(scale))
        self.is_flat = not bool((self.scale > 0).any())

    def energy(self, z: torch.Tensor) -> torch.Tensor:
        """Return every member's energy at shared rows z (n, d), or at its own rows z (K, m, d).

        The result has shape (K, n) or (K, m).
        """
        if self.is_flat:
            return z.new_zeros(len(self), z.shape[-2])
        scale = self.scale.unsqueeze(-1)
        # Scaled by zero, even an infinite energy is none.
        return torch.where(scale > 0, scale * self.energies(_into_ball(z)), 0.0)

    def base_log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return every member's base log density (nats), shaped as by `energy`."""
        rows = [z] * len(self) if z.ndim == 2 else z
        return torch.stack([base.log_prob(own) for base, own in zip(self.bases, rows, strict=True)])

    def log_density(self, z: torch.Tensor, log_base: torch.Tensor | None = None) -> torch.Tensor:
        """Return every member's unnormalised log density (nats), shaped as by `energy`.

        Who has `base_log_prob` of z already passes it as `log_base`.
        """
        return (self.base_log_prob(z) if log_base is None else log_base) - self.energy(z)

    def pooled_log_density(self, z: torch.Tensor, log_base: torch.Tensor | None = None) -> torch.Tensor:
        """Return the pooled log density (nats), unnormalised, at rows z (n, d); shape (n,).

        It takes `log_normalizers`, each member's log Z_k (nats), shape (K,), for known.
        """
        log_base = self.base_log_prob(z) if log_base is None else log_base
        if self.is_flat:
            return log_base.logsumexp(0) - math.log(len(self))
        energy = self.energy(z) + self.log_normalizers.unsqueeze(-1)
        # A base without mass at z has no say, even if its energy is infinite there.
        share = log_base.softmax(0).nan_to_num(nan=0.0)
        tilt = torch.where(share > 0, share * energy, 0.0).sum(0)
        return log_base.logsumexp(0) - math.log(len(self)) - tilt

    def untilted(self) -> DensityMixture | None:
        """Return the mixture of bases that the pool is if no energy tilts them, else None."""
        return DensityMixture(self.bases, [1 / len(self)] * len(self)) if self.is_flat else None

    def frozen_copy(self) -> "TiltedEnsemble":
        """Return a copy, on the same bases, whose energies no longer train."""
        frozen = TiltedEnsemble(list(self.bases), copy.deepcopy(self.energies).requires_grad_(False))
        frozen._is_trained = self._is_trained
        # Clones, which keep device and dtype.
        frozen.scale, frozen.log_normalizers = self.scale.clone(), self.log_normalizers.clone()
        frozen.is_flat = self.is_flat
        return frozen

    def thaw(self) -> None:
        """Let the energies train again, unscaled, but for those parameters that were not trained from the start."""
        self.rescale(1.0)
        for parameter, is_trained in zip(self.energies.parameters(), self._is_trained, strict=True):
            parameter.requires_grad_(is_trained)


class StackedDensity(nn.Module):
    """Mixture of pooled ensembles, ``log p(z) = log sum_c a_c p_c(z) / Z_c - log Z`` with p_c unnormalised.

    Parameters
    ----------
    ensembles : sequence of C modules
        Ensembles, each on its own kind of base.
    shares : tensor of shape (C,)
        Share a_c of each ensemble; they sum to one.
    log_normalizers : tensor of shape (C,)
        log Z_c (nats) of each ensemble.
    """

    shares: torch.Tensor
    log_normalizers: torch.Tensor

    def __init__(
        self, ensembles: Sequence[TiltedEnsemble], shares: torch.Tensor, log_normalizers: torch.Tensor
    ) -> None:
        super().__init__()
        self.ensembles = ModuleList(ensembles)
        self.register_buffer("shares", shares)
        self.register_buffer("log_normalizers", log_normalizers)

    def log_density(self, z: torch.Tensor, log_bases: Iterable[torch.Tensor | None] | None = None) -> torch.Tensor:
        """Return the unnormalised log density (nats) at rows z (n, d); shape (n,).

        Who has `base_log_prob` of each ensemble already passes them as `log_bases`.
        """
        log_bases = [None] * len(self.ensembles) if log_bases is None else log_bases
        pairs = zip(self.ensembles, log_bases, strict=True)
        pooled = torch.stack([ensemble.pooled_log_density(z, log_base) for ensemble, log_base in pairs])
        return ((self.shares.log() - self.log_normalizers).unsqueeze(-1) + pooled).logsumexp(0)

    def parts(self) -> list["StackedDensity"]:
        """Return the density of each ensemble alone."""
        one = torch.ones_like(self.shares[:1])
        pairs = zip(self.ensembles, self.log_normalizers.split(1), strict=True)
        return [StackedDensity([ensemble], one, log_normalizer) for ensemble, log_normalizer in pairs]


def _into_ball(z: torch.Tensor) -> torch.Tensor:
    """Leave whitened data nearly as it is, and keep any point within four times its typical radius."""
    radius = 4 * (z.shape[-1] ** 0.5 + 1)
    return z / (1 + (z / radius).square().sum(-1, keepdim=True)).sqrt()
