"""Energy networks: E(z) of shape (n,) for positions z of shape (n, d); a low energy means likely."""

import math

import torch
from torch import nn

_FIRST_GAIN = 5.6


class MLPEnergy(nn.Module):
    """Multilayer perceptron whose output starts at zero everywhere.

    The last layer is zero, so an untrained model equals its base density exactly.

    Parameters
    ----------
    n_features : int
        Number of features d.
    hidden_layer_sizes : tuple of int
        Width of each hidden layer; the activation is SiLU, smooth enough for Langevin moves.
    """

    def __init__(self, n_features: int, hidden_layer_sizes: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = n_features
        # The default start is too smooth for structure finer than the whole data; the gain that helps there
        # over-fits in many dimensions, where one direction carries less of the variance.
        first_gain = max(1.0, _FIRST_GAIN / math.sqrt(n_features))
        for hidden in hidden_layer_sizes:
            layers += [nn.Linear(width, hidden), nn.SiLU()]
            width = hidden
        with torch.no_grad():
            for parameter in layers[0].parameters():
                parameter.mul_(first_gain)
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return the energy of each row of `z`, shape (n,)."""
        return self.layers(z).squeeze(-1)


def resolve_hidden_layer_sizes(n_samples: int) -> tuple[int, ...]:
    """Choose a network that grows slowly with the data: 64 units at 1000 rows, 256 at most."""
    width = 64 * math.sqrt(max(n_samples, 1000) / 1000)
    width = int(min(256, 32 * round(width / 32)))
    return (width, width, width)
