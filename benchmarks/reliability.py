"""Is the standard error of log Z what it says, and do healthy fits warn? Default fits, judged by quadrature.

Run ``python benchmarks/reliability.py``: ten tasks of one or two features, five seeds each, one thread a fit.
"""

import argparse
import math
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
from run import log_integral  # noqa: E402
from tasks import all_tasks  # noqa: E402

from sk_ebm import EBMFlowDensity  # noqa: E402

TASKS = """claw_1d skewed_bimodal_1d rings checkerboard two_moons eight_gaussians spirals pinwheel banana
    forty_gaussians""".split()
N_TEST = 5000
# What the grid gets wrong by itself (nats), which is all there is where energies are flat and log Z is exact.
GRID_ERROR = 1e-4


def judge(name: str, seed: int, n_train: int) -> tuple[float, float, float, list[str]]:
    """Fit; return the error of log Z, its standard error, the effective sample size and the warnings."""
    task = next(task for task in all_tasks() if task.name == name)
    rng = np.random.default_rng(seed)
    X = task.sample(n_train, rng)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        density = EBMFlowDensity(random_state=seed).fit(X)
    # The grid reaches over all test rows and beyond.
    error = -log_integral(density, task.sample(N_TEST, rng))
    said = [f"{warning.category.__name__}: {warning.message}" for warning in caught]
    return error, density.log_normalizer_std_error_, density.effective_sample_size_, said


def main() -> None:
    """Print each fit and the sums."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--n-train", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    options = parser.parse_args()
    scores, n_warned = [], 0
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as executor:
        jobs = [(name, seed) for name in TASKS for seed in options.seeds]
        results = executor.map(judge, *zip(*jobs, strict=True), [options.n_train] * len(jobs))
        for (name, seed), (error, std_error, fraction, said) in zip(jobs, results, strict=True):
            scores.append(abs(error) / math.hypot(std_error, GRID_ERROR))
            n_warned += bool(said)
            print(
                f"{name:18s} seed {seed}: error {error:+.4f} nats, standard error {std_error:.4f}, ESS {fraction:.2f}",
                *said,
                flush=True,
            )
    n = len(scores)
    for limit in (1, 2, 3):
        print(f"within {limit} standard errors: {sum(score <= limit for score in scores)} of {n}")
    print(f"root mean square of error / standard error: {math.sqrt(sum(score**2 for score in scores) / n):.2f}")
    print(f"fits that warned: {n_warned} of {n}")


if __name__ == "__main__":
    main()
