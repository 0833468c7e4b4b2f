"""Cross-fitted candidates: choose the feature map and the bases by the likelihood of rows they have not seen."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from sk_ebm._folds import Folds
from sk_ebm._mixture import (
    COVARIANCE_TYPES,
    MAX_START_ROWS,
    PRIOR_COUNT,
    Mixture,
    fit_gaussian,
    fit_mixtures,
    kmeans_labels,
    mixture_of_mixtures,
)
from sk_ebm._stacking import DensityMixture, mean_and_std_error, mixture_shares, shares_with_prior
from sk_ebm._student_t import fit_student_t
from sk_ebm._support import FeatureMap, fit_feature_map
from sk_ebm._types import Density

_N_COMPONENTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_MIN_ROWS_PER_COMPONENT = 10
# Up to so many components, the sizes left out below the best one are tried too.
_MAX_FINE_SIZE = 16
# So many at least before a shape of the covariance is given up whose score can no longer catch up with another's: with
# fewer components than clusters, each doubling may gain far more than the last.
_MIN_COMPONENTS_TO_GIVE_UP = 16
# Rows, and values in them, that maps and bases are fitted to. A mixture of 48 components may lose .01 nats by having
# 7000 rows instead of 17 000.
_MAX_FIT_ROWS, _MAX_FIT_VALUES = 50_000, 1_000_000
# Rows per member that the size and shape of a mixture are chosen on. Beyond them fewer members choose, on more rows:
# how many components and which covariances rows support depends on how many there are.
_MAX_SEARCH_ROWS = 3000
# Nats by which a Gaussian on normal-score margins may trail the best plain base and still be worth a closer look.
_HOPELESS = 0.5
# Standard errors of the paired difference within which two settings of a mixture count as equally good.
_PARSIMONY = 0.5
# Rows that the prior of each covariance counts for instead, one after the other, where that is better by so many
# standard errors: components that differ in size or direction are pulled towards what is too wide for some of them.
_LOOSER_PRIOR_COUNTS, _CLEARLY = (0.03, 0.001), 2.0
# And those of full covariances: components of few rows that are much alike are best pulled together. In fewer features
# they have rows enough.
_TIGHTER_PRIOR_COUNT, _PROBABLY, _MIN_FEATURES_TO_TIGHTEN = 10.0, 1.0, 3
# Where so many rows share the value of a feature, components as narrow as the rounding may be worth a try, which the
# prior of their covariances would forbid.
_MIN_SHARE_OF_ATOM, _MIN_ROWS_OF_ATOM, _PRIOR_COUNT_AT_ATOMS, _MIN_SHARE_AT_ATOMS = 0.02, 5, 1e-6, 0.05
# What the mixture that a Student t joins is called.
HEAVY_TAILED = "heavy_tailed_mixture"
# EM has local optima: the mixture chosen is fitted several times, and the likeliest fit is kept. So are those of few
# components and full covariances in the search, where one that starts in the wrong place costs most.
_FINAL_RUNS, _RUNS_OF_FEW, _FEW_COMPONENTS = 3, 3, 8


# Fits a density to rows z (n, d) and their weights (n,), some of them zero.
FitBase = Callable[[torch.Tensor, torch.Tensor], Density]


class Bases(NamedTuple):
    """One fitted base per member, and the held-out log-likelihood per row (nats, in z-space)."""

    members: list[Density]
    score: float


def cross_fit(fit: Callable[[torch.Tensor, torch.Tensor], Sequence[Density]], data: Folds) -> Bases:
    """Fit one density per member on the rows it may see, and score each on the rows it may not."""
    members = list(fit(data.rows, data.train_weight()))
    return Bases(members, data.held_out_mean(_member_log_prob(members, data.rows)))


def cross_fit_base(base: str | FitBase, data: Folds, feature_map: FeatureMap, generator: torch.Generator) -> Bases:
    """Cross-fit the base of that name, or one of the user's own, in z-space."""
    if base == "mixture":
        return _search_mixture(data, feature_map, generator)
    if base == HEAVY_TAILED:
        parts = [cross_fit_base(part, data, feature_map, generator).members for part in ("mixture", "student_t")]
        members = mix_members(parts, shares_of_parts(parts, data))
        return Bases(members, data.held_out_mean(_member_log_prob(members, data.rows)))
    if base == "gaussian":
        return cross_fit(lambda z, weights: [fit_gaussian(z, weight) for weight in weights], data)
    if base == "student_t":
        return cross_fit(lambda z, weights: [fit_student_t(z, weight) for weight in weights], data)
    assert callable(base)
    return cross_fit(lambda z, weights: [_fit_own_base(base, z, weight) for weight in weights], data)


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
    z = data.with_rows(feature_map(data.rows)[0])
    return {name_of(kind): cross_fit_base(kind, z, feature_map, generator) for kind in kinds}


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


