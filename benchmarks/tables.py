"""Real tables: those that scikit-learn bundles, and the `.npz` files of a folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from sklearn.decomposition import PCA

MAX_ROWS = 60_000


def spread_ties(X: np.ndarray) -> np.ndarray:
    """Fill the rounding of every column up by uniform noise of one step: repeated values have no density."""
    rng = np.random.default_rng(0)
    steps = [np.diff(np.unique(column)).min() if 1 < len(np.unique(column)) < len(column) else 0.0 for column in X.T]
    return X + rng.uniform(-0.5, 0.5, X.shape) * steps


def iris() -> np.ndarray:
    """The four lengths."""
    return spread_ties(load_iris().data)


def wine() -> np.ndarray:
    """The thirteen measurements."""
    return spread_ties(load_wine().data)


def diabetes() -> np.ndarray:
    """All columns but sex."""
    return spread_ties(np.delete(load_diabetes(scaled=False).data, 1, axis=1))


def breast_cancer() -> np.ndarray:
    """The ten means, without perimeter and area, which the radius determines."""
    return spread_ties(np.delete(load_breast_cancer().data[:, :10], [2, 3], axis=1))


def digits() -> np.ndarray:
    """Ten principal components of the digits."""
    return PCA(10).fit_transform(spread_ties(load_digits().data))


def tables(folder: Path | None) -> dict[str, Callable[[], np.ndarray]]:
    """Return what loads each table; files have `X` and, if not all its columns are continuous, indices `keep`."""
    loaders: dict[str, Callable[[], np.ndarray]] = {
        table.__name__: table for table in (iris, wine, diabetes, breast_cancer, digits)
    }
    for path in sorted(folder.glob("*.npz")) if folder else ():
        loaders[path.stem] = lambda path=path: _load(path)
    return loaders


def _load(path: Path) -> np.ndarray:
    with np.load(path) as table:
        X = table["X"][:, table["keep"]] if "keep" in table else table["X"]
    if X.shape[1] > 100:
        X = PCA(20, random_state=0).fit_transform(spread_ties(X.astype(float)))
    order = np.random.default_rng(0).permutation(len(X))[:MAX_ROWS]
    return X[order].astype(float)
