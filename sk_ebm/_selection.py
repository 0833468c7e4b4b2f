"""Cross-fitted candidates: choose the feature map and the bases by the likelihood of rows they have not seen."""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from sk_ebm._bases import Bases, cross_fit, held_out_log_prob, member_log_prob
from sk_ebm._folds import Folds
from sk_ebm._independence import ProductDensity, independent_groups
from sk_ebm._kernel_density import cross_fit_kernels
from sk_ebm._mixture import MAX_START_ROWS, Mixture, fit_gaussian
from sk_ebm._mixture_search import Coordinates, has_atoms, search_mixture
from sk_ebm._stacking import DensityMixture, mean_and_std_error, shares_with_prior
from sk_ebm._student_t import fit_student_t
from sk_ebm._support import FeatureMap, fit_feature_map
from sk_ebm._types import Density

# Rows, and values in them, that maps and bases are fitted to. A mixture of 48 components may lose .01 nats by having
# 7000 rows instead of 17 000.
_MAX_FIT_ROWS, _MAX_FIT_VALUES = 50_000, 2_000_000
# Nats by which a Gaussian on normal-score margins may trail the best plain base and still be worth a closer look.
_HOPELESS = 0.5
# What the mixture that a Student t joins is called.
HEAVY_TAILED = "heavy_tailed_mixture"
# And what kernels around rows are called, which it joins too.
KERNELS = "kernel_density"


# Fits a density to rows z (n, d) and their weights (n,), some of them zero.
FitBase = Callable[[torch.Tensor, torch.Tensor], Density]


def cross_fit_base(base: str | FitBase, data: Folds, coordinates: Coordinates, generator: torch.Generator) -> Bases:
    """Cross-fit the base of that name, or one of the user's own, in z-space."""
    if base == "mixture":
        return _cross_fit_mixture(data, coordinates, generator)
    if base == HEAVY_TAILED:
        parts = ("mixture", "student_t")
        return _mix_bases([cross_fit_base(part, data, coordinates, generator) for part in parts], data)
    if base == "gaussian":
        return cross_fit(lambda z, weights: [fit_gaussian(z, weight) for weight in weights], data)
    if base == "student_t":
        return cross_fit(lambda z, weights: [fit_student_t(z, weight) for weight in weights], data)
    assert callable(base)
    return cross_fit(lambda z, weights: [_fit_own_base(base, z, weight) for weight in weights], data)


def _cross_fit_mixture(data: Folds, coordinates: Coordinates, generator: torch.Generator) -> Bases:
    """Cross-fit the best mixture, mixed with a product of those of groups of features where these are independent."""
    # What is mostly left out draws numbers of its own, so that it leaves no trace.
    own_generator = torch.Generator().set_state(generator.get_state())
    mixture = search_mixture(data, coordinates, generator)
    features = data.rows @ coordinates.standardised
    if has_atoms(features):
        # By itself, a feature whose values repeat would become spikes at these, worth any dependence on others.
        return mixture
    groups = independent_groups(features, data.weight)
    if len(groups) == 1 or not _seem_independent(groups, mixture, data, coordinates):
        return mixture
    factors = [
        search_mixture(data.with_rows(features[:, group]), coordinates.of_features(group), own_generator).members
        for group in groups
    ]
    products: list[Density] = [
        ProductDensity(of_member, groups, coordinates.standardised) for of_member in zip(*factors, strict=True)
    ]
    return _mix_bases([mixture, Bases(products, data.held_out_mean(member_log_prob(products, data.rows)))], data)


def cross_fit_kernels_and_tails(data: Folds, feature_map: FeatureMap, heavy_tailed: Bases) -> Bases:
    """Cross-fit kernels around rows, mixed with bases that know tails: far from all rows, kernels do not."""
    z = data.with_rows(feature_map(data.rows)[0])
    return _mix_bases([cross_fit_kernels(z, feature_map.unwhitener), heavy_tailed], z)


def _seem_independent(groups: Sequence[torch.Tensor], mixture: Bases, data: Folds, coordinates: Coordinates) -> bool:
    """Return whether held-out rows are clearly more likely under the product of the margins of the mixtures.

    Features of which no two depend on each other may still do so together.
    """
    products: list[Density] = []
    for member in cast("list[Mixture]", mixture.members):
        margins = [member.pushed_forward(coordinates.standardised[:, group]) for group in groups]
        products.append(ProductDensity(margins, groups, coordinates.standardised))
    gain = held_out_log_prob(products, data) - held_out_log_prob(mixture.members, data)
    mean, std_error = mean_and_std_error(gain, data.held_out_weight().sum(0))
    return mean > std_error


def _mix_bases(parts: Sequence[Bases], data: Folds) -> Bases:
    """Mix the members of several kinds of bases by the likelihood of held-out rows."""
    of_parts = [bases.members for bases in parts]
    members = mix_members(of_parts, shares_of_parts(of_parts, data))
    return Bases(members, data.held_out_mean(member_log_prob(members, data.rows)))