class _MixtureSettings(NamedTuple):
    """Size and shape of a mixture, and the matrix from z to the coordinates in which the shape is meant."""

    frame: torch.Tensor
    covariance_type: str
    prior_count: float
    n_frame_parameters: int
    n_components: int = 1

    def fit(self, z: torch.Tensor, weights: torch.Tensor, generator: torch.Generator, **options: Any) -> list[Density]:
        """Fit one mixture per set of weights; the options are those of `fit_mixtures`."""
        mixtures = fit_mixtures(
            z @ self.frame,
            weights,
            self.n_components,
            covariance_type=self.covariance_type,
            prior_count=self.prior_count,
            generator=generator,
            **options,
        )
        return [mixture.pulled_back(self.frame) for mixture in mixtures]

    def n_parameters(self) -> int:
        """Count the free parameters of the means, the covariances and the scales that a sphere leaves to the frame."""
        d = len(self.frame)
        full = d * (d + 1) // 2
        shape = self.covariance_type.removeprefix("tied_")
        per_covariance = {"full": full, "tied": full, "diag": d, "spherical": 1}[shape]
        n_covariances = 1 if "tied" in self.covariance_type else self.n_components
        return self.n_components * d + n_covariances * per_covariance + self.n_scales()

    def n_search_runs(self) -> int:
        """Return how many fits tell how good these settings are."""
        is_uneven = self.covariance_type == "full" and 1 < self.n_components <= _FEW_COMPONENTS
        return _RUNS_OF_FEW if is_uneven else 1

    def n_scales(self) -> int:
        """Count the scales that a sphere takes over from the frame."""
        return self.n_frame_parameters if self.covariance_type.endswith("spherical") else 0


def _search_mixture(data: Folds, feature_map: FeatureMap, generator: torch.Generator) -> Bases:
    """Cross-fit the best Gaussian mixture; where values repeat, mix it with the best one that may be narrow there."""
    plain = _cross_fit_best_mixture(data, _shapes(feature_map), generator)
    shapes_at_atoms = _shapes_at_atoms(feature_map, data.rows)
    if not shapes_at_atoms:
        return plain
    narrow = _cross_fit_best_mixture(data, shapes_at_atoms, generator)
    weight = data.held_out_weight().sum(0)
    held_out = torch.stack([_held_out_log_prob(bases.members, data) for bases in (plain, narrow)])
    shares = mixture_shares(held_out, weight)
    if shares[1] < _MIN_SHARE_AT_ATOMS:
        return plain
    both = zip(cast("list[Mixture]", plain.members), cast("list[Mixture]", narrow.members), strict=True)
    members: list[Density] = [mixture_of_mixtures(mixtures, shares) for mixtures in both]
    return Bases(members, float(weight @ (held_out + shares.log().unsqueeze(-1)).logsumexp(0) / weight.sum()))


@torch.no_grad()
def shares_of_parts(parts: Sequence[Sequence[Density]], data: Folds) -> list[float]:
    """Return the shares of several kinds of members that suit held-out rows, each one half a row at least."""
    held_out = torch.stack([_held_out_log_prob(members, data) for members in parts]).cpu().double()
    held_out = held_out.nan_to_num(nan=-math.inf, neginf=-math.inf)
    weight = data.held_out_weight().sum(0).cpu().double()
    counts = (weight > 0) & (held_out > -math.inf).any(0)
    shares: list[float] = shares_with_prior(held_out[:, counts], weight[counts]).tolist()
    return shares


def mix_members(parts: Sequence[Sequence[Density]], shares: Sequence[float]) -> list[Density]:
    """Mix the members of several kinds, each with those of the others that see the same rows."""
    return [DensityMixture(members, shares) for members in zip(*parts, strict=True)]


