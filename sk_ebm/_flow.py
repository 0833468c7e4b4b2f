"""Normalizing flows: the one place that knows normflows, and mends its speed, generator and 1-feature limits."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from normflows.flows import AffineCouplingBlock, CoupledRationalQuadraticSpline, LULinearPermute
from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCDF, PiecewiseRationalQuadraticCoupling
from normflows.nets import MLP, ResidualNet
from torch import nn

from sk_ebm._spline import MIN_SLOPE, Splines, evaluate_splines, splines_of
from sk_ebm._types import Density, ModuleList

_N_BINS = 8
# Splines act on [-bound, bound] and are the identity outside; data is standardised before it comes here.
_TAIL_BOUND = 5.0
_IDENTITY_DERIVATIVE = math.log(math.exp(1 - MIN_SLOPE) - 1)


class CouplingFlow(Density):
    """Coupling flow of whitened rows, starting at the identity: until it is trained it is a Gaussian.

    Which Gaussian is its own to say (`start_at`), not that of the coordinates it works in: those were whitened by all
    rows, and a flow that is judged on held-out rows must not know their covariance.

    Parameters
    ----------
    n_features : int
        Number of features d.
    layers : sequence of modules
        Layers of normflows; `inverse` maps data towards noise and `forward` maps noise towards data.
    """

    is_slow = True
    mean: torch.Tensor
    scale_tril: torch.Tensor
    whitener: torch.Tensor

    def __init__(self, n_features: int, layers: Sequence[Any]) -> None:
        super().__init__()
        self.n_features = n_features
        self.layers = ModuleList(layers)
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale_tril", torch.eye(n_features))
        self.register_buffer("whitener", torch.eye(n_features))

    def start_at(self, mean: torch.Tensor, scale_tril: torch.Tensor) -> None:
        """Take the mean and the lower Cholesky factor of the covariance that whiten the rows."""
        self.mean, self.scale_tril = mean, scale_tril
        eye = torch.eye(self.n_features, dtype=mean.dtype, device=mean.device)
        self.whitener = torch.linalg.solve_triangular(scale_tril, eye, upper=False)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return the normalised log density (nats) of each row, shape (n,)."""
        z = (z - self.mean) @ self.whitener.T
        log_det = self.whitener.diagonal().log().sum().expand(len(z))
        for layer in reversed(self.layers):
            z, log_det_layer = _pass(layer, z, to_noise=True)
            log_det = log_det + log_det_layer
        return _standard_normal_log_prob(z) + log_det

    def sample_and_log_prob(self, n_samples: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw `n_samples` rows and return them with their log density (nats)."""
        like = next(self.parameters())
        z = torch.randn(n_samples, self.n_features, generator=generator, device=like.device, dtype=like.dtype)
        log_prob = _standard_normal_log_prob(z)
        for layer in self.layers:
            z, log_det_layer = _pass(layer, z, to_noise=False)
            log_prob = log_prob - log_det_layer
        log_prob = log_prob + self.whitener.diagonal().log().sum()
        return self.mean + z @ self.scale_tril.T, log_prob

    def sample(self, n_samples: int, generator: torch.Generator) -> torch.Tensor:
        """Draw `n_samples` rows."""
        return self.sample_and_log_prob(n_samples, generator)[0]


def make_flow(
    kind: str, n_features: int, *, n_layers: int = 2, hidden_units: int = 64, own_axes: bool = False
) -> CouplingFlow:
    """Build a flow of rational-quadratic spline ("spline") or affine ("affine") coupling layers.

    One feature cannot be split for a coupling, so there the flow is one elementwise spline.

    Parameters
    ----------
    kind : {"spline", "affine"}
        Kind of coupling.
    n_features : int
        Number of features d.
    n_layers : int, default=2
        Number of coupling layers; affine flows get twice as many.
    hidden_units : int, default=64
        Width of the network inside each layer.
    own_axes : bool, default=False
        Whether rows first pass a linear map that is trained too, in three or more features.

    References
    ----------
    C. Durkan, A. Bekasov, I. Murray, G. Papamakarios, "Neural Spline Flows", 2019, arXiv 1906.04032;
    L. Dinh, J. Sohl-Dickstein, S. Bengio, "Density estimation using Real NVP", 2017, arXiv 1605.08803.
    """
    if n_features == 1:
        spline = PiecewiseRationalQuadraticCDF([1], num_bins=2 * _N_BINS, tails="linear", tail_bound=_TAIL_BOUND)
        return CouplingFlow(1, [spline])
    make_layer = _spline_layer if kind == "spline" else _affine_layer
    n_layers = n_layers if kind == "spline" else 2 * n_layers
    layers: list[nn.Module] = []
    for k in range(n_layers):
        layers.append(make_layer(n_features, hidden_units, reverse_mask=bool(k % 2)))
        if n_features > 2 and (own_axes or k < n_layers - 1):
            layers.append(LULinearPermute(n_features))
    return CouplingFlow(n_features, layers)


def _affine_layer(n_features: int, hidden_units: int, *, reverse_mask: bool) -> nn.Module:
    n_kept = n_features // 2 if reverse_mask else (n_features + 1) // 2
    network = MLP([n_kept, hidden_units, hidden_units, 2 * (n_features - n_kept)], init_zeros=True)
    return AffineCouplingBlock(_BoundedScale(network), split_mode="channel_inv" if reverse_mask else "channel")


class _BoundedScale(nn.Module):
    """Keep the log scales, every second output, within [-2, 2], so that no layer can overflow."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        shift, log_scale = self.network(z).reshape(len(z), -1, 2).unbind(-1)
        return torch.stack([shift, 2 * torch.tanh(log_scale / 2)], dim=-1).flatten(1)


def _spline_layer(n_features: int, hidden_units: int, *, reverse_mask: bool) -> nn.Module:
    layer = CoupledRationalQuadraticSpline(
        n_features,
        num_blocks=1,
        num_hidden_channels=hidden_units,
        num_bins=_N_BINS,
        tail_bound=_TAIL_BOUND,
        activation=nn.SiLU,
        reverse_mask=reverse_mask,
    )
    last = layer.prqct.transform_net.final_layer
    bias = last.bias.new_zeros(layer.prqct.num_transform_features, 3 * _N_BINS - 1)
    bias[:, 2 * _N_BINS :] = _IDENTITY_DERIVATIVE
    nn.init.zeros_(last.weight)
    last.bias.data.copy_(bias.flatten())
    return layer


def _pass(layer: Any, z: torch.Tensor, *, to_noise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Pass rows (n, d) through a layer; also return the log |det| (nats) of each."""
    if isinstance(layer, CoupledRationalQuadraticSpline):
        return _pass_coupled_splines(layer.prqct, z, to_noise=to_noise)
    if isinstance(layer, PiecewiseRationalQuadraticCDF):
        out, log_slope = evaluate_splines(_own_splines(layer).expand(len(z)), z.T, inverse=to_noise)
        return out.T, log_slope.sum(0)
    if isinstance(layer, AffineCouplingBlock):
        # The block adds in place to zeros, which several flows side by side cannot share.
        log_det = z.new_zeros(len(z))
        for part in reversed(layer.flows) if to_noise else layer.flows:
            z, log_det_part = part.inverse(z) if to_noise else part(z)
            log_det = log_det + log_det_part
        return z, log_det
    if isinstance(layer, LULinearPermute) and to_noise:
        return _pass_linear(layer, z)
    passed: tuple[torch.Tensor, torch.Tensor] = layer.inverse(z) if to_noise else layer(z)
    return passed


def _pass_linear(layer: LULinearPermute, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Permute features and multiply by L U, in fewer operations than normflows takes to fill both factors."""
    linear, d = layer.linear, z.shape[1]
    diagonal = linear.upper_diag
    entries = torch.cat([linear.lower_entries, linear.upper_entries, diagonal])
    below, above = torch.tril_indices(d, d, -1, device=z.device), torch.triu_indices(d, d, 1, device=z.device)
    on = torch.arange(d, device=z.device).expand(2, d)
    row, column = torch.cat([below, above, on], dim=1)
    both = entries[(row * d + column).argsort()].view(d, d)
    lower = both.tril(-1) + torch.eye(d, dtype=z.dtype, device=z.device)
    weight = (lower @ both.triu())[:, layer.permutation._permutation.argsort()]
    return nn.functional.linear(z, weight, linear.bias), diagonal.log().sum().expand(len(z))


def _pass_coupled_splines(
    coupling: PiecewiseRationalQuadraticCoupling, z: torch.Tensor, *, to_noise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send some features through splines of their own, and the others through splines that depend on the former."""
    kept, moved = coupling.identity_features, coupling.transform_features
    features = torch.cat([kept, moved])
    of_kept = _own_splines(coupling.unconditional_transform).expand(len(z))
    if to_noise:
        # All at once: what costs is the number of operations.
        of_all = of_kept.followed_by(_conditional_splines(coupling.transform_net, z[:, kept]))
        out, log_slope = evaluate_splines(of_all, z.T[features])
    else:
        out_kept, log_slope_kept = evaluate_splines(of_kept, z.T[kept], inverse=True)
        of_moved = _conditional_splines(coupling.transform_net, out_kept.T)
        out_moved, log_slope_moved = evaluate_splines(of_moved, z.T[moved], inverse=True)
        out, log_slope = torch.cat([out_kept, out_moved]), torch.cat([log_slope_kept, log_slope_moved])
    return out[features.argsort()].T, log_slope.sum(0)


def _own_splines(layer: PiecewiseRationalQuadraticCDF) -> Splines:
    parts = [layer.unnormalized_widths, layer.unnormalized_heights, layer.unnormalized_derivatives]
    return splines_of(torch.cat(parts, dim=1).unsqueeze(-1), _TAIL_BOUND)


def _conditional_splines(network: ResidualNet, condition: torch.Tensor) -> Splines:
    parameters = network(condition).T.unflatten(0, (-1, 3 * _N_BINS - 1))
    sizes, slopes = parameters.tensor_split([2 * _N_BINS], dim=1)
    return splines_of(torch.cat([sizes / math.sqrt(network.hidden_features), slopes], dim=1), _TAIL_BOUND)


def _standard_normal_log_prob(z: torch.Tensor) -> torch.Tensor:
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))
