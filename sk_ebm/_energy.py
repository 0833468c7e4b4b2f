"""Energies: K networks E_k(z) at once; a low energy means likely.

Every module here maps rows z of shape (n, d), seen by all networks, or (K, m, d), each network's own, to energies
of shape (K, n) or (K, m).
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from sk_ebm._types import ModuleList

_FIRST_GAIN = 5.6


class MLPEnergies(nn.Module):
    """K multilayer perceptrons of one shape, evaluated as batched matrix products; their output starts at zero.

    The last layer is zero, so an untrained model equals its base density exactly.

    Parameters
    ----------
    n_members : int
        Number of networks K.
    n_features : int
        Number of features d.
    hidden_layer_sizes : tuple of int
        Width of each hidden layer; the activation is SiLU, smooth enough for Langevin moves.
    """

    def __init__(self, n_members: int, n_features: int, hidden_layer_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.n_members = n_members
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        # The default start is too smooth for structure finer than the whole data; the gain that helps there
        # over-fits in many dimensions, where one direction carries less of the variance.
        gain = max(1.0, _FIRST_GAIN / math.sqrt(n_features))
        n_in = n_features
        for n_out in hidden_layer_sizes:
            self._append(n_in, n_out, gain / math.sqrt(n_in))
            n_in, gain = n_out, 1.0
        self._append(n_in, 1, 0.0)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return the energies of the rows `z`."""
        hidden = z.expand(self.n_members, *z.shape[-2:])
        *layers, (weight, bias) = zip(self.weights, self.biases, strict=True)
        for hidden_weight, hidden_bias in layers:
            hidden = nn.functional.silu(torch.baddbmm(hidden_bias, hidden, hidden_weight))
        # A matrix product with a single column is several times slower, forwards and backwards.
        return (hidden * weight.mT).sum(-1) + bias.squeeze(-1)

    def _append(self, n_in: int, n_out: int, bound: float) -> None:
        self.weights.append(nn.Parameter(torch.empty(self.n_members, n_in, n_out).uniform_(-bound, bound)))
        self.biases.append(nn.Parameter(torch.empty(self.n_members, 1, n_out).uniform_(-bound, bound)))


class SeparateEnergies(nn.Module):
    """K networks of any kind, each from rows (n, d) to energies (n,).

    Parameters
    ----------
    networks : sequence of K modules
        The networks.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = ModuleList(networks)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return the energies of the rows `z`."""
        rows = z.expand(len(self.networks), *z.shape[-2:])
        return torch.stack([network(own) for network, own in zip(self.networks, rows, strict=True)])


class WhitenedEnergies(nn.Module):
    """K networks, each of which sees the rows whitened by those it trains on.

    The coordinates are whitened by all rows, held-out ones too. With few rows per feature that puts these nearer to the
    centre than new ones, a network that trains on the others learns from their distances where, and the held-out
    likelihood no longer tells how likely new rows are.

    Parameters
    ----------
    energies : module
        The K networks.
    means : tensor of shape (K, d)
        Means of the rows that each network trains on.
    whiteners : tensor of shape (K, d, d)
        Matrices that whiten them once they are centred.
    """

    shift: torch.Tensor
    matrix: torch.Tensor

    def __init__(self, energies: nn.Module, means: torch.Tensor, whiteners: torch.Tensor) -> None:
        super().__init__()
        self.energies = energies
        self.register_buffer("matrix", whiteners.mT)
        self.register_buffer("shift", -means.unsqueeze(-2) @ self.matrix)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return the energies of the rows `z`."""
        rows = z.expand(len(self.matrix), *z.shape[-2:])
        return self.energies(torch.baddbmm(self.shift, rows, self.matrix))


def resolve_hidden_layer_sizes(n_samples: int) -> tuple[int, ...]:
    """Choose a network that grows slowly with the data: 64 units at 1000 rows, 96 at 5000, 128 from 10 000 on."""
    width = 64 * (max(n_samples, 1000) / 1000) ** 0.25
    width = int(min(128, 32 * round(width / 32)))
    return (width, width, width)
