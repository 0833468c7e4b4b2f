"""The densities a user would pick instead: tuned as a careful user would, but for the two plain energy-based models.

Every function takes training rows and a seed, and returns a density with `score_samples` (nats, in the units of the
rows) and `sample`.
"""

import copy
import math
from collections.abc import Callable

import normflows as nf
import numpy as np
import pyvinecopulib as pv
import torch
import zuko
from langevin import LangevinEBM, TorchEBM
from pyvinecopulib.sklearn import VineDensity
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, ShuffleSplit
from sklearn.neighbors import KernelDensity

# Cross-validation scores at most so many rows of each fold.
_MAX_SCORED = 2000


class Scaled:
    """Density of rows divided by a scale, their standard deviation by default, in the units they had before."""

    def __init__(self, fit: Callable[[np.ndarray], object], X: np.ndarray, scale: np.ndarray | None = None) -> None:
        self.mean, self.scale = X.mean(0), X.std(0) if scale is None else scale
        self.density = fit((X - self.mean) / self.scale)

    def score_samples(self, X: np.ndarray) -> np.ndarray:
        """Return log densities (nats) in the units of X."""
        return self.density.score_samples((X - self.mean) / self.scale) - np.log(self.scale).sum()

    def sample(self, n_samples: int) -> np.ndarray:
        """Draw rows."""
        drawn = self.density.sample(n_samples)
        return (drawn[0] if isinstance(drawn, tuple) else drawn) * self.scale + self.mean


def folds(X: np.ndarray) -> int | ShuffleSplit:
    """Five folds; with many rows one split is as certain."""
    return 5 if len(X) <= 2 * _MAX_SCORED else ShuffleSplit(1, test_size=_MAX_SCORED, random_state=0)


def tuned_kernel_density(X: np.ndarray, seed: int = 0) -> Scaled:
    """Standardise, then choose the bandwidth by cross-validated likelihood.

    One leaf makes the tree sum every kernel: the default tree of scikit-learn is inexact in many dimensions.
    """
    grid = {"bandwidth": np.geomspace(0.03, 1.5, 25)}
    return Scaled(lambda z: GridSearchCV(KernelDensity(leaf_size=len(z)), grid, cv=folds(z)).fit(z).best_estimator_, X)


def tuned_gaussian_mixture(X: np.ndarray, seed: int = 0) -> Scaled:
    """Choose components, covariance type, and standardised or own units by cross-validated likelihood.

    The units matter: a sphere in one is none in the other.
    """
    grid = {
        "n_components": [k for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if 10 * k <= len(X)],
        "covariance_type": ["full", "tied", "diag", "spherical"],
    }

    def search(z: np.ndarray) -> GridSearchCV:
        return GridSearchCV(GaussianMixture(random_state=seed), grid, cv=folds(z)).fit(z)

    both = [Scaled(search, X), Scaled(search, X, scale=np.ones(X.shape[1]))]
    best = max(both, key=lambda scaled: scaled.density.best_score_ - np.log(scaled.scale).sum())
    best.density = best.density.best_estimator_
    return best


def vine_copula(X: np.ndarray, seed: int = 0) -> Scaled:
    """Kernel margins and a vine of pair copulas, parametric or not, each chosen by AIC."""
    # The default of VineDensity knows nonparametric pairs alone.
    controls = pv.FitControlsVinecop(family_set=[*pv.parametric, pv.BicopFamily.tll], selection_criterion="aic")
    return Scaled(lambda z: VineDensity(controls=controls, random_state=seed).fit(z), X)


