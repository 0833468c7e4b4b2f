"""Class proportions: of a fitted density, and of unlabelled rows under prior shift, with standard errors."""

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from joblib import Parallel, delayed
from scipy.special import logsumexp
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, has_fit_parameter

from sk_ebm._calibration import fit_calibration, no_calibration
from sk_ebm._density import DOC_LINK, EBMFlowDensity, check_n_samples, check_rows, restored_on_failure
from sk_ebm._draws import draw_samples
from sk_ebm._log_normalizer import effective_sample_size
from sk_ebm._persistence import Versioned
from sk_ebm._stacking import mixture_shares

_TRUSTED_DRAWS = 100
_CALIBRATION_FOLDS = 5
_ABSENT = 1e-6


class ProportionsWarning(UserWarning):
    """Proportions rest on fewer draws or rows than were asked for."""


class ClassProportions(NamedTuple):
    """Share of each class with its standard error.

    Attributes
    ----------
    classes : ndarray of shape (n_classes,)
        Class labels.
    proportions : ndarray of shape (n_classes,)
        Shares, which sum to one.
    std_errors : ndarray of shape (n_classes,)
        Standard errors of the shares.
    """

    classes: np.ndarray
    proportions: np.ndarray
    std_errors: np.ndarray


def class_proportions(
    density: Any,
    classifier: Any,
    *,
    n_samples: int = 20_000,
    response_method: str = "auto",
    random_state: Any = None,
) -> ClassProportions:
    """Estimate the share of a fitted density that belongs to each class.

    Rows drawn from the proposal of the density are classified and counted by their importance weights, so the
    shares are those of the density itself.

    Parameters
    ----------
    density : fitted estimator
        An EBMFlowDensity; draws of any other density with `sample` are counted with equal weights.
    classifier : fitted classifier or callable
        Classifier with `predict_proba` or `predict`, or a function from rows to labels.
    n_samples : int, default=20000
        Number of rows to draw, at least 2.
    response_method : {"auto", "predict_proba", "predict"}, default="auto"
        What to count: probabilities or labels. "auto" takes probabilities where the classifier has them.
    random_state : int, RandomState instance or None, default=None
        Source of randomness.

    Returns
    -------
    ClassProportions
        Standard errors are those of the draws; the errors of the density and of the classifier come on top.

    Raises
    ------
    ValueError
        If `response_method` is unknown, there are fewer than two draws, or the classifier returns the wrong number of
        labels.
    TypeError
        If the density has no `sample`, or the classifier is neither an estimator with `predict` nor a function.

    Examples
    --------
    >>> import numpy as np
    >>> from sk_ebm import EBMFlowDensity, class_proportions
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> density = EBMFlowDensity(base="gaussian", max_iter=5, random_state=0).fit(X)
    >>> share = class_proportions(density, lambda X: X[:, 0] > 0, random_state=0)
    >>> share.classes
    array([False,  True])
    """
    if response_method not in ("auto", "predict_proba", "predict"):
        raise ValueError(f"response_method must be 'auto', 'predict_proba' or 'predict', got {response_method!r}.")
    X, weight = _weighted_rows(density, check_n_samples(n_samples, minimum=2), random_state)
    classes, membership = _memberships(classifier, _as_seen_by(classifier, X, density), response_method)
    weight = weight / weight.sum()
    proportions = weight @ membership
    # The delta method for a ratio of means.
    std_errors = np.sqrt(np.square(weight) @ np.square(membership - proportions))
    return ClassProportions(classes, proportions, std_errors)


