"""The size and the shape of a Gaussian mixture, chosen by the likelihood of rows that it has not seen."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch

from sk_ebm._bases import Bases, cross_fit, held_out_log_prob, member_log_prob
from sk_ebm._folds import Folds
from sk_ebm._mixture import (
    COVARIANCE_TYPES,
    MAX_START_ROWS,
    PRIOR_COUNT,
    Mixture,
    fit_mixtures,
    kmeans_labels,
    mixture_of_mixtures,
)
from sk_ebm._stacking import mean_and_std_error, mixture_shares
from sk_ebm._support import FeatureMap
from sk_ebm._types import Density

_N_COMPONENTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_MIN_ROWS_PER_COMPONENT = 10
# Up to so many components, the sizes left out below the best one are tried too.
_MAX_FINE_SIZE = 16
# So many at least before a shape of the covariance is given up whose score can no longer catch up with another's: with
# fewer components than clusters, each doubling may gain far more than the last.
_MIN_COMPONENTS_TO_GIVE_UP = 16
# Rows per member that the size and shape of a mixture are chosen on. Beyond them fewer members choose, on more rows:
# how many components and which covariances rows support depends on how many there are.
_MAX_SEARCH_ROWS = 3000
# And values in these rows: with many features, what is chosen on fewer rows is fitted to all.
_MAX_SEARCH_VALUES = 1_000_000
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
# Rows that a component needs where all are spheres of one size, as those of a kernel density are, and what such a
# mixture has to add to the best one (nats per row): energies find curved shapes by themselves, and better.
_MIN_ROWS_OF_CROWDED, _MIN_GAIN_OF_CROWDED = 3, 0.1
# EM has local optima: the mixture chosen is fitted several times, and the likeliest fit is kept. So are those of few
# components and full covariances in the search, where one that starts in the wrong place costs most.
_FINAL_RUNS, _RUNS_OF_FEW, _FEW_COMPONENTS = 3, 3, 8


class Coordinates(NamedTuple):
    """What rows z are: ``z @ standardised`` are standardised features, or their normal scores.

    Of standardised features, `scale` is the scale of each in the user's units.
    """

    standardised: torch.Tensor
    scale: torch.Tensor | None

    @classmethod
    def of(cls, feature_map: FeatureMap) -> "Coordinates":
        """Return what the rows are that the feature map returns."""
        return cls(feature_map.unwhitener, None if feature_map.margins else feature_map.scale)

    def of_features(self, features: torch.Tensor) -> "Coordinates":
        """Return what these columns of ``z @ standardised`` are."""
        identity = torch.eye(len(features), dtype=self.standardised.dtype, device=self.standardised.device)
        return Coordinates(identity, None if self.scale is None else self.scale[features])


def search_mixture(data: Folds, coordinates: Coordinates, generator: torch.Generator) -> Bases:
    """Cross-fit the best Gaussian mixture, and mix it with others where held-out rows ask for them.

    These are the best one that may be narrow, where values repeat, and the best one of many small clusters, where rows
    are few.
    """
    shapes = _shapes(coordinates)
    # What is mostly left out draws numbers of its own, so that it leaves no trace.
    own_generator = torch.Generator().set_state(generator.get_state())
    parts = [_cross_fit_best(data, shapes, generator)]
    if shapes_at_atoms := _shapes_at_atoms(coordinates.standardised, data.rows):
        narrow = _cross_fit_best(data, shapes_at_atoms, generator)
        parts = [*parts, narrow] if _held_out_shares([*parts, narrow], data)[1] >= _MIN_SHARE_AT_ATOMS else parts
    without = _mixed(parts, data)
    crowded = _cross_fit_crowded(data, shapes, own_generator)
    if crowded is None:
        return without
    both = _mixed([*parts, crowded], data)
    return both if both.score >= without.score + _MIN_GAIN_OF_CROWDED else without


def _mixed(parts: Sequence[Bases], data: Folds) -> Bases:
    """Mix mixtures by the likelihood of held-out rows."""
    if len(parts) == 1:
        return parts[0]
    shares = _held_out_shares(parts, data)
    mixtures = zip(*(cast("list[Mixture]", bases.members) for bases in parts), strict=True)
    members: list[Density] = [mixture_of_mixtures(of_member, shares) for of_member in mixtures]
    weight = data.held_out_weight().sum(0)
    return Bases(members, float(weight @ held_out_log_prob(members, data) / weight.sum()))


def _held_out_shares(parts: Sequence[Bases], data: Folds) -> torch.Tensor:
    held_out = torch.stack([held_out_log_prob(bases.members, data) for bases in parts])
    return mixture_shares(held_out, data.held_out_weight().sum(0))


def _cross_fit_best(data: Folds, shapes: Sequence["_Settings"], generator: torch.Generator) -> Bases:
    """Choose the size and shape of a Gaussian mixture by held-out likelihood, then cross-fit it."""
    search = _Search(data, generator)
    chosen = _most_frugal_of_the_best([trial for shape in shapes for trial in search.trials(shape)])
    if chosen.settings.prior_count == PRIOR_COUNT:
        chosen = search.with_looser_prior(chosen)
        if data.rows.shape[1] >= _MIN_FEATURES_TO_TIGHTEN:
            full = next(shape for shape in shapes if shape.covariance_type == "full")
            chosen = search.with_tighter_prior(chosen, full)
    return _cross_fit_chosen(search.with_fewer_components(chosen), data, generator)


def _cross_fit_crowded(data: Folds, shapes: Sequence["_Settings"], generator: torch.Generator) -> Bases | None:
    """Cross-fit the best spheres of one size with fewer rows each than other components have, if rows are so few."""
    # In one feature, all shapes are spheres.
    one_size = "tied_spherical" if data.rows.shape[1] > 1 else "tied"
    search = _Search(data, generator)
    chosen = search.best_of_few_rows([shape for shape in shapes if shape.covariance_type == one_size])
    return chosen and _cross_fit_chosen(chosen, data, generator)


def _cross_fit_chosen(chosen: "_Trial", data: Folds, generator: torch.Generator) -> Bases:
    return cross_fit(lambda z, weights: chosen.settings.fit(z, weights, generator, n_runs=_FINAL_RUNS), data)


class _Settings(NamedTuple):
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


class _Trial(NamedTuple):
    """Settings of a mixture, and the log density (nats) of rows that its fits had not seen, with their weights."""

    settings: _Settings
    held_out: torch.Tensor
    weight: torch.Tensor

    def score(self) -> float:
        """Return the mean log density (nats)."""
        return float(self.weight @ self.held_out) / float(self.weight.sum())

    def lead_over(self, other: "_Trial") -> tuple[float, float]:
        """Return by how much (nats per row) this one is better, and the standard error of that."""
        return mean_and_std_error(self.held_out - other.held_out, self.weight)

    def beats(self, other: "_Trial", n_std_errors: float) -> bool:
        """Return whether this one is better by more than so many standard errors."""
        lead, std_error = self.lead_over(other)
        return lead > n_std_errors * std_error


def _most_frugal_of_the_best(tried: Sequence[_Trial]) -> _Trial:
    """Return the trial of fewest parameters that held-out rows can hardly tell apart from the best."""
    best = max(tried, key=_Trial.score)
    equally_good = []
    for trial in tried:
        loss, std_error = best.lead_over(trial)
        if loss <= _PARSIMONY * std_error:
            equally_good.append((trial.settings.n_parameters(), loss, trial))
    return min(equally_good, key=lambda entry: entry[:2])[-1]


class _Search:
    """Tries settings of a mixture on the same rows.

    Parameters
    ----------
    data : Folds
        Rows in z-space.
    generator : torch.Generator
        Source of randomness.
    """

    def __init__(self, data: Folds, generator: torch.Generator) -> None:
        self.generator = generator
        self.n_rows = len(data.rows)
        n_searched = _MAX_SEARCH_ROWS * data.n_members
        sample = data.subset(min(n_searched, max(MAX_START_ROWS, _MAX_SEARCH_VALUES // data.rows.shape[1])))
        judges = slice(min(data.n_members, n_searched // len(sample.rows)))
        self.rows, self.train_weight = sample.rows, sample.train_weight()[judges]
        held_out_weight = sample.held_out_weight()[judges]
        self.is_held_out = held_out_weight > 0
        self.weight = held_out_weight[self.is_held_out]
        # With few features EM is cheap and its likelihood is bumpy in the number of components; with many, neither.
        self.patience = 5 if data.rows.shape[1] <= 3 else 2
        self.sizes = [1] + [k for k in _N_COMPONENTS[1:] if k * _MIN_ROWS_PER_COMPONENT <= len(sample.rows)]
        self.best_score = -math.inf
        # Shapes that are meant in the same coordinates start from the same labels.
        self.labels: dict[tuple[int, int, int], torch.Tensor] = {}

    def trial(self, settings: _Settings) -> _Trial:
        """Fit mixtures to what each member may see, and judge them by what it may not."""
        n_runs = settings.n_search_runs()
        start = id(settings.frame), settings.n_components, n_runs
        if start not in self.labels:
            first = self.rows[:MAX_START_ROWS] @ settings.frame
            weight = self.train_weight[:, :MAX_START_ROWS].repeat_interleave(n_runs, 0)
            self.labels[start] = kmeans_labels(first, weight, settings.n_components, self.generator)
        members = settings.fit(
            self.rows, self.train_weight, self.generator, tol=1e-3, labels=self.labels[start], n_runs=n_runs
        )
        # Scales that are fitted to all rows flatter those held out by one nat each in all (Akaike 1974).
        optimism = settings.n_scales() / self.n_rows
        held_out = member_log_prob(members, self.rows)[self.is_held_out] - optimism
        return _Trial(settings, held_out, self.weight)

    def trials(self, shape: _Settings) -> list[_Trial]:
        """Try a shape with more and more components, as long as they promise anything."""
        trials: list[_Trial] = []
        scores: list[float] = []
        stale = 0
        for n_components in self.sizes:
            trials.append(self.trial(shape._replace(n_components=n_components)))
            score = trials[-1].score()
            stale = 0 if score > max(scores, default=-math.inf) + 1e-3 else stale + 1
            scores.append(score)
            if stale >= self.patience or _most_to_come(scores, self.sizes) < self.best_score:
                break
        self.best_score = max(self.best_score, *scores)
        return trials

    def with_looser_prior(self, chosen: _Trial) -> _Trial:
        """Return what is clearly better with a prior of fewer rows, if anything is."""
        # The prior pulls towards the pooled covariance, which tied ones are.
        is_pulled = not chosen.settings.covariance_type.startswith("tied")
        for prior_count in _LOOSER_PRIOR_COUNTS if is_pulled else ():
            # Fewer may do as well: too wide a component is stood in for by many.
            no_more = [size for size in self.sizes if size <= chosen.settings.n_components]
            looser = [chosen.settings._replace(prior_count=prior_count, n_components=size) for size in no_more]
            better = [trial for trial in map(self.trial, looser) if trial.beats(chosen, _CLEARLY)]
            if not better:
                break
            chosen = _most_frugal_of_the_best(better)
        return chosen

    def with_tighter_prior(self, chosen: _Trial, full: _Settings) -> _Trial:
        """Return what is probably better with full covariances and a prior of more rows, if anything is."""
        tighter = _most_frugal_of_the_best(self.trials(full._replace(prior_count=_TIGHTER_PRIOR_COUNT)))
        return tighter if tighter.beats(chosen, _PROBABLY) else chosen

    def best_of_few_rows(self, shapes: Sequence[_Settings]) -> _Trial | None:
        """Return the best trial of the shapes with more components than usual, or None if there are none to try."""
        most = len(self.rows) // _MIN_ROWS_OF_CROWDED
        sizes = [size for size in _N_COMPONENTS if self.sizes[-1] < size <= most]
        tried = [self.trial(shape._replace(n_components=size)) for shape in shapes for size in sizes]
        return _most_frugal_of_the_best(tried) if tried else None

    def with_fewer_components(self, chosen: _Trial) -> _Trial:
        """Return the best of the sizes left out below, or what is chosen."""
        sizes = list(self.sizes)
        while (between := _halfway_down(sizes, chosen.settings.n_components)) is not None:
            sizes.append(between)
            chosen = max(chosen, self.trial(chosen.settings._replace(n_components=between)), key=_Trial.score)
        return chosen


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


def _shapes(coordinates: Coordinates) -> list[_Settings]:
    """Return the shapes of a covariance worth trying, in the coordinates in which they are.

    "Spherical" means something else in the user's units than in standardised ones, whose scales are parameters that
    the data have fixed.
    """
    standardised, scale = coordinates
    d = len(standardised)
    types = COVARIANCE_TYPES if d > 1 else ("full", "tied")
    shapes = [_Settings(standardised, covariance_type, PRIOR_COUNT, d - 1) for covariance_type in types]
    if d > 1 and scale is not None:
        users_units = standardised * (scale / scale.log().mean().exp())
        shapes += [_Settings(users_units, name, PRIOR_COUNT, 0) for name in ("spherical", "tied_spherical")]
    return shapes


def has_atoms(features: torch.Tensor) -> bool:
    """Return whether many rows share the value of a feature."""
    # Rounded, because they have been elsewhere and back.
    values = (1e8 * features).round()
    n_rows = max(int(torch.unique(column, return_counts=True)[1].max()) for column in values.T)
    return n_rows >= max(_MIN_ROWS_OF_ATOM, _MIN_SHARE_OF_ATOM * len(features))


def _shapes_at_atoms(standardised: torch.Tensor, z: torch.Tensor) -> list[_Settings]:
    """Return the shapes of a covariance that may be narrow, if many rows share the value of a feature."""
    if not has_atoms(z @ standardised):
        return []
    d = len(standardised)
    types = ("full", "diag") if d > 1 else ("full",)
    return [_Settings(standardised, name, _PRIOR_COUNT_AT_ATOMS, d - 1) for name in types]