class TrainedFlow:
    """Flow of the best of a few sizes, each trained by Adam until rows held out no longer improve.

    Parameters
    ----------
    make : callable
        Function of (n_features, n_transforms, hidden_units) that builds a flow with `log_prob` and `sample`.
    """

    sizes = ((2, 64), (4, 64), (4, 128))
    learning_rate, batch_size, max_steps, check_every, patience = 2e-3, 256, 3000, 25, 12

    def __init__(self, make: Callable[[int, int, int], torch.nn.Module], seed: int) -> None:
        self.make, self.seed = make, seed

    def fit(self, z: np.ndarray) -> "TrainedFlow":
        """Train every size and keep the best."""
        torch.manual_seed(self.seed)
        rows = torch.from_numpy(z[np.random.default_rng(self.seed).permutation(len(z))]).float()
        n_held_out = min(len(z) // 5, _MAX_SCORED)
        fits = [self._train(size, rows[n_held_out:], rows[:n_held_out]) for size in self.sizes]
        self.flow = max(fits, key=lambda fit: fit[0])[1]
        return self

    def score_samples(self, z: np.ndarray) -> np.ndarray:
        """Return log densities (nats)."""
        with torch.no_grad():
            parts = torch.from_numpy(z).float().split(8192)
            return torch.cat([self.flow.log_prob(part) for part in parts]).double().numpy()

    def sample(self, n_samples: int) -> np.ndarray:
        """Draw rows."""
        with torch.no_grad():
            return self.flow.sample(n_samples).double().numpy()

    def _train(
        self, size: tuple[int, int], rows: torch.Tensor, held_out: torch.Tensor
    ) -> tuple[float, torch.nn.Module]:
        flow = self.make(rows.shape[1], *size)
        optimizer = torch.optim.Adam(flow.parameters(), lr=self.learning_rate)
        best_score, best, stale = -math.inf, copy.deepcopy(flow.state_dict()), 0
        for step in range(self.max_steps):
            if step % self.check_every == 0:
                with torch.no_grad():
                    score = float(flow.log_prob(held_out).mean())
                stale = 0 if score > best_score else stale + 1
                if score > best_score:
                    best_score, best = score, copy.deepcopy(flow.state_dict())
                if stale > self.patience:
                    break
            loss = -flow.log_prob(rows[torch.randint(len(rows), (self.batch_size,))]).mean()
            if loss.isfinite():
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
                optimizer.step()
        flow.load_state_dict(best)
        return best_score, flow.eval()


class NormflowsSpline(torch.nn.Module):
    """Autoregressive rational-quadratic spline flow of normflows."""

    def __init__(self, n_features: int, n_transforms: int, hidden_units: int) -> None:
        super().__init__()
        layers = []
        for _ in range(n_transforms):
            layers.append(nf.flows.AutoregressiveRationalQuadraticSpline(n_features, 1, hidden_units, tail_bound=5))
            layers.append(nf.flows.LULinearPermute(n_features))
        self.flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(n_features, trainable=False), layers)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return log densities (nats)."""
        return self.flow.log_prob(z)

    def sample(self, n_samples: int) -> torch.Tensor:
        """Draw rows."""
        return self.flow.sample(n_samples)[0]


class ZukoNSF(torch.nn.Module):
    """Neural spline flow of zuko."""

    def __init__(self, n_features: int, n_transforms: int, hidden_units: int) -> None:
        super().__init__()
        self.flow = zuko.flows.NSF(n_features, transforms=n_transforms, hidden_features=(hidden_units, hidden_units))

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return log densities (nats)."""
        return self.flow().log_prob(z)

    def sample(self, n_samples: int) -> torch.Tensor:
        """Draw rows."""
        return self.flow().sample((n_samples,))


def normflows_spline(X: np.ndarray, seed: int = 0) -> Scaled:
    """Tuned spline flow of normflows."""
    return Scaled(TrainedFlow(NormflowsSpline, seed).fit, X)


def zuko_spline(X: np.ndarray, seed: int = 0) -> Scaled:
    """Tuned neural spline flow of zuko."""
    return Scaled(TrainedFlow(ZukoNSF, seed).fit, X)


def langevin_ebm(X: np.ndarray, seed: int = 0) -> Scaled:
    """Our energies, trained with persistent Langevin chains and no flow."""
    return Scaled(LangevinEBM(random_state=seed).fit, X)


def torchebm_pcd(X: np.ndarray, seed: int = 0) -> Scaled:
    """Energies trained by the persistent contrastive divergence of torchebm."""
    return Scaled(TorchEBM(random_state=seed).fit, X)


PEERS: dict[str, Callable[[np.ndarray, int], Scaled]] = {
    "KernelDensity": tuned_kernel_density,
    "GaussianMixture": tuned_gaussian_mixture,
    "vine copula": vine_copula,
    "normflows RQS": normflows_spline,
    "zuko NSF": zuko_spline,
    "Langevin EBM": langevin_ebm,
    "torchebm PCD": torchebm_pcd,
}
