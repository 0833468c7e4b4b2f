"""Real tables: those that scikit-learn bundles, and the `.npz` files of a folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from sklearn.decomposition import PCA

MAX_ROWS = 60_000


def iris() -> np.ndarray:
    """Iris, with the rounding to a tenth filled up by uniform noise: ties have no density."""
    X = load_iris().data
    return X + np.random.default_rng(0).uniform(-0.05, 0.05, X.shape)


def breast_cancer() -> np.ndarray:
    """The ten means, without perimeter and area, which the radius determines."""
    return np.delete(load_breast_cancer().data[:, :10], [2, 3], axis=1)


def diabetes() -> np.ndarray:
    """The continuous columns: without sex, and with rounded ones left out."""
    X = load_diabetes(scaled=False).data
    return X[:, [2, 3, 4, 5, 8]] + np.random.default_rng(0).uniform(-0.05, 0.05, (len(X), 5))


def digits() -> np.ndarray:
    """Ten principal components of the digits, whose sixteen grey levels are filled up by uniform noise."""
    X = load_digits().data
    return PCA(10).fit_transform(X + np.random.default_rng(0).uniform(-0.5, 0.5, X.shape))


def wine() -> np.ndarray:
    """Wine, with the rounding to a hundredth filled up."""
    X = load_wine().data
    return X + np.random.default_rng(0).uniform(-0.005, 0.005, X.shape)


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
        X = PCA(20, random_state=0).fit_transform(X + np.random.default_rng(0).uniform(-0.5, 0.5, X.shape))
    order = np.random.default_rng(0).permutation(len(X))[:MAX_ROWS]
    return X[order].astype(float)