class DensityClassifier(Versioned, ClassifierMixin, BaseEstimator):
    """Classifier from one density per class that also estimates class proportions under prior shift.

    By Bayes' rule a row belongs to class c with probability proportional to prior(c) * p(row | c). Where the
    priors of unlabelled rows differ from those of the training rows, `estimate_proportions` finds them.

    Parameters
    ----------
    density : estimator, default=None
        Density with `fit` and `score_samples`, cloned for each class; None takes EBMFlowDensity. All must score in
        the same units: scale the features before this estimator, not in a pipeline of each class.
    class_prior : array-like of shape (n_classes,), default=None
        Prior probabilities of the classes for `predict` and `predict_proba`; None takes the training shares.
    calibrate : bool, default=True
        Whether to learn a common temperature, an offset and a linear tilt per class and the share of exceptional rows
        from densities of rows they have not seen.
        EBMFlowDensity holds out rows of its own; another density is fitted five times more for this. Where a class
        has too few rows to hold some out, a ProportionsWarning says that nothing was calibrated.
    prior_count : float, default=0
        Rows that each class is taken to have besides those given, when proportions are estimated: a Dirichlet prior.
        0 is maximum likelihood; 0.5 steadies the proportions that few rows say of overlapping classes, and hardly
        moves others.
    n_jobs : int, default=None
        Classes fitted at a time, by joblib.
    random_state : int, RandomState instance or None, default=None
        Source of randomness of the densities; None leaves theirs as it is.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Class labels.
    class_prior_ : ndarray of shape (n_classes,)
        Prior probabilities.
    densities_ : list of estimators
        Fitted density of each class.
    calibration_ : Calibration
        `scale`, `offset`, `tilt` and `contamination` that turn log densities into calibrated ones.
    n_features_in_ : int
        Number of features seen by `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the features, when X has string column names.

    See Also
    --------
    class_proportions : Shares of one density by a classifier.

    References
    ----------
    M. Saerens, P. Latinne, C. Decaestecker, "Adjusting the outputs of a classifier to new a priori probabilities",
    Neural Computation 14, 2002.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.neighbors import KernelDensity
    >>> from sk_ebm import DensityClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> model = DensityClassifier(KernelDensity(bandwidth=0.3)).fit(X, y)
    >>> model.estimate_proportions(X[y > 0]).proportions.round(2)
    array([0. , 0.5, 0.5])
    """

    # Where the HTML representation links to.
    _doc_link_module = "sk_ebm"
    _doc_link_template = DOC_LINK

    def __init__(
        self,
        density: Any = None,
        *,
        class_prior: Any = None,
        calibrate: bool = True,
        prior_count: float = 0.0,
        n_jobs: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.density = density
        self.class_prior = class_prior
        self.calibrate = calibrate
        self.prior_count = prior_count
        self.n_jobs = n_jobs
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "DensityClassifier":
        """Fit one density to the rows of each class.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training rows.
        y : array-like of shape (n_samples,)
            Class labels.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights: a row of weight 2 counts as the row twice, also in the evidence for a calibration.

        Returns
        -------
        DensityClassifier
            The fitted classifier itself.

        Raises
        ------
        ValueError
            If the density cannot be fitted to a class, where the message names the class and the number of its rows;
            if no row has a weight, or `class_prior` is no distribution over the classes.
        TypeError
            If the density has no `score_samples`, or takes no `sample_weight` where there is one.
        """
        with restored_on_failure(self):
            self._fit(X, y, sample_weight)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each row, shape (n_samples,)."""
        best = self.predict_log_proba(X).argmax(1)
        return self.classes_[best]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each class for each row, shape (n_samples, n_classes)."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Return the log probability of each class for each row, shape (n_samples, n_classes).

        A row where every density of positive prior is zero gets the prior.
        """
        check_is_fitted(self)
        with np.errstate(divide="ignore"):
            log_prior = np.log(self.class_prior_)
        joint = self._calibrated(X) + log_prior
        joint[np.isneginf(joint).all(1)] = log_prior
        return joint - logsumexp(joint, axis=1, keepdims=True)

    def score_samples_by_class(self, X: Any) -> np.ndarray:
        """Return the log density (nats) of each row under each class, shape (n_samples, n_classes)."""
        check_is_fitted(self)
        return self._score_by_class(check_rows(self, X, reset=False))

    def _score_by_class(self, X: np.ndarray) -> np.ndarray:
        rows = _with_names(X, self)
        return np.column_stack([density.score_samples(rows) for density in self.densities_])

    def _calibrated(self, X: Any) -> np.ndarray:
        """Return the calibrated log density of each row under each class, shape (n_samples, n_classes)."""
        X = check_rows(self, X, reset=False)
        return self.calibration_(self._score_by_class(X), X.astype(np.float64, copy=False))

    def estimate_proportions(self, X: Any, sample_weight: Any = None) -> ClassProportions:
        """Estimate the class proportions of unlabelled rows by maximum likelihood, or with a `prior_count`.

        The proportions may differ from those of the training rows; within a class, rows must be distributed alike.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Unlabelled rows.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights: a row of weight 2 counts as the row twice.

        Returns
        -------
        ClassProportions
            Standard errors come from the observed information and from the errors of the calibration, or without
            it from those of the normalizers. How well the densities fit is not in them.

        Raises
        ------
        ValueError
            If no row lies where any of the densities is positive, or `prior_count` is negative.
        """
        check_is_fitted(self)
        if not 0 <= self.prior_count < np.inf:
            raise ValueError(f"prior_count must be a number of rows, 0 or more, got {self.prior_count!r}.")
        log_density = self._calibrated(X)
        weight = np.ones(len(log_density))
        if sample_weight is not None:
            weight = _check_sample_weight(sample_weight, log_density, dtype=np.float64, ensure_non_negative=True)
        is_inside, counts = np.isfinite(log_density).any(1), weight > 0
        n_outside = int((counts & ~is_inside).sum())
        counts &= is_inside
        if not counts.any():
            raise ValueError(
                f"None of the {len(weight)} rows has a positive weight and a positive density under any class, so they "
                "say nothing of the proportions. Check the units of X, or use densities without compact support."
            )
        if n_outside:
            warnings.warn(
                f"{n_outside} of {len(weight)} rows have density zero under every class and were left out. Use "
                "densities without compact support to count them.",
                ProportionsWarning,
                stacklevel=2,
            )
        log_density, weight = log_density[counts], weight[counts]
        if self.prior_count > 0:
            # The prior is so many rows more, each known to be of its class.
            of_class = np.where(np.eye(len(self.classes_)) > 0, 0.0, -np.inf)
            log_density = np.concatenate([log_density, of_class])
            weight = np.append(weight, np.full(len(of_class), self.prior_count))
        proportions = mixture_shares(torch.from_numpy(log_density.T), torch.from_numpy(weight)).numpy()
        std_errors = _std_errors(log_density, weight, proportions, self.calibration_.offset_covariance)
        return ClassProportions(self.classes_, proportions, std_errors)

    def quantify(self, X: Any) -> np.ndarray:
        """Return the estimated proportions alone, in the order of `classes_`, as quantification packages do."""
        return self.estimate_proportions(X).proportions

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> None:
        X, y = check_rows(self, X, y)
        check_classification_targets(y)
        weight = np.ones(len(X))
        if sample_weight is not None:
            weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if not (weight > 0).any():
            raise ValueError("All of sample_weight is zero, so there is no row to fit. Give some row a weight.")
        classes, label = np.unique(y[weight > 0], return_inverse=True)
        X, given_weight, weight = X[weight > 0], sample_weight, weight[weight > 0]
        prior = self._prior(np.bincount(label, weights=weight) / weight.sum())
        densities = self._unfitted_densities(len(classes))
        if given_weight is not None and not has_fit_parameter(densities[0], "sample_weight"):
            raise TypeError(
                f"{type(densities[0]).__name__} takes no sample_weight; fit without, or use another density."
            )
        rows = _with_names(X, self)
        parts = [
            (rows[label == k], None if given_weight is None else weight[label == k], name)
            for k, name in enumerate(classes)
        ]
        fit = Parallel(n_jobs=self.n_jobs)
        self.densities_ = fit(delayed(_fit_class)(d, *part) for d, part in zip(densities, parts, strict=True))
        self.classes_, self.class_prior_ = classes, prior
        errors = np.array([getattr(density, "log_normalizer_std_error_", 0.0) for density in self.densities_])
        self.calibration_ = no_calibration(errors)
        if self.calibrate and len(classes) > 1:
            own = fit(
                delayed(_held_out_log_density)(d, fitted, *part)
                for d, fitted, part in zip(densities, self.densities_, parts, strict=True)
            )
            log_density = self._score_by_class(X)
            for k, values in enumerate(own):
                log_density[label == k, k] = values
            is_known = ~np.isnan(log_density).any(1) & np.isfinite(log_density).any(1)
            n_known = np.bincount(label[is_known], minlength=len(classes))
            unknown = n_known.argmin()
            if n_known[unknown] > 0:
                self.calibration_ = fit_calibration(
                    log_density[is_known], X[is_known].astype(np.float64), label[is_known], weight[is_known]
                )
            else:
                reason, remedy = "has too few rows to hold some out", "give more rows"
                if not np.isnan(own[unknown]).all():
                    reason, remedy = "has density zero at all rows that were held out", "use wider densities"
                warnings.warn(
                    f"Class {classes[unknown]} {reason}, so log densities are used as they are. Set calibrate=False to "
                    f"agree, or {remedy}.",
                    ProportionsWarning,
                    stacklevel=3,
                )

    def _prior(self, shares: np.ndarray) -> np.ndarray:
        if self.class_prior is None:
            return shares
        try:
            prior = np.asarray(self.class_prior, dtype=np.float64)
        except (TypeError, ValueError):
            prior = np.empty(0)
        if prior.shape != shares.shape or (prior < 0).any() or not np.isclose(prior.sum(), 1):
            raise ValueError(
                f"class_prior must hold {len(shares)} non-negative numbers that sum to one, one per class, "
                f"got {self.class_prior!r}."
            )
        return prior

    def _unfitted_densities(self, n_classes: int) -> list[Any]:
        prototype = EBMFlowDensity() if self.density is None else self.density
        if not hasattr(prototype, "score_samples"):
            raise TypeError(f"density must have `score_samples`, as KernelDensity has, got {prototype!r}.")
        densities = [clone(prototype) for _ in range(n_classes)]
        if self.random_state is not None:
            seeds = [name for name in prototype.get_params() if name.rpartition("__")[-1] == "random_state"]
            random_state = check_random_state(self.random_state)
            for density in densities:
                density.set_params(**{name: random_state.randint(2**31 - 1) for name in seeds})
        return densities


def _fit_class(density: Any, X: Any, weight: np.ndarray | None, name: Any) -> Any:
    """Fit the density of one class, and name the class where that fails."""
    try:
        return density.fit(X) if weight is None else density.fit(X, sample_weight=weight)
    except ValueError as error:
        raise ValueError(
            f"The density of class {name} cannot be fitted to its {len(X)} sample{'s' * (len(X) != 1)}: {error}"
        ) from error


def _held_out_log_density(unfitted: Any, fitted: Any, X: Any, weight: np.ndarray | None, name: Any) -> np.ndarray:
    """Return log densities (nats) of the rows of a class that its density has not seen, nan where it has."""
    if hasattr(fitted, "oob_log_density_"):
        return fitted.oob_log_density_
    held_out = np.full(len(X), np.nan)
    # Equal rows stay together, so that none is judged by its copy, and a weight does what repetition does.
    kinds, kind = np.unique(X, axis=0, return_inverse=True)
    if len(kinds) < 2 * _CALIBRATION_FOLDS:
        return held_out
    fold = (np.random.default_rng(0).permutation(len(kinds)) % _CALIBRATION_FOLDS)[kind.ravel()]
    for k in range(_CALIBRATION_FOLDS):
        seen, unseen = fold != k, fold == k
        try:
            density = _fit_class(clone(unfitted), X[seen], None if weight is None else weight[seen], name)
        except ValueError:
            # The class as a whole is large enough for its density, four fifths of it are not.
            continue
        held_out[unseen] = density.score_samples(X[unseen])
    return held_out


def _weighted_rows(density: Any, n_samples: int, random_state: Any) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows and weights that stand for the density."""
    if not hasattr(density, "importance_sample"):
        return draw_samples(density, n_samples, random_state), np.ones(n_samples)
    X, weight = density.importance_sample(n_samples, random_state)
    with np.errstate(divide="ignore"):
        n_effective = float(effective_sample_size(torch.from_numpy(np.log(weight)))) * n_samples
    if n_effective < _TRUSTED_DRAWS:
        warnings.warn(
            f"The {n_samples} draws are worth {n_effective:.0f} of the density's own: the standard errors cannot be "
            "trusted. Increase n_samples, or fit a density with a larger effective_sample_size_.",
            ProportionsWarning,
            stacklevel=3,
        )
    return X, weight


def _as_seen_by(classifier: Any, X: np.ndarray, density: Any) -> Any:
    """Return draws as a frame where both the density and the classifier were fitted to one."""
    return _with_names(X, density) if hasattr(classifier, "feature_names_in_") else X


def _with_names(X: np.ndarray, estimator: Any) -> Any:
    """Return rows as a frame, if the estimator was fitted to one."""
    if not hasattr(estimator, "feature_names_in_"):
        return X
    try:
        from pandas import DataFrame
    except ImportError:  # The frames were of another kind.
        return X
    return DataFrame(X, columns=estimator.feature_names_in_)


def _memberships(classifier: Any, X: Any, response_method: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes and the membership of each row in each, shape (n, n_classes)."""
    if isinstance(classifier, BaseEstimator):
        check_is_fitted(classifier)
    if response_method != "predict" and hasattr(classifier, "predict_proba"):
        return np.asarray(classifier.classes_), np.asarray(classifier.predict_proba(X))
    if response_method == "predict_proba":
        raise ValueError(f"{classifier!r} has no predict_proba; use response_method='predict'.")
    if not hasattr(classifier, "predict") and not callable(classifier):
        raise TypeError(
            "classifier must be a fitted classifier, or a function from an array of rows to labels, got "
            f"{classifier!r}."
        )
    labels = np.asarray(classifier.predict(X) if hasattr(classifier, "predict") else classifier(X))
    if labels.shape != (len(X),):
        raise ValueError(
            f"The classifier must return one label per row, shape ({len(X)},), but returned {labels.shape}."
        )
    classes = np.unique(np.concatenate([labels, np.asarray(getattr(classifier, "classes_", labels[:0]))]))
    return classes, (labels[:, None] == classes).astype(np.float64)


def _std_errors(
    log_density: np.ndarray, weight: np.ndarray, proportions: np.ndarray, offset_covariance: np.ndarray
) -> np.ndarray:
    """Return standard errors of maximum-likelihood proportions, or of the mode with a prior, which is rows too.

    The observed information is ``H = sum_i w_i r_i r_i'`` with ``r_ic = p_c(x_i) / sum_k share_k p_k(x_i)``,
    restricted to changes of the positive shares that keep their sum; an offset of log p_c shifts the shares through
    the score. A share of zero is no stationary point: its error is how far it can rise, the others shrinking in
    proportion, before the log-likelihood has fallen by one half, which inside the simplex is one standard error too;
    and by so much are these uncertain as well.
    """
    with np.errstate(divide="ignore"):
        log_mixture = logsumexp(log_density + np.log(proportions), axis=1, keepdims=True)
    ratio = np.exp(log_density - log_mixture)
    is_present = proportions > _ABSENT
    std_errors = np.empty(len(proportions))

    present, share = ratio[:, is_present], proportions[is_present]
    information = (weight[:, None] * present).T @ present
    # Orthonormal basis of the changes that sum to zero.
    basis = np.linalg.svd(np.ones((1, len(share))))[2][1:].T
    covariance = basis @ np.linalg.pinv(basis.T @ information @ basis) @ basis.T
    shift = covariance @ (np.diag(weight @ present) - information * share)
    offset_covariance = offset_covariance[np.ix_(is_present, is_present)]
    variance_of_present = np.diag(covariance + shift @ offset_covariance @ shift.T)

    slope = np.maximum(weight.sum() - weight @ ratio[:, ~is_present], 0.0)
    curvature = weight @ np.square(ratio[:, ~is_present] - 1)
    std_errors[~is_present] = 1 / (slope + np.sqrt(np.square(slope) + curvature))
    std_errors[is_present] = np.sqrt(variance_of_present + np.square(share) * np.square(std_errors[~is_present]).sum())
    return std_errors