def max_fit_rows(n_features: int) -> int:
    """Return to how many rows maps and bases are fitted: time and memory grow with what the rows hold."""
    return max(MAX_START_ROWS, min(_MAX_FIT_ROWS, _MAX_FIT_VALUES // n_features))


def name_of(base: str | FitBase) -> str:
    """Return what a base is called in a fitted model."""
    return base if isinstance(base, str) else "own"


def choose_feature_map(
    data: Folds, kinds: Sequence[str | FitBase], generator: torch.Generator
) -> tuple[FeatureMap, dict[str, Bases]]:
    """Choose between plain whitening and normal-score margins by the best of some bases on each.

    Parameters
    ----------
    data : Folds
        Rows in the user's units.
    kinds : sequence of str or callable
        Bases to try, "gaussian" among them.
    generator : torch.Generator
        Source of randomness.

    Returns
    -------
    feature_map : FeatureMap
        The map, fitted to all rows.
    bases : dict
        The bases on that map, by name.
    """
    plain = fit_feature_map(data.rows, data.weight, use_margins=False)
    plain_bases = cross_fit_bases(data, kinds, plain, generator)
    plain_score = max(bases.score for bases in plain_bases.values()) + mean_log_det(data, plain)
    honest_score = _score_map_and_gaussian(data)
    if honest_score < plain_score - _HOPELESS:
        return plain, plain_bases
    margins = fit_feature_map(data.rows, data.weight, use_margins=True)
    margin_bases = cross_fit_bases(data, kinds, margins, generator)
    # The map is a density model too and has seen every row: take off what that flatters the Gaussian by.
    flattery = margin_bases["gaussian"].score + mean_log_det(data, margins) - honest_score
    margin_score = max(bases.score for bases in margin_bases.values()) + mean_log_det(data, margins) - flattery
    if margin_score > plain_score + _margin_of_doubt(data):
        return margins, margin_bases
    return plain, plain_bases


def cross_fit_bases(
    data: Folds, kinds: Sequence[str | FitBase], feature_map: FeatureMap, generator: torch.Generator
) -> dict[str, Bases]:
    """Cross-fit bases on the z of the given map."""
    z, coordinates = data.with_rows(feature_map(data.rows)[0]), Coordinates.of(feature_map)
    return {name_of(kind): cross_fit_base(kind, z, coordinates, generator) for kind in kinds}


def mean_log_det(data: Folds, feature_map: FeatureMap) -> float:
    """Return the weighted mean log |det| (nats) of the map over the rows."""
    return float((data.weight @ feature_map(data.rows)[1]) / data.weight.sum())


def _margin_of_doubt(data: Folds) -> float:
    """Nats per row by which the more elaborate map must win: the noise of a paired score of n rows."""
    return 0.02 + 0.5 / math.sqrt(len(data.rows))


def _score_map_and_gaussian(data: Folds) -> float:
    """Held-out log-likelihood (nats, user's units) of a Gaussian on normal-score margins that were fitted with it."""
    log_probs = []
    for weight in data.train_weight():
        is_seen = weight > 0
        feature_map = fit_feature_map(data.rows[is_seen], weight[is_seen], use_margins=True)
        z, log_det = feature_map(data.rows)
        # A row that the map has not seen may lie beyond what it can map.
        log_probs.append(fit_gaussian(z[is_seen], weight[is_seen]).log_prob(z) + log_det)
    return data.held_out_mean(torch.stack(log_probs))


@torch.no_grad()
def shares_of_parts(parts: Sequence[Sequence[Density]], data: Folds) -> list[float]:
    """Return the shares of several kinds of members that suit held-out rows, each one half a row at least."""
    held_out = torch.stack([held_out_log_prob(members, data) for members in parts]).cpu().double()
    held_out = held_out.nan_to_num(nan=-math.inf, neginf=-math.inf)
    weight = data.held_out_weight().sum(0).cpu().double()
    counts = (weight > 0) & (held_out > -math.inf).any(0)
    shares: list[float] = shares_with_prior(held_out[:, counts], weight[counts]).tolist()
    return shares


def mix_members(parts: Sequence[Sequence[Density]], shares: Sequence[float]) -> list[Density]:
    """Mix the members of several kinds, each with those of the others that see the same rows."""
    return [DensityMixture(members, shares) for members in zip(*parts, strict=True)]


def _fit_own_base(fit: FitBase, z: torch.Tensor, weight: torch.Tensor) -> Density:
    """Fit a base of the user's own, and raise if it is no density."""
    base = fit(z, weight)
    if not isinstance(base, nn.Module) or not all(callable(getattr(base, m, None)) for m in ("log_prob", "sample")):
        raise TypeError(f"base must return a torch.nn.Module with log_prob and sample, got {base!r}.")
    draws = base.sample(3, torch.Generator().manual_seed(0))
    log_prob = base.log_prob(z)
    if draws.shape != (3, z.shape[1]) or log_prob.shape != z.shape[:1]:
        raise ValueError(
            f"The base must draw rows of shape (n, {z.shape[1]}) and score them with shape (n,), but for n = 3 it drew "
            f"shape {tuple(draws.shape)}, and for n = {len(z)} it scored with shape {tuple(log_prob.shape)}."
        )
    if not log_prob[weight > 0].isfinite().all():
        raise ValueError("The log density of the base must be finite on all rows that it is fitted to.")
    return base
