"""Print what fitting, scoring and sampling cost beside tuned peers.

Run ``python benchmarks/speed.py``, on a machine that does nothing else; ``--parts scoring`` and ``--parts fitting`` run
one half. Every density is fitted with its defaults, and the peers are tuned as in the accuracy benchmark, except that
KernelDensity keeps scikit-learn's default tree, as a user would. Only ratios mean something on another machine.
"""

import argparse
import os
import platform
import time
import tracemalloc
import warnings
from collections.abc import Callable

import numpy as np
import sklearn
import torch
import zuko
from peers import tuned_kernel_density, zuko_spline
from sklearn.neighbors import KernelDensity
from tasks import copula, eight_modes, student_t, two_moons

from sk_ebm import EBMFlowDensity

N_SCORED, N_SCORED_BY_KERNELS, N_DRAWS, N_REPEATS = 50_000, 500, 100_000, 3


def seconds(run: Callable[[], object]) -> float:
    """Return the time of the fastest of a few runs."""
    times = []
    for _ in range(N_REPEATS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def print_scoring(sizes: list[int]) -> None:
    """Compare rows scored per second with those of KernelDensity."""
    print("| features | training rows | KernelDensity, rows/s | EBMFlowDensity, rows/s | ratio | fit seconds |")
    print("| --- " * 6 + "|", flush=True)
    for d in (5, 20):
        for n in sizes:
            rng = np.random.default_rng(0)
            X, new = copula(d).sample(n, rng), copula(d).sample(N_SCORED, rng)
            bandwidth = tuned_kernel_density(X[:5000]).density.bandwidth
            mean, scale = X.mean(0), X.std(0)
            kernels = KernelDensity(bandwidth=bandwidth).fit((X - mean) / scale)
            few = (new[:N_SCORED_BY_KERNELS] - mean) / scale
            kernel_rate = N_SCORED_BY_KERNELS / seconds(lambda kernels=kernels, few=few: kernels.score_samples(few))
            started = time.perf_counter()
            density = EBMFlowDensity(random_state=0).fit(X)
            fit_seconds = time.perf_counter() - started
            rate = N_SCORED / seconds(lambda density=density, new=new: density.score_samples(new))
            print(
                f"| {d} | {n} | {kernel_rate:.0f} | {rate:.0f} | {rate / kernel_rate:.1f} | {fit_seconds:.0f} |",
                flush=True,
            )
    new = np.zeros((10**6, d), dtype=np.float32)
    tracemalloc.start()
    density.score_samples(new)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    print(f"\nPeak extra memory of numpy while a million rows of {d} features are scored: {peak:.0f} MiB")


def print_fitting(sizes: list[int]) -> None:
    """Compare fit times and rows drawn per second with those of a tuned zuko NSF."""
    print(
        "| task | training rows | zuko NSF, tuned, fit s | EBMFlowDensity, fit s | ratio | zuko NSF, draws/s "
        "| EBMFlowDensity, draws/s | ratio |"
    )
    print("| --- " * 8 + "|", flush=True)
    for task in (two_moons(), student_t(), copula(), eight_modes(10)):
        for n in sizes:
            X = task.sample(n, np.random.default_rng(0))
            fits = {"zuko": zuko_spline, "ebm": lambda X, seed: EBMFlowDensity(random_state=seed).fit(X)}
            cost = {}
            for name, fit in fits.items():
                started = time.perf_counter()
                density = fit(X, 0)
                fit_seconds = time.perf_counter() - started
                cost[name] = fit_seconds, N_DRAWS / seconds(lambda density=density: density.sample(N_DRAWS))
            (zuko_fit, zuko_rate), (fit_seconds, rate) = cost["zuko"], cost["ebm"]
            print(
                f"| {task.name} | {n} | {zuko_fit:.0f} | {fit_seconds:.0f} | {fit_seconds / zuko_fit:.2f} "
                f"| {zuko_rate:.0f} | {rate:.0f} | {rate / zuko_rate:.2f} |",
                flush=True,
            )


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=["scoring", "fitting"], default=["scoring", "fitting"])
    parser.add_argument("--sizes", type=int, nargs="+", default=None, help="training rows; per part by default")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        f"scikit-learn {sklearn.__version__}, torch {torch.__version__}, zuko {zuko.__version__}, Python "
        f"{platform.python_version()}, {torch.get_num_threads()} threads of {os.cpu_count()} processors\n"
    )
    if "scoring" in options.parts:
        print_scoring(options.sizes or [1000, 5000, 20_000])
        print()
    if "fitting" in options.parts:
        print_fitting(options.sizes or [1000, 5000])


if __name__ == "__main__":
    main()
