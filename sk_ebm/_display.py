"""Pictures in scikit-learn's Display style; matplotlib is imported on use."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.utils.validation import check_array, check_is_fitted

from sk_ebm._density import EBMFlowDensity
from sk_ebm._draws import draw_samples
from sk_ebm._proportions import ClassProportions, DensityClassifier

# Colours that stay apart for colour-blind readers (Okabe and Ito).
_MODEL, _DATA, _OTHERS = "#0072B2", "#D55E00", ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Contours enclose these shares of the density.
_MASSES = (0.99, 0.95, 0.8, 0.6, 0.4, 0.2)
# Margin of a grid beyond the data, as a share of their range.
_MARGIN = 0.1
# What is in view counts as all of the density between these shares, the grid being coarse.
_WHOLE, _TOO_MUCH = 0.97, 1.1
_MAX_SHOWN_ROWS = 2000


class DensityDisplay:
    """Picture of a fitted density: a curve, contours, or marginals of draws against the data.

    It is best built by `from_estimator`.

    Parameters
    ----------
    X : ndarray of shape (n_samples, n_features)
        Rows to show beside the density.
    feature_names : list of str
        Names of the features shown.
    axes : list of ndarray, default=None
        Grid of each feature, where there are one or two.
    density : ndarray, default=None
        Density on the grid, of shape (n_grid,) or (n_grid, n_grid).
    draws : ndarray of shape (n_draws, n_features), default=None
        Draws from the density, where there are more than two features.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Figure of the picture.
    ax_ : matplotlib Axes
        Axes of a curve or of contours.
    axes_ : ndarray of Axes
        Axes of a corner plot, None above its diagonal.

    Examples
    --------
    >>> import numpy as np
    >>> from sk_ebm import DensityDisplay, EBMFlowDensity
    >>> X = np.random.default_rng(0).normal(size=(200, 1))
    >>> density = EBMFlowDensity(base="gaussian", max_iter=5, random_state=0).fit(X)
    >>> display = DensityDisplay.from_estimator(density, X)
    """

    def __init__(
        self,
        X: np.ndarray,
        feature_names: list[str],
        *,
        axes: list[np.ndarray] | None = None,
        density: np.ndarray | None = None,
        draws: np.ndarray | None = None,
    ) -> None:
        self.X = X
        self.feature_names = feature_names
        self.axes = axes
        self.density = density
        self.draws = draws

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        *,
        features: Any = None,
        n_grid: int = 200,
        n_samples: int = 5000,
        random_state: Any = None,
        ax: Any = None,
    ) -> "DensityDisplay":
        """Picture a fitted density beside rows of data.

        Parameters
        ----------
        estimator : fitted density
            An EBMFlowDensity, or another density with `score_samples`, and `sample` for three features or more. Of a
            pipeline pass the last step, with X as that step sees it.
        X : array-like of shape (n_samples, n_features)
            Rows to show, usually the training rows.
        features : list of int, default=None
            Columns of X in the corner plot, where X has more than two; None takes the first six.
        n_grid : int, default=200
            Grid points per feature of a curve or of contours.
        n_samples : int, default=5000
            Draws of a corner plot.
        random_state : int, RandomState instance or None, default=None
            Source of randomness of the draws.
        ax : matplotlib Axes, default=None
            Axes of a curve or of contours; None makes a figure.

        Returns
        -------
        DensityDisplay
            The picture.

        Raises
        ------
        TypeError
            If there are three features or more, and the density has no `sample`.
        ValueError
            If `ax` is given for a corner plot, which takes a figure of its own.
        """
        check_is_fitted(estimator)
        given, names = X, getattr(X, "columns", None)
        X = check_array(X, dtype=np.float64)
        names = [f"feature {j}" for j in range(X.shape[1])] if names is None else [str(name) for name in names]
        if X.shape[1] > 2:
            shown = list(range(min(6, X.shape[1]))) if features is None else list(features)
            draws = draw_samples(estimator, n_samples, random_state)[:, shown]
            return cls(X[:, shown], [names[j] for j in shown], draws=draws).plot(ax=ax)
        margin = _MARGIN * np.ptp(X, axis=0)
        axes = [np.linspace(low, high, n_grid) for low, high in zip(X.min(0) - margin, X.max(0) + margin, strict=True)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, X.shape[1])
        # An estimator fitted to a frame wants the names of its columns back.
        rows = grid if not hasattr(given, "columns") else type(given)(dict(zip(given.columns, grid.T, strict=True)))
        density = np.exp(estimator.score_samples(rows)).reshape([n_grid] * X.shape[1])
        return cls(X, names, axes=axes, density=density).plot(ax=ax)

    def plot(self, ax: Any = None) -> "DensityDisplay":
        """Draw the picture.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes of a curve or of contours; None makes a figure.

        Returns
        -------
        DensityDisplay
            The picture itself.

        Raises
        ------
        ValueError
            If there is neither a density on a grid nor draws, or `ax` is given for a corner plot of draws.
        """
        if self.density is None:
            if self.draws is None:
                raise ValueError("There is nothing to draw: give axes and density, or draws, or use from_estimator.")
            if ax is not None:
                raise ValueError("A corner plot takes a figure of its own. Leave ax out, or give one or two features.")
            return self._plot_corner()
        self.figure_, self.ax_ = _figure_and_axes(ax)
        if len(self.feature_names) == 1:
            self._plot_curve()
        else:
            self._plot_contours()
        share = self._share_in_view()
        if share < _WHOLE:
            self.ax_.set_title(f"{share:.0%} of the density is in view", fontsize="medium")
        elif share > _TOO_MUCH:
            note = f"the density adds up to {share:.3g} here: is X in its units, n_grid large enough?"
            self.ax_.set_title(note, fontsize="medium")
        return self

    def _share_in_view(self) -> float:
        """Return the integral of the density over the grid; more than one if it is not what X is in, or too spiky."""
        assert self.axes is not None and self.density is not None
        return float(self.density.sum() * np.prod([axis[1] - axis[0] for axis in self.axes]))

    def _plot_curve(self) -> None:
        assert self.axes is not None and self.density is not None
        ax = self.ax_
        ax.plot(self.axes[0], self.density, color=_MODEL, label="density")
        ax.fill_between(self.axes[0], self.density, color=_MODEL, alpha=0.2, linewidth=0)
        rows = _some(self.X)[:, 0]
        # A rug below the curve, in the units of the axes' height.
        ax.plot(
            rows,
            np.full(len(rows), -0.02),
            "|",
            color=_DATA,
            alpha=0.5,
            transform=ax.get_xaxis_transform(),
            clip_on=False,
            label="data",
        )
        ax.set(xlabel=self.feature_names[0], ylabel="density")
        ax.set_ylim(bottom=0)
        ax.tick_params(axis="x", pad=8)
        ax.legend(frameon=False)

    def _plot_contours(self) -> None:
        assert self.axes is not None and self.density is not None
        ax = self.ax_
        levels, masses = _levels_of_mass(self.density)
        share = self._share_in_view()
        masses = [share * mass if share < _WHOLE else mass for mass in masses]
        mesh = self.axes[0], self.axes[1], self.density.T
        # Evenly spaced colours: the density itself may fall by orders of magnitude from band to band.
        colors = _pyplot().get_cmap("Blues")(np.linspace(0.15, 0.95, len(levels)))
        filled = ax.contourf(*mesh, levels=[*levels, self.density.max() * (1 + 1e-9)], colors=colors)
        rows = _some(self.X)
        ax.scatter(rows[:, 0], rows[:, 1], s=4, color=_DATA, alpha=0.4, linewidths=0)
        ax.set(xlabel=self.feature_names[0], ylabel=self.feature_names[1])
        bar = self.figure_.colorbar(filled, ax=ax, ticks=levels, spacing="uniform", label="share of the density inside")
        bar.set_ticklabels([f"{mass:.0%}" for mass in masses])

    def _plot_corner(self) -> "DensityDisplay":
        from matplotlib.lines import Line2D

        assert self.draws is not None
        pyplot = _pyplot()
        d = len(self.feature_names)
        size = max(5.0, 1.7 * d)
        self.figure_, self.axes_ = pyplot.subplots(
            d, d, figsize=(size, size), sharex="col", squeeze=False, layout="constrained"
        )
        rows = _some(self.X)
        # About as many draws as rows, or they would hide the rows.
        draws = _some(self.draws, max(len(rows), 300))
        for i in range(d):
            for j in range(d):
                ax = self.axes_[i, j]
                if j > i:
                    ax.remove()
                    self.axes_[i, j] = None
                elif i == j:
                    bins = np.histogram_bin_edges(self.X[:, i], bins=30)
                    # A share of all draws, those out of view too: a model too wide must not look right.
                    heights = np.full(len(self.draws), 1 / (len(self.draws) * (bins[1] - bins[0])))
                    ax.hist(self.draws[:, i], bins=bins, weights=heights, color=_MODEL, alpha=0.4)
                    ax.hist(self.X[:, i], bins=bins, density=True, color=_DATA, histtype="step")
                    ax.set_yticks([])
                else:
                    ax.scatter(draws[:, j], draws[:, i], s=3, color=_MODEL, alpha=0.35, linewidths=0)
                    ax.scatter(rows[:, j], rows[:, i], s=3, color=_DATA, alpha=0.35, linewidths=0)
                    # A stray draw of a heavy tail must not shrink the picture.
                    ax.set_xlim(*_limits(self.X[:, j]))
                    ax.set_ylim(*_limits(self.X[:, i]))
                    if j > 0:
                        ax.tick_params(labelleft=False)
                if j <= i and i == d - 1:
                    ax.set_xlabel(self.feature_names[j])
                if j == 0 and i > 0:
                    ax.set_ylabel(self.feature_names[i])
        handles = [Line2D([], [], marker="o", linestyle="", color=color) for color in (_MODEL, _DATA)]
        self.figure_.legend(handles, ["draws from the model", "data"], loc="upper right", frameon=False)
        return self


class TrainingDisplay:
    """Picture of how an EBMFlowDensity was trained: the diagnostics of every validation check.

    Parameters
    ----------
    history : list of dict
        `history_` of the fitted estimator.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Figure of the picture.
    axes_ : ndarray of four Axes
        Log-likelihood, effective sample size, acceptance rates, log normalizer.
    """

    def __init__(self, history: list[dict[str, Any]]) -> None:
        self.history = history

    @classmethod
    def from_estimator(cls, estimator: EBMFlowDensity) -> "TrainingDisplay":
        """Picture the training of a fitted EBMFlowDensity.

        Parameters
        ----------
        estimator : EBMFlowDensity
            Fitted estimator; of a search its `best_estimator_`.

        Returns
        -------
        TrainingDisplay
            The picture.
        """
        check_is_fitted(estimator)
        return cls(estimator.history_).plot()

    def plot(self) -> "TrainingDisplay":
        """Draw the picture.

        Returns
        -------
        TrainingDisplay
            The picture itself.
        """
        self.figure_, axes = _pyplot().subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
        self.axes_ = axes.ravel()
        bases = list(dict.fromkeys(check["base"] for check in self.history))
        for base, color in zip(bases, (_MODEL, _DATA, *_OTHERS), strict=False):
            of_base = [check for check in self.history if check["base"] == base]
            panels = [
                (("validation_log_likelihood", "-"), ("train_log_likelihood", ":")),
                (("effective_sample_size", "-"),),
                (("flow_acceptance", "-"), ("local_acceptance", ":")),
                (("log_normalizer", "-"),),
            ]
            for ax, lines in zip(self.axes_, panels, strict=True):
                for key, style in lines:
                    ax.plot(
                        [check["iteration"] for check in of_base],
                        [check[key] for check in of_base],
                        style,
                        # A base without energies has one check only, and a line needs two.
                        marker="o" if len(of_base) == 1 else None,
                        color=color,
                        label=base if style == "-" else None,
                    )
        labels = (
            "log-likelihood per row (nats)\nheld out —, training ···",
            "effective sample size\nof the weakest energy",
            "acceptance rate\nglobal —, local ···",
            "log normalizer (nats)",
        )
        for ax, label in zip(self.axes_, labels, strict=True):
            ax.set_ylabel(label)
            ax.grid(alpha=0.3)
        for ax in self.axes_[1:3]:
            ax.set_ylim(0, 1)
        for ax in self.axes_[2:]:
            ax.set_xlabel("iteration")
        self.axes_[0].legend(title="base", frameon=False)
        return self


class ProportionsDisplay:
    """Bars of class proportions, with error bars.

    Parameters
    ----------
    proportions : dict of str to ClassProportions
        Estimates to show side by side, over the same classes.
    truth : ndarray of shape (n_classes,), default=None
        True shares, drawn as marks.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Figure of the picture.
    ax_ : matplotlib Axes
        Axes of the bars.
    """

    def __init__(self, proportions: Mapping[str, ClassProportions], truth: Any = None) -> None:
        self.proportions = dict(proportions)
        self.truth = None if truth is None else np.asarray(truth, dtype=np.float64)

    @classmethod
    def from_estimator(
        cls, estimator: DensityClassifier, X: Any, *, truth: Any = None, ax: Any = None
    ) -> "ProportionsDisplay":
        """Estimate the class proportions of unlabelled rows, and picture them.

        Parameters
        ----------
        estimator : DensityClassifier
            Fitted estimator.
        X : array-like of shape (n_samples, n_features)
            Unlabelled rows.
        truth : array-like of shape (n_classes,), default=None
            True shares, if known.
        ax : matplotlib Axes, default=None
            Axes to draw in; None makes a figure.

        Returns
        -------
        ProportionsDisplay
            The picture.
        """
        return cls.from_proportions({"estimate": estimator.estimate_proportions(X)}, truth=truth, ax=ax)

    @classmethod
    def from_proportions(
        cls, proportions: Mapping[str, ClassProportions], *, truth: Any = None, ax: Any = None
    ) -> "ProportionsDisplay":
        """Picture estimated class proportions.

        Parameters
        ----------
        proportions : dict of str to ClassProportions
            Estimates to show side by side, over the same classes.
        truth : array-like of shape (n_classes,), default=None
            True shares, if known.
        ax : matplotlib Axes, default=None
            Axes to draw in; None makes a figure.

        Returns
        -------
        ProportionsDisplay
            The picture.

        Raises
        ------
        ValueError
            If the estimates are not over the same classes.
        """
        return cls(proportions, truth).plot(ax=ax)

    def plot(self, ax: Any = None) -> "ProportionsDisplay":
        """Draw the picture.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to draw in; None makes a figure.

        Returns
        -------
        ProportionsDisplay
            The picture itself.
        """
        classes = next(iter(self.proportions.values())).classes
        for name, found in self.proportions.items():
            if not np.array_equal(found.classes, classes):
                raise ValueError(
                    f"All estimates must be over the classes {classes}, but {name!r} is over {found.classes}."
                )
        if self.truth is not None and self.truth.shape != (len(classes),):
            raise ValueError(f"truth must hold one share for each of {len(classes)} classes, got {self.truth!r}.")
        self.figure_, self.ax_ = _figure_and_axes(ax)
        position, width = np.arange(len(classes)), 0.8 / len(self.proportions)
        for k, ((name, found), color) in enumerate(
            zip(self.proportions.items(), itertools.cycle((_MODEL, _DATA, *_OTHERS)), strict=False)
        ):
            at = position + (k - (len(self.proportions) - 1) / 2) * width
            # A share is neither negative nor above one.
            error = np.minimum(1.96 * found.std_errors, [found.proportions, 1 - found.proportions])
            self.ax_.bar(at, found.proportions, width, color=color, alpha=0.7, label=name)
            self.ax_.errorbar(at, found.proportions, error, fmt="none", color="black", capsize=3, linewidth=1)
        if self.truth is not None:
            self.ax_.hlines(self.truth, position - 0.45, position + 0.45, color="black", linestyle="--", label="truth")
        self.ax_.set_xticks(position, [str(name) for name in classes])
        self.ax_.set(xlabel="class", ylabel="share, with 95 % interval", ylim=(0, None))
        self.ax_.legend(frameon=False)
        return self


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install matplotlib") from error
    return pyplot


def _figure_and_axes(ax: Any) -> tuple[Any, Any]:
    if ax is not None:
        return ax.figure, ax
    return _pyplot().subplots(layout="constrained")


def _some(X: np.ndarray, most: int = _MAX_SHOWN_ROWS) -> np.ndarray:
    """Return rows evenly spread over X, few enough to see: some densities draw one component after the other."""
    return X[:: math.ceil(len(X) / most)]


def _limits(x: np.ndarray) -> tuple[float, float]:
    margin = _MARGIN * float(np.ptp(x)) or 0.5
    return float(x.min()) - margin, float(x.max()) + margin


def _levels_of_mass(density: np.ndarray) -> tuple[list[float], list[float]]:
    """Return increasing density levels on a grid, and the share of the density above each."""
    ordered = np.sort(density, axis=None)[::-1]
    mass = ordered.cumsum() / ordered.sum()
    levels: list[float] = []
    masses: list[float] = []
    for share in _MASSES:
        level = float(ordered[np.searchsorted(mass, share).clip(max=len(mass) - 1)])
        if not levels or level > levels[-1]:
            levels.append(level)
            masses.append(share)
    return levels, masses
