"""
Many rows, many workers
=======================

``python examples/score_with_dask.py`` starts two local workers of Dask, scores an array in blocks on them, and lets
them share a grid search. On a cluster, give ``Client`` its address instead; nothing else changes.

Needs ``pip install "dask[array]" distributed``.
"""

import dask.array as da
import joblib
import numpy as np
from dask.distributed import Client, LocalCluster
from sklearn.datasets import make_moons
from sklearn.model_selection import GridSearchCV

from sk_ebm import EBMFlowDensity


def main() -> None:
    X, _ = make_moons(500, noise=0.1, random_state=0)
    density = EBMFlowDensity(base="gaussian", n_estimators=2, max_iter=40, random_state=0)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster,
        Client(cluster),
    ):
        # A block is scored where it lies; only the fitted model travels.
        with joblib.parallel_config("dask"):
            search = GridSearchCV(density, {"alpha": [0.1, 0.3]}, cv=2).fit(X)
        print("alpha chosen:", search.best_params_["alpha"])
        density = search.best_estimator_
        grid = da.random.default_rng(0).uniform(-2, 3, size=(200_000, 2), chunks=(50_000, 2))
        scores = grid.map_blocks(density.score_samples, drop_axis=1, dtype=float, meta=np.empty(0)).persist()
        print("mass on the square:", float((25 * np.exp(scores)).mean().compute()))
        rows = np.asarray(grid[::50_000])
        print(
            "as without Dask:", np.allclose(scores[::50_000].compute(), density.score_samples(rows), rtol=0, atol=1e-8)
        )


if __name__ == "__main__":
    main()
