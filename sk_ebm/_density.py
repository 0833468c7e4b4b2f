"""EBMFlowDensity: the one file that knows scikit-learn, and the border between numpy and torch."""

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import nn

from sk_ebm._bounds import BoundsMap, make_bounds, plain_bounds
from sk_ebm._energy import MLPEnergies, SeparateEnergies, resolve_hidden_layer_sizes
from sk_ebm._fitting import FitSettings, FittedModel, fit_model
from sk_ebm._flow import make_flow
from sk_ebm._folds import Folds
from sk_ebm._parallel import ALONE, DistributedGroup, Group
from sk_ebm._persistence import Versioned
from sk_ebm._progress import ProgressLine
from sk_ebm._rows import DistinctRows, deal_to_folds, find_distinct_rows
from sk_ebm._sampler import CHUNK, draw_from_density, draw_pool, log_weight
from sk_ebm._selection import FitBase
from sk_ebm._training import ENDED_BY_USER, Outcome, TrainSettings

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # scikit-learn before 1.9 has no callbacks.

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stand-in without callbacks."""

    def with_callbacks(method: Callable[..., Any]) -> Callable[..., Any]:
        """Return the method as it is."""
        return method


DOC_LINK = "https://sk-ebm.readthedocs.io/en/stable/api.html#sk_ebm.{estimator_name}"
_POOL_CHUNK = 8192
_MODEL_PARAMETERS = (
    "base",
    "feature_map",
    "bounds",
    "energy",
    "hidden_layer_sizes",
    "n_estimators",
    "flow",
    "validation_fraction",
)
_TRUSTED_EFFECTIVE_SAMPLE_SIZE = 0.01
# From so many rows on SOAP fits the default energies, which with fewer over-fit sooner than they learn more. It needs
# fewer iterations, unless rows are very many.
MANY_ROWS, _MAX_ITER, _MAX_ITER_OF_SOAP_PER_ROOT = 4000, 120, 10
# Between MANY_ROWS and so many, what more energies would still gain is less than the noise of a fit.
VERY_MANY_ROWS, _N_ESTIMATORS, _N_ESTIMATORS_OF_MANY_ROWS = 10_000, 6, 4


class LowEffectiveSampleSizeWarning(UserWarning):
    """The proposals cover the fitted density too badly for log Z, and so for scores, to be trusted."""


class TrainingWarning(UserWarning):
    """Training was interrupted, or ended because something failed, with the best parameters so far."""


class EBMFlowDensity(Versioned, CallbackSupportMixin, DensityMixin, BaseEstimator):
    r"""Energy-based density estimator, trained with the help of a normalizing flow.

    The log density is :math:`\log p(x) = -E(z) + \log q_0(z) - \log Z + \log |\det dz/dx|`, where z is
    the whitened x, q_0 a base density, E a neural network and Z the normalizer. E is trained by maximum
    likelihood; its gradient needs draws from p, which come from Markov chains that move locally by Langevin
    steps and globally to proposals of a flow that learns to imitate p all through training.

    `score` is the total log-likelihood, as in KernelDensity (GaussianMixture returns the mean).

    Parameters
    ----------
    base : {"auto", "gaussian", "student_t", "mixture", "heavy_tailed_mixture", "flow"} or callable, default="auto"
        Base density q_0. "mixture" is one of Gaussians, or a product of such where groups of features are independent;
        in "heavy_tailed_mixture" a Student t joins, so that a row far from all others costs the logarithm of its
        distance, not the square. "auto" trains energies on a Gaussian and, where it does better, on a heavy-tailed
        mixture, and mixes the results with the shares that make held-out rows most likely; with three features or
        more, a base of flows with the same tails joins where mixing it in makes held-out rows clearly more likely (0.05
        nats per row), and so does a kernel density of the rows, "kernel_density" in `base_`, with fewer than 640
        different ones. A function ``(z, weight) -> torch.nn.Module`` fits a base of your own to
        whitened rows (n, n_features); the module needs ``log_prob(z)`` and ``sample(n_samples, generator)``.
    feature_map : {"auto", "standard", "marginal"}, default="auto"
        Map of the features before everything else: whitening, or normal scores of each feature and whitening.
        "auto" takes the normal scores where held-out rows become clearly more likely.
    bounds : array-like or dict, default=None
        Bounds of the features: one (low, high) for all, a list with one such pair per feature, or a dict of such pairs
        by the name of the column (or its number, where it has no name); None instead of a number, or of a pair, is no
        bound. The density is zero outside, `score_samples` -inf, and no draw lies there.
        Bounds are limits of the quantity, not the smallest and largest value seen. A row on a bound counts as half
        as far away from it as the nearest other training row.
    energy : callable, default=None
        Function ``n_features -> torch.nn.Module`` that builds a network from (n, n_features) to (n,).
        None builds a multilayer perceptron. Networks are in evaluation mode throughout, where dropout and the like do
        nothing: an energy is a function. To pickle the estimator, use a named function or class.
    hidden_layer_sizes : "auto" or tuple of int, default="auto"
        Hidden layers of the default energy; "auto" takes three layers that widen slowly with the number of rows.
    n_estimators : "auto" or int, default="auto"
        Number of energies per base; each holds out another fold of the rows, and the energies are averaged. "auto" is
        6, and 4 from 4000 to 9999 rows, where they do nearly as well in two thirds of the time; with `warm_start`, as
        many as before.
    flow : {"spline", "affine"}, default="spline"
        Coupling flow; "affine" is faster and less accurate.
    max_iter : "auto" or int, default="auto"
        Most iterations of training; each moves the chains and takes 16 gradient steps. "auto" is 120; where
        SOAP fits the energies (see `learning_rate`), ten times the fourth root of the number of rows if that is less.
    learning_rate : "auto" or float, default="auto"
        Peak learning rate of the energies; "auto" is 0.006 up to two features and falls with the square root of
        their number beyond. From 4000 rows on SOAP (Vyas et al. 2024) fits the default energy, not AdamW, and its
        matrices learn eight times as fast.
    alpha : float, default=0.1
        Weight decay of the energies.
    batch_size : int, default=256
        Rows per gradient step; half as many for the flows that `base="auto"` may choose as bases, or "flow" asks for.
    early_stopping : bool, default=True
        Whether to stop when the held-out log-likelihood no longer improves, and to restore the best parameters.
        If False, training runs for `max_iter` iterations and keeps the last parameters whose log Z is certain.
    validation_fraction : float, default=0.25
        Share of the rows that each energy holds out, rounded to one fold of an equal deal. Every energy needs a fold
        of its own, so with six energies it is 1/6 whatever larger share is asked for.
    n_iter_no_change : int, default=10
        Validation checks, one every five iterations, without improvement before stopping. Six are enough to give up
        energies that have hardly beaten their base, unless `learning_rate` is your own.
    tol : float, default=0.001
        Smallest improvement of the held-out log-likelihood per row (nats) that counts.
    sampler : {"isir", "imh"}, default="isir"
        Kernel of the global moves: iterated sampling importance resampling or independence Metropolis-Hastings.
    n_chains : int, default=512
        Markov chains per energy.
    n_local_steps : int, default=1
        Metropolis-adjusted Langevin steps per chain and iteration.
    device : str, default="auto"
        Torch device of the training: "auto" (CUDA if there is any, else the CPU), "cpu", "cuda", "cuda:1", "mps".
        The fitted model always lives on the CPU.
    distributed : bool, default=False
        Whether to train one model together with the other processes of torch.distributed's default group, each of
        which calls `fit` with rows of its own and the same parameters. Gradients are averaged over all of them, chains
        and proposals are each process's own, and all end with the same model.
    warm_start : bool, default=False
        Whether to start from the energies and the flows of the previous fit, on the same bases and feature map.
        Needs unchanged parameters of the model, and the same X, which is not checked: other rows would be judged by
        energies that have seen them.
    random_state : int, RandomState instance or None, default=None
        Source of all randomness; the global states of numpy and torch are left as they were.
    verbose : int, default=0
        Whether to show progress on the standard output: one line that is written over, or, where that is no terminal,
        a line per validation check.

    Attributes
    ----------
    log_normalizer_ : float
        Estimate of log Z (nats).
    log_normalizer_std_error_ : float
        Its standard error (nats), an error that all scores share. Where ensembles on several bases are mixed, it is
        that of the mean score; in places where one of them prevails, scores err by that of its own normalizer.
    effective_sample_size_ : float
        Effective sample size of proposals of `proposal_` for the density, as a fraction of their number.
    acceptance_rate_ : dict
        Mean acceptance rates late in training: "local" of the Langevin moves, "flow" of the global moves. NaN where the
        largest share is that of flows or kernels, on which no energies are trained unless `base` is "flow".
    history_ : list of dict
        One entry per validation check: "base", "iteration", "seconds", "train_log_likelihood" and
        "validation_log_likelihood" (nats per row, mean of the single energies, scaled down if that suits held-out
        rows), their "log_normalizer", "effective_sample_size" of the weakest of them, and the "flow_acceptance" and
        "local_acceptance" of late moves. TrainingDisplay draws it.
    n_iter_ : int
        Most iterations run on any base kept.
    converged_ : bool
        Whether training stopped because the held-out log-likelihood no longer improved, on every base kept.
    base_ : dict
        "name" of the base with the largest share, its "validation_log_likelihood" (nats per row), "shares" and
        "validation_log_likelihoods" of all bases tried to the end, and the "scales" by which each energy
        on those with a share is multiplied: less than one where held-out rows or the proposals asked for it.
    outcome_ : str
        How training ended, in one sentence.
    oob_log_density_ : ndarray of shape (n_samples,)
        Log density (nats) of each training row under the energies that have not seen it, one per base; nan where
        all have, and for rows of weight zero. Free of most of the optimism of `score_samples` on training rows, and
        a little below what the averaged energies reach. The feature map has seen all rows, which flatters by little
        but for normal scores of few rows.
    density_ : torch.nn.Module
        Energies on their bases; ``density_.log_density`` maps z to unnormalised log densities.
    proposal_ : torch.nn.Module
        Mixture of the flows and the bases that proposes for `sample`, and most of which does for log Z; of bases alone
        where no energy tilts them.
    feature_map_ : torch.nn.Module
        Fitted feature map; its `margins` is None where features are only whitened.
    n_features_in_ : int
        Number of features seen by `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the features, when X has string column names.

    See Also
    --------
    sklearn.neighbors.KernelDensity : Kernel density estimate.
    sklearn.mixture.GaussianMixture : Gaussian mixture model.

    Notes
    -----
    Rows that occur several times count as one row of their summed weight, so a weight of 2 is the same as the
    row twice, and held-out rows are never copies of training rows. Only the ratios of weights matter.

    References
    ----------
    L. Grenioux, E. Moulines, M. Gabrie, "Balanced Training of Energy-Based Models with Adaptive Flow Sampling",
    2023, arXiv 2306.00684.

    N. Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024, arXiv 2409.11321.

    Examples
    --------
    >>> import numpy as np
    >>> from sk_ebm import EBMFlowDensity
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> density = EBMFlowDensity(base="gaussian", max_iter=5, random_state=0).fit(X)
    >>> density.score_samples(X[:3]).shape
    (3,)
    """

    _parameter_constraints: dict[str, list[Any]] = {
        "base": [
            StrOptions({"auto", "gaussian", "student_t", "mixture", "heavy_tailed_mixture", "flow"}),
            callable,
        ],
        "feature_map": [StrOptions({"auto", "standard", "marginal"})],
        "bounds": ["array-like", dict, None],
        "energy": [callable, None],
        "hidden_layer_sizes": [StrOptions({"auto"}), "array-like"],
        "n_estimators": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "flow": [StrOptions({"spline", "affine"})],
        "max_iter": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "learning_rate": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 0.5, closed="right")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "sampler": [StrOptions({"isir", "imh"})],
        "n_chains": [Interval(Integral, 1, None, closed="left")],
        "n_local_steps": [Interval(Integral, 0, None, closed="left")],
        "device": [str],
        "distributed": ["boolean"],
        "warm_start": ["boolean"],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    # Where the HTML representation links to.
    _doc_link_module = "sk_ebm"
    _doc_link_template = DOC_LINK
    _fold_seed: int
    _model_parameters: dict[str, Any]

    def __init__(
        self,
        *,
        base: str | FitBase = "auto",
        feature_map: str = "auto",
        bounds: Any = None,
        energy: Callable[[int], nn.Module] | None = None,
        hidden_layer_sizes: str | tuple[int, ...] = "auto",
        n_estimators: str | int = "auto",
        flow: str = "spline",
        max_iter: str | int = "auto",
        learning_rate: str | float = "auto",
        alpha: float = 0.1,
        batch_size: int = 256,
        early_stopping: bool = True,
        validation_fraction: float = 0.25,
        n_iter_no_change: int = 10,
        tol: float = 0.001,
        sampler: str = "isir",
        n_chains: int = 512,
        n_local_steps: int = 1,
        device: str = "auto",
        distributed: bool = False,
        warm_start: bool = False,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.base = base
        self.feature_map = feature_map
        self.bounds = bounds
        self.energy = energy
        self.hidden_layer_sizes = hidden_layer_sizes
        self.n_estimators = n_estimators
        self.flow = flow
        self.max_iter = max_iter
        self.learning_rate = learning_rate
        self.alpha = alpha
        self.batch_size = batch_size
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.sampler = sampler
        self.n_chains = n_chains
        self.n_local_steps = n_local_steps
        self.device = device
        self.distributed = distributed
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "EBMFlowDensity":
        """Fit the density to the rows of X.

        Ctrl-C while energies train ends the training: the best parameters so far are kept, and a TrainingWarning says
        so. Before that, it leaves a previous fit as it was.

        From scikit-learn 1.9 on, callbacks (`set_callbacks`) are called at every validation check and may end the
        training. The estimator that they can ask for holds the energies as they are, on the base that is trained; the
        one that is left in the end holds the best ones, on all bases.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training rows, at least two different ones; no feature may be constant.
        y : None
            Ignored.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights: a row of weight 2 counts as the row twice, one of weight 0, or of less than 1e-12 of
            the largest weight, as not there.

        Returns
        -------
        EBMFlowDensity
            The fitted estimator itself.

        Raises
        ------
        ValueError
            If X has missing or infinite values, a constant feature, fewer than two different rows or rows outside
            `bounds`, if weights are negative or all zero, or if a parameter of the model changed under `warm_start`.
        MemoryError
            If the memory of the device is too small.
        """
        # Training takes gradients, whatever the caller has switched off.
        with (
            restored_on_failure(self),
            self._advice_when_out_of_memory(),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            self._fit(X, y, sample_weight)
            self._warn()
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Compute the normalised log density of each row.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows to score.

        Returns
        -------
        ndarray of shape (n_samples,)
            Log densities (nats) in the units of X; all share the error `log_normalizer_std_error_`.
        """
        check_is_fitted(self)
        X = check_rows(self, X, reset=False)
        log_density = np.empty(len(X))
        with torch.no_grad():
            for start in range(0, len(X), CHUNK):
                rows = slice(start, start + CHUNK)
                z, log_det = self.feature_map_(_to_tensor(X[rows]))
                value = self.density_.log_density(z) - self.log_normalizer_ + log_det
                # Where numbers overflow on the way there is no density.
                log_density[rows] = value.masked_fill(~z.isfinite().all(-1), -math.inf).numpy()
        return log_density

    def score(self, X: Any, y: Any = None) -> float:
        """Compute the total log-likelihood (nats) of the rows of X, as KernelDensity does.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows to score.
        y : None
            Ignored.

        Returns
        -------
        float
            Sum of the log densities.
        """
        return float(self.score_samples(X).sum())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """Draw rows from the fitted density.

        Each ensemble of the pool is drawn from by its share. Where no energy tilts its bases, these draw for
        themselves. Elsewhere proposals are kept as often as their weights ask, on average, and what is kept more than
        once is moved apart by Langevin steps. They come from the bases or from Gaussians fitted to the density, or
        from the flow where neither suffices. The law of the draws is that of the fitted density as far as the
        proposals cover it: see `effective_sample_size_`.

        Parameters
        ----------
        n_samples : int, default=1
            Number of rows, at least 1.
        random_state : int, RandomState instance or None, default=None
            Source of randomness.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            Rows in the units of the training data.
        """
        check_is_fitted(self)
        n_samples, generator = check_n_samples(n_samples), _generator(random_state)
        # Langevin steps take gradients.
        with torch.inference_mode(False):
            z = draw_from_density(self.density_, self.proposal_, n_samples, generator)
        return torch.cat([self.feature_map_.inverse(part) for part in z.split(_POOL_CHUNK)]).numpy()

    def importance_sample(self, n_samples: int = 1000, random_state: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Draw independent rows with importance weights, for expectations under the fitted density.

        The mean of ``weight * f(row)`` estimates the expectation of f without the bias of draws that end in
        Markov moves.

        Parameters
        ----------
        n_samples : int, default=1000
            Number of rows, at least 1.
        random_state : int, RandomState instance or None, default=None
            Source of randomness.

        Returns
        -------
        X : ndarray of shape (n_samples, n_features)
            Rows in the units of the training data.
        weight : ndarray of shape (n_samples,)
            Density of the model over that of the proposal; the weights have mean one in expectation.
        """
        check_is_fitted(self)
        generator = _generator(random_state)
        X = np.empty((check_n_samples(n_samples), self.n_features_in_))
        weight = np.empty(len(X))
        for start in range(0, len(X), _POOL_CHUNK):
            rows = slice(start, start + _POOL_CHUNK)
            pool = draw_pool(self.proposal_, len(weight[rows]), generator)
            X[rows] = self.feature_map_.inverse(pool.position).numpy()
            weight[rows] = (log_weight(self.density_, pool) - self.log_normalizer_).exp().numpy()
        return X, weight

    @with_callbacks
    def _fit(self, X: Any, y: Any, sample_weight: Any) -> None:
        self._validate_params()
        group = DistributedGroup() if self.distributed else ALONE
        with group.failing_together():
            previous, device = self._previous_fit(), _resolve_device(self.device)
        generator = torch.Generator().manual_seed(group.from_first(lambda: _seed(self.random_state)))
        if previous is None:
            self._fold_seed = int(torch.randint(2**62, (1,), generator=generator))
        given = X
        with group.failing_together():
            X = check_rows(self, X, ensure_min_samples=2, reset=previous is None)
            if sample_weight is not None:
                sample_weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
            names = getattr(self, "feature_names_in_", None)
            distinct = find_distinct_rows(X, sample_weight, names)
        n_rows = sum(group.gather(len(distinct.first)))
        with group.failing_together():
            data, position = self._deal(X, distinct, n_rows, previous)
            bounds = None if self.bounds is None else make_bounds(self.bounds, data.rows, names)
        if len(set(group.gather((X.shape[1], data.n_members)))) > 1:
            raise ValueError("The processes have rows of different numbers of features, or some too few rows.")
        history: list[dict[str, Any]] = []
        progress = ProgressLine(sys.stdout, self._max_iter(n_rows)) if self.verbose and sys.stdout else None
        callbacks = _Callbacks(self, given, y)

        def report(base: str, check: dict[str, float], model_now: Callable[[], FittedModel]) -> bool:
            history.append({"base": base, **check})
            if progress:
                progress.write(history[-1])
            return callbacks.check(lambda: _fitted_attributes(model_now(), list(history)))

        try:
            largest = max(group.gather(1.0 if sample_weight is None else float(sample_weight.max())))
            # In units of the largest weight, or the sum might overflow.
            total_weight = float(len(X) / largest if sample_weight is None else (sample_weight / largest).sum())
            announce = progress.announce if progress else lambda what: None
            settings = self._settings(n_rows, X.shape[1], bounds, device, group, total_weight, announce)
            fitted, out_of_bag = fit_model(data, settings, generator, report, previous)
        finally:
            if progress:
                progress.close()
        history = group.from_first(lambda: history)
        self._fitted = fitted
        self.__dict__.update(_fitted_attributes(fitted, history))
        self.oob_log_density_ = np.where(position >= 0, out_of_bag.numpy()[position], np.nan)
        callbacks.end()

    def _deal(
        self, X: np.ndarray, distinct: DistinctRows, n_rows: int, previous: FittedModel | None
    ) -> tuple[Folds, np.ndarray]:
        """Deal the rows to folds, in the same way whenever the seed of the folds is the same."""
        n_before = None if previous is None else len(previous.candidates[0].model)
        n_estimators = self.n_estimators
        if isinstance(n_estimators, str):
            default = _N_ESTIMATORS_OF_MANY_ROWS if MANY_ROWS <= n_rows < VERY_MANY_ROWS else _N_ESTIMATORS
            n_estimators = n_before or default
        generator = torch.Generator().manual_seed(self._fold_seed)
        data, position = deal_to_folds(X, distinct, self.validation_fraction, n_estimators, generator)
        if n_before not in (None, data.n_members):
            raise ValueError(
                f"warm_start goes on with the {n_before} energies of the previous fit, but "
                f"{len(data.rows)} different rows are enough for {data.n_members}. Use the same X, or set "
                "warm_start=False."
            )
        return data, position

    def _previous_fit(self) -> FittedModel | None:
        """Return the fit to go on from, if `warm_start` asks for one, after checking that it is the same model."""
        model_parameters = {name: getattr(self, name) for name in _MODEL_PARAMETERS}
        # Copies that compare as a whole, whatever kinds of arrays they are.
        if self.bounds is not None:
            model_parameters["bounds"] = plain_bounds(self.bounds)
        if not isinstance(self.hidden_layer_sizes, str):
            model_parameters["hidden_layer_sizes"] = _check_sizes(self.hidden_layer_sizes)
        previous: FittedModel | None = getattr(self, "_fitted", None) if self.warm_start else None
        if previous is not None:
            changed = [name for name in _MODEL_PARAMETERS if model_parameters[name] != self._model_parameters[name]]
            if changed:
                raise ValueError(
                    f"warm_start goes on with the previous model, but {', '.join(changed)} changed since. Restore the "
                    "old value, or set warm_start=False."
                )
        self._model_parameters = model_parameters
        return previous

    def _settings(
        self,
        n_rows: int,
        n_features: int,
        bounds: BoundsMap | None,
        device: torch.device,
        group: Group,
        total_weight: float,
        announce: Callable[[str], None],
    ) -> FitSettings:
        hidden, rate = self.hidden_layer_sizes, self.learning_rate
        sizes = resolve_hidden_layer_sizes(n_rows) if isinstance(hidden, str) else _check_sizes(hidden)
        return FitSettings(
            base=self.base,
            feature_map=self.feature_map,
            bounds=bounds,
            make_energies=lambda k, d: self._own_energies(k, d) if self.energy else MLPEnergies(k, d, sizes),
            make_flow=lambda d, **size: make_flow(self.flow, d, **size),
            device=device,
            announce=announce,
            train=TrainSettings(
                max_iter=self._max_iter(n_rows),
                learning_rate=0.006 * min(1.0, (2 / n_features) ** 0.5) if isinstance(rate, str) else rate,
                weight_decay=self.alpha,
                batch_size=self.batch_size,
                n_chains=self.n_chains,
                pool_size=max(1024, 2 * self.n_chains),
                global_kernel=self.sampler,
                n_local_steps=self.n_local_steps,
                early_stopping=self.early_stopping,
                n_iter_no_change=self.n_iter_no_change,
                n_iter_first_gain=6 if isinstance(rate, str) else self.n_iter_no_change,
                soap=self._uses_soap(n_rows),
                tol=self.tol,
                group=group,
                data_share=total_weight * group.size / sum(group.gather(total_weight)),
            ),
        )

    def _max_iter(self, n_rows: int) -> int:
        if not isinstance(self.max_iter, str):
            return self.max_iter
        of_soap = round(_MAX_ITER_OF_SOAP_PER_ROOT * n_rows**0.25)
        return min(of_soap, _MAX_ITER) if self._uses_soap(n_rows) else _MAX_ITER

    def _uses_soap(self, n_rows: int) -> bool:
        return self.energy is None and n_rows >= MANY_ROWS

    def _own_energies(self, n_members: int, n_features: int) -> SeparateEnergies:
        """Build the networks of the user's `energy`."""
        assert self.energy is not None
        if isinstance(self.energy, nn.Module):
            raise TypeError(
                "energy must be a function that builds a network, n_features -> torch.nn.Module, so that every member "
                f"gets its own; got the network {self.energy!r}. Try energy=lambda n_features: ..."
            )
        networks = [self.energy(n_features) for _ in range(n_members)]
        if not all(isinstance(network, nn.Module) for network in networks):
            raise TypeError(f"energy must build a torch.nn.Module, got {networks[0]!r}.")
        # As for evaluation: an energy that differs from call to call has no density.
        return SeparateEnergies([network.eval() for network in networks])

    @contextmanager
    def _advice_when_out_of_memory(self) -> Iterator[None]:
        """Turn what torch raises when memory runs out into a MemoryError that says what to try."""
        try:
            yield
        except RuntimeError as error:
            # On a CPU, torch has no class of its own for it.
            if not isinstance(error, torch.cuda.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            elsewhere = "" if self.device == "cpu" else f", or device='cpu' (now {self.device!r})"
            raise MemoryError(
                f"Training ran out of memory. Try a smaller n_chains (now {self.n_chains}), batch_size (now "
                f"{self.batch_size}), n_estimators (now {self.n_estimators!r}) or hidden_layer_sizes (now "
                f"{self.hidden_layer_sizes!r}){elsewhere}."
            ) from error

    def _warn(self) -> None:
        fraction = self.effective_sample_size_
        remedies = [
            (
                _is_below(self.n_estimators, _N_ESTIMATORS) or _is_below(self.max_iter, _MAX_ITER),
                "the default n_estimators and max_iter",
            ),
            (self.bounds is None, "bounds= where a feature has a limit"),
            (self.n_features_in_ > 2, "fewer features (for instance by PCA)"),
            (True, "another base than " + repr(self.base_["name"])),
            (True, "a larger alpha, or more rows"),
        ]
        if not fraction >= _TRUSTED_EFFECTIVE_SAMPLE_SIZE:
            warnings.warn(
                f"The effective sample size of the proposals is {fraction:.2%} of their number, under "
                f"{_TRUSTED_EFFECTIVE_SAMPLE_SIZE:.0%}: log Z, and with it every score, is uncertain by more than its "
                f"standard error of {self.log_normalizer_std_error_:.2g} nats says. Try "
                f"{', '.join(remedy for applies, remedy in remedies if applies)}.",
                LowEffectiveSampleSizeWarning,
                stacklevel=3,
            )
        for name, (outcome, n_iter) in self._fitted.endings.items():
            if outcome is Outcome.INTERRUPTED:
                warnings.warn(
                    f"Training on the {name} base was interrupted after {n_iter} iterations: the best parameters so "
                    "far are kept, and no further base is tried.",
                    TrainingWarning,
                    stacklevel=3,
                )
            elif outcome in (Outcome.SAMPLER_TOO_WEAK, Outcome.NON_FINITE) and self._fitted.shares[name] > 0:
                warnings.warn(
                    f"Training on the {name} base ended early after {n_iter} iterations: {outcome.value}. The best "
                    f"parameters before that are used. Try a smaller learning_rate (now {self.learning_rate!r}) or "
                    f"another base (now {self.base!r}).",
                    TrainingWarning,
                    stacklevel=3,
                )


def _is_below(asked: str | int, default: int) -> bool:
    return not isinstance(asked, str) and asked < default


def _fitted_attributes(fitted: FittedModel, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the attributes of an estimator that holds this model."""
    # What ended the whole fit counts even if the base it happened on got no share.
    endings = [
        (outcome, n_iter)
        for name, (outcome, n_iter) in fitted.endings.items()
        if fitted.shares[name] > 0 or outcome in ENDED_BY_USER
    ]
    name = max(fitted.shares, key=lambda candidate: fitted.shares[candidate])
    return {
        "feature_map_": fitted.feature_map,
        "density_": fitted.model,
        "proposal_": fitted.proposal,
        "log_normalizer_": fitted.log_normalizer.value,
        "log_normalizer_std_error_": fitted.log_normalizer.std_error,
        "effective_sample_size_": fitted.log_normalizer.effective_sample_size,
        "history_": history,
        "n_iter_": max(n_iter for _, n_iter in endings),
        "converged_": all(outcome in (Outcome.CONVERGED, Outcome.UNTRAINED) for outcome, _ in endings),
        "outcome_": "; ".join(dict.fromkeys(outcome.value for outcome, _ in endings)),
        "base_": {
            "name": name,
            "validation_log_likelihood": fitted.scores[name],
            "shares": fitted.shares,
            "validation_log_likelihoods": fitted.scores,
            "scales": {candidate.name: candidate.model.scale.tolist() for candidate in fitted.candidates},
        },
        "acceptance_rate_": next(c.result.acceptance_rate for c in fitted.candidates if c.name == name),
    }


class _Callbacks:
    """The callbacks of scikit-learn that were set on an estimator, if any, during one fit."""

    def __init__(self, estimator: EBMFlowDensity, X: Any, y: Any) -> None:
        self.estimator = estimator
        # ScoringMonitor scores nothing without a y, and a density ignores it.
        self.data = {"X": X, "y": np.zeros(len(X)) if y is None else y}
        self.context = None
        if getattr(estimator, "_skl_callbacks", None):
            self.context = estimator._init_callback_context(max_subtasks=None)
            self.context.call_on_fit_task_begin(estimator=estimator, **self.data)

    def check(self, attributes: Callable[[], dict[str, Any]]) -> bool:
        """Call them after a validation check; return whether one of them wants to stop."""
        if self.context is None:
            return False
        check = self.context.subcontext(task_name="validation check")
        check.call_on_fit_task_begin(estimator=self.estimator, **self.data)
        return bool(
            check.call_on_fit_task_end(estimator=self.estimator, reconstruction_attributes=attributes, **self.data)
        )

    def end(self) -> None:
        """Call them after the fit."""
        if self.context is not None:
            self.context.call_on_fit_task_end(estimator=self.estimator, reconstruction_attributes=dict, **self.data)


@contextmanager
def restored_on_failure(estimator: BaseEstimator) -> Iterator[None]:
    """Leave the estimator as it was if the block fails: a failed fit keeps the previous one whole."""
    before = dict(vars(estimator))
    try:
        yield
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise


def _to_tensor(X: np.ndarray) -> torch.Tensor:
    """Float64 tensor of a copy: torch shares no memory that is read-only or runs backwards."""
    return torch.from_numpy(np.array(X, dtype=np.float64, order="C"))


def _seed(random_state: Any) -> int:
    """Draw a seed from scikit-learn's `random_state`."""
    if random_state is None:
        # Fresh entropy: numpy's global state, which check_random_state(None) would advance, is the user's.
        return int(np.random.SeedSequence().generate_state(1)[0])
    return int(check_random_state(random_state).randint(2**31 - 1))


def _generator(random_state: Any) -> torch.Generator:
    """CPU generator whose seed comes from scikit-learn's `random_state`."""
    return torch.Generator().manual_seed(_seed(random_state))


def check_rows(estimator: BaseEstimator, X: Any, *y: Any, **options: Any) -> Any:
    """Check rows (and labels) as scikit-learn does, and refuse masked values, which it would take for numbers."""
    if np.ma.is_masked(X):
        raise ValueError(f"X has {np.ma.count_masked(X)} masked values. Fill them, or drop their rows.")
    return validate_data(estimator, X, *y, dtype=[np.float64, np.float32], **options)


def check_n_samples(n_samples: Any, minimum: int = 1) -> int:
    """Check a number of rows to draw."""
    if not isinstance(n_samples, Integral) or isinstance(n_samples, bool):
        raise TypeError(f"n_samples must be an integer, got {n_samples!r}.")
    if n_samples < minimum:
        raise ValueError(f"n_samples must be at least {minimum}, got {n_samples}.")
    return int(n_samples)


def _check_sizes(sizes: Any) -> tuple[int, ...]:
    """Check hidden layer sizes."""
    sizes = tuple(sizes)
    if not sizes or any(not isinstance(size, Integral) or size < 1 for size in sizes):
        raise ValueError(f"hidden_layer_sizes must be 'auto' or positive integers such as (64, 64), got {sizes!r}.")
    return tuple(int(size) for size in sizes)


def _resolve_device(device: str) -> torch.device:
    """Turn the `device` parameter into a torch device that exists here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        usable = "'auto', 'cpu' or 'cuda'" if torch.cuda.is_available() else "'auto' or 'cpu'"
        raise ValueError(f"device={device!r} cannot be used here. Try {usable}.") from error
    return resolved
