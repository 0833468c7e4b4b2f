"""Print how far the log density of scikit-learn's KernelDensity is from the same estimate summed directly.

Run ``python benchmarks/kernel_density_error.py``, with ``--bandwidth 1`` for another one. The tree search may stop at
an absolute or a relative tolerance, both zero by default, and yet the value is too high in many dimensions where the
bandwidth is small (scikit-learn issues 7492 and 25799).
"""

import argparse
import math

import numpy as np
import sklearn
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from sklearn.neighbors import KernelDensity

N_TRAIN, N_TEST = 1000, 200


def direct_log_density(X_train: np.ndarray, X_test: np.ndarray, bandwidth: float) -> np.ndarray:
    """Sum every kernel."""
    d = X_train.shape[1]
    exponents = -0.5 * cdist(X_test, X_train, "sqeuclidean") / bandwidth**2
    return logsumexp(exponents, axis=1) - math.log(N_TRAIN) - d * math.log(bandwidth * math.sqrt(2 * math.pi))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bandwidth", type=float, default=0.3)
    bandwidth = parser.parse_args().bandwidth
    print(f"scikit-learn {sklearn.__version__}; {N_TRAIN} standard normal rows, bandwidth {bandwidth}\n")
    print("| features | score_samples, mean | summed directly, mean | error, mean | error with one leaf, mean |")
    print("| --- " * 5 + "|")
    for d in (1, 2, 5, 10, 20, 50, 100):
        rng = np.random.default_rng(d)
        X_train, X_test = rng.standard_normal((N_TRAIN, d)), rng.standard_normal((N_TEST, d))
        direct = direct_log_density(X_train, X_test, bandwidth)
        default, one_leaf = (
            KernelDensity(bandwidth=bandwidth, leaf_size=leaf_size).fit(X_train).score_samples(X_test)
            for leaf_size in (40, N_TRAIN)
        )
        print(
            f"| {d} | {default.mean():.2f} | {direct.mean():.2f} | {(default - direct).mean():+.2f} "
            f"| {(one_leaf - direct).mean():+.2f} |"
        )


if __name__ == "__main__":
    main()