def _held_out_log_prob(members: Sequence[Density], data: Folds) -> torch.Tensor:
    """Return the log density (nats) of each row under the member that has not seen it, or the last if all have."""
    log_prob = data.rows.new_empty(len(data.rows))
    for k, member in enumerate(members):
        rows = data.fold.clamp(max=data.n_members - 1) == k
        log_prob[rows] = member.log_prob(data.rows[rows])
    return log_prob


def _cross_fit_best_mixture(data: Folds, shapes: Sequence[_MixtureSettings], generator: torch.Generator) -> Bases:
    """Choose the size and shape of a Gaussian mixture by held-out likelihood, then cross-fit it."""
    n_rows = _MAX_SEARCH_ROWS * data.n_members
    sample = data.subset(n_rows)
    judges = slice(min(data.n_members, n_rows // len(sample.rows)))
    train_weight, held_out_weight = sample.train_weight()[judges], sample.held_out_weight()[judges]
    is_held_out = held_out_weight > 0
    weight = held_out_weight[is_held_out]
    first, first_weight = sample.rows[:MAX_START_ROWS], train_weight[:, :MAX_START_ROWS]
    # With few features EM is cheap and its likelihood is bumpy in the number of components; with many, neither.
    patience = 5 if data.rows.shape[1] <= 3 else 2
    # Shapes that are meant in the same coordinates start from the same labels.
    labels: dict[tuple[int, int, int], torch.Tensor] = {}

    def held_out_under(settings: _MixtureSettings) -> torch.Tensor:
        n_runs = settings.n_search_runs()
        start = id(settings.frame), settings.n_components, n_runs
        if start not in labels:
            run_weight = first_weight.repeat_interleave(n_runs, 0)
            labels[start] = kmeans_labels(first @ settings.frame, run_weight, settings.n_components, generator)
        members = settings.fit(sample.rows, train_weight, generator, tol=1e-3, labels=labels[start], n_runs=n_runs)
        # Scales that are fitted to all rows flatter those held out by one nat each in all (Akaike 1974).
        optimism = settings.n_scales() / len(data.rows)
        return _member_log_prob(members, sample.rows)[is_held_out] - optimism

    sizes, best_scores = _sizes(sample), [-math.inf]

    def trials_of(shape: _MixtureSettings) -> list[_Trial]:
        trials: list[_Trial] = []
        scores: list[float] = []
        stale = 0
        for n_components in sizes:
            settings = shape._replace(n_components=n_components)
            trials.append(_Trial(settings, held_out_under(settings)))
            score = float(weight @ trials[-1].held_out) / float(weight.sum())
            stale = 0 if score > max(scores, default=-math.inf) + 1e-3 else stale + 1
            scores.append(score)
            if stale >= patience or _most_to_come(scores, sizes) < max(best_scores):
                break
        best_scores.append(max(scores))
        return trials

    chosen = _most_frugal_of_the_best([trial for shape in shapes for trial in trials_of(shape)], weight)
    is_usual_prior = chosen.settings.prior_count == PRIOR_COUNT
    # The prior pulls towards the pooled covariance, which tied ones are.
    if is_usual_prior and not chosen.settings.covariance_type.startswith("tied"):
        for prior_count in _LOOSER_PRIOR_COUNTS:
            # Fewer may do as well: too wide a component is stood in for by many.
            no_more = [size for size in sizes if size <= chosen.settings.n_components]
            looser = [chosen.settings._replace(prior_count=prior_count, n_components=size) for size in no_more]
            trials = [_Trial(settings, held_out_under(settings)) for settings in looser]
            better = [trial for trial in trials if trial.beats(chosen, weight, _CLEARLY)]
            if not better:
                break
            chosen = _most_frugal_of_the_best(better, weight)
    if is_usual_prior and data.rows.shape[1] >= _MIN_FEATURES_TO_TIGHTEN:
        full = next(shape for shape in shapes if shape.covariance_type == "full")
        tighter = _most_frugal_of_the_best(trials_of(full._replace(prior_count=_TIGHTER_PRIOR_COUNT)), weight)
        if tighter.beats(chosen, weight, _PROBABLY):
            chosen = tighter
    # A cluster less is much where there are few of them, and the sizes tried leave some out.
    while (between := _halfway_down(sizes, chosen.settings.n_components)) is not None:
        sizes = sorted([*sizes, between])
        fewer = chosen.settings._replace(n_components=between)
        chosen = _likeliest([chosen, _Trial(fewer, held_out_under(fewer))], weight)
    return cross_fit(lambda z, weights: chosen.settings.fit(z, weights, generator, n_runs=_FINAL_RUNS), data)


def _halfway_down(sizes: Sequence[int], size: int) -> int | None:
    """Return the size halfway from a small one to the next smaller one of those tried, or None."""
    below = max((other for other in sizes if other < size), default=size)
    return (below + size) // 2 if size <= _MAX_FINE_SIZE and size - below > 1 else None


def _most_to_come(scores: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the score (nats) that more components might reach at most, given those of the first sizes.

    From one size to the next but one components double, and each doubling is taken to gain at most twice what the last
    one did.
    """
    n_tried = len(scores)
    if sizes[n_tried - 1] < _MIN_COMPONENTS_TO_GIVE_UP:
        return math.inf
    n_doublings = math.log2(sizes[-1] / sizes[n_tried - 1])
    return scores[-1] + 2 * n_doublings * max(scores[-1] - scores[-3], 0.0)


class _Trial(NamedTuple):
    """Settings of a mixture, and the log density (nats) of rows that its fits had not seen."""

    settings: _MixtureSettings
    held_out: torch.Tensor

    def lead_over(self, other: "_Trial", weight: torch.Tensor) -> tuple[float, float]:
        """Return by how much (nats per row) this one is better, and the standard error of that."""
        return mean_and_std_error(self.held_out - other.held_out, weight)

    def beats(self, other: "_Trial", weight: torch.Tensor, n_std_errors: float) -> bool:
        """Return whether this one is better by more than so many standard errors."""
        lead, std_error = self.lead_over(other, weight)
        return lead > n_std_errors * std_error


def _likeliest(tried: Sequence[_Trial], weight: torch.Tensor) -> _Trial:
    return max(tried, key=lambda trial: float(weight @ trial.held_out))


def _most_frugal_of_the_best(tried: Sequence[_Trial], weight: torch.Tensor) -> _Trial:
    """Return the trial of fewest parameters that held-out rows can hardly tell apart from the best."""
    best = _likeliest(tried, weight)
    equally_good = []
    for trial in tried:
        loss, std_error = best.lead_over(trial, weight)
        if loss <= _PARSIMONY * std_error:
            equally_good.append((trial.settings.n_parameters(), loss, trial))
    return min(equally_good, key=lambda entry: entry[:2])[-1]


def _shapes(feature_map: FeatureMap) -> list[_MixtureSettings]:
    """Return the shapes of a covariance worth trying, in the coordinates in which they are.

    "Spherical" means something else in the user's units than in standardised ones, whose scales are parameters that
    the data have fixed.
    """
    standardised = feature_map.unwhitener
    d = len(standardised)
    types = COVARIANCE_TYPES if d > 1 else ("full", "tied")
    shapes = [_MixtureSettings(standardised, covariance_type, PRIOR_COUNT, d - 1) for covariance_type in types]
    if d > 1 and feature_map.margins is None:
        users_units = standardised * (feature_map.scale / feature_map.scale.log().mean().exp())
        shapes += [_MixtureSettings(users_units, name, PRIOR_COUNT, 0) for name in ("spherical", "tied_spherical")]
    return shapes


def _shapes_at_atoms(feature_map: FeatureMap, z: torch.Tensor) -> list[_MixtureSettings]:
    """Return the shapes of a covariance that may be narrow, if many rows share the value of a feature."""
    standardised = feature_map.unwhitener
    # Rounded, because z has gone there and back.
    values = (1e8 * (z @ standardised)).round()
    n_rows = max(int(torch.unique(column, return_counts=True)[1].max()) for column in values.T)
    if n_rows < max(_MIN_ROWS_OF_ATOM, _MIN_SHARE_OF_ATOM * len(z)):
        return []
    d = len(standardised)
    types = ("full", "diag") if d > 1 else ("full",)
    return [_MixtureSettings(standardised, name, _PRIOR_COUNT_AT_ATOMS, d - 1) for name in types]


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


def _sizes(data: Folds) -> list[int]:
    return [1] + [k for k in _N_COMPONENTS[1:] if k * _MIN_ROWS_PER_COMPONENT <= len(data.rows)]


def _member_log_prob(members: Sequence[Density], rows: torch.Tensor) -> torch.Tensor:
    """Return the log density (nats) of each row under each member, shape (K, n)."""
    return torch.stack([member.log_prob(rows) for member in members])
