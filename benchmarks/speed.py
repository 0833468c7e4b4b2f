"""Print what fitting, scoring and sampling cost beside tuned peers.

Run ``python benchmarks/speed.py`` on a machine that does nothing else; ``--parts scoring``, ``fitting``, ``profile``,
``search`` and ``large`` run some of it. Every density is fitted with its defaults, and the peers are tuned as in the
accuracy benchmark, except that KernelDensity keeps scikit-learn's default tree, as a user would. Times are those of the
processor over all threads, but for the search and the large table, where they are those of the clock. Only ratios mean
something on another machine.
"""

import argparse
import cProfile
import multiprocessing
import os
import platform
import pstats
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import sklearn
import torch
import zuko
from memory import with_peak_memory
from peers import tuned_kernel_density, zuko_spline
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.neighbors import KernelDensity
from tasks import copula, eight_modes, rings, student_t, two_moons

from sk_ebm import EBMFlowDensity

N_SCORED, N_SCORED_BY_KERNELS, N_DRAWS, N_COMPARED, N_REPEATS = 50_000, 500, 100_000, 20_000, 3


def seconds(run: Callable[[], object]) -> float:
    """Return the time of the fastest of a few runs."""
    times = []
    for _ in range(N_REPEATS):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
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
            started = time.process_time()
            density = EBMFlowDensity(random_state=0).fit(X)
            fit_seconds = time.process_time() - started
            rate = N_SCORED / seconds(lambda density=density, new=new: density.score_samples(new))
            print(
                f"| {d} | {n} | {kernel_rate:.0f} | {rate:.0f} | {rate / kernel_rate:.1f} | {fit_seconds:.0f} |",
                flush=True,
            )
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        peak = executor.submit(peak_of_scoring, density).result()
    print(f"\nPeak memory over that before, while ten million rows of {d} features are scored: {peak:.0f} MiB")


def peak_of_scoring(density: EBMFlowDensity) -> float:
    """Return the memory (MiB) that scoring takes at most, in a process that has needed none before."""
    new = np.zeros((10**7, density.n_features_in_), dtype=np.float32)
    density.score_samples(new[:1])
    return with_peak_memory(lambda: density.score_samples(new))[1]


def accuracy_of_telling_apart(drawn: np.ndarray, exact: np.ndarray) -> float:
    """Return how often boosted trees tell rows of two samples apart that they have not seen; 0.5 is chance."""
    X, y = np.concatenate([drawn, exact]), np.repeat([0, 1], [len(drawn), len(exact)])
    return float(cross_val_score(HistGradientBoostingClassifier(random_state=0), X, y, cv=StratifiedKFold(2)).mean())


def print_fitting(sizes: list[int]) -> None:
    """Compare fit times and rows drawn per second with those of a tuned zuko NSF."""
    print(
        "| task | training rows | zuko NSF, tuned, fit s | EBMFlowDensity, fit s | ratio | zuko NSF, draws/s "
        "| EBMFlowDensity, draws/s | ratio | KL, nats | told apart from the truth | zuko NSF told apart |"
    )
    print("| --- " * 11 + "|", flush=True)
    for task in (two_moons(), rings(), student_t(), copula(), eight_modes(10)):
        for n in sizes:
            X = task.sample(n, np.random.default_rng(0))
            fits = {"zuko": zuko_spline, "ebm": lambda X, seed: EBMFlowDensity(random_state=seed).fit(X)}
            cost = {}
            for name, fit in fits.items():
                started = time.process_time()
                density = fit(X, 0)
                fit_seconds = time.process_time() - started
                rate = N_DRAWS / seconds(lambda density=density: density.sample(N_DRAWS))
                exact = task.sample(N_COMPARED, np.random.default_rng(1))
                kl = (task.log_prob(exact) - density.score_samples(exact)).mean()
                cost[name] = fit_seconds, rate, kl, accuracy_of_telling_apart(density.sample(N_COMPARED), exact)
            (zuko_fit, zuko_rate, _, zuko_apart), (fit_seconds, rate, kl, apart) = cost["zuko"], cost["ebm"]
            print(
                f"| {task.name} | {n} | {zuko_fit:.0f} | {fit_seconds:.0f} | {fit_seconds / zuko_fit:.2f} "
                f"| {zuko_rate:.0f} | {rate:.0f} | {rate / zuko_rate:.2f} | {kl:.3f} | {apart:.3f} "
                f"| {zuko_apart:.3f} |",
                flush=True,
            )


STEPS = {
    "_feature_map_and_bases": "feature map and bases",
    "_fit_flows": "flow, before the energies",
    "energy_steps": "gradient steps of the energies",
    "move_chains": "moves of the chains",
    "propose": "proposals",
    "flow_steps": "gradient steps of the flow",
    "validate": "validation",
    "temper": "scaling of the energies",
    "held_out_log_prob": "held-out scores",
    "_assemble": "final log Z",
}


def print_profile() -> None:
    """Print which steps of a fit take how much of its time."""
    print("| task, n = 1000 | " + " | ".join(STEPS.values()) + " | seconds |")
    print("| --- " * (len(STEPS) + 2) + "|", flush=True)
    for task in (two_moons(), copula()):
        X = task.sample(1000, np.random.default_rng(0))
        profile = cProfile.Profile(time.process_time)
        profile.runcall(EBMFlowDensity(random_state=0).fit, X)
        stats = pstats.Stats(profile)
        spent = {name: 0.0 for name in STEPS}
        for (path, _, name), (*_, cumulative, _) in stats.stats.items():  # type: ignore[attr-defined]
            if name in spent and "sk_ebm" in path:
                spent[name] += cumulative
        shares = " | ".join(f"{seconds / stats.total_tt:.0%}" for seconds in spent.values())
        print(f"| {task.name} | {shares} | {stats.total_tt:.0f} |", flush=True)


def print_search() -> None:
    """Compare a grid search in two processes with one in this process."""
    X = two_moons().sample(1000, np.random.default_rng(0))
    search = GridSearchCV(EBMFlowDensity(base="gaussian", random_state=0), {"alpha": [0.03, 0.3]}, cv=3, refit=False)
    clock = {}
    for n_jobs in (1, 2):
        # Workers start, and import torch, only once.
        search.set_params(n_jobs=n_jobs, estimator__max_iter=5).fit(X)
        started = time.perf_counter()
        search.set_params(estimator__max_iter=60).fit(X)
        clock[n_jobs] = time.perf_counter() - started
    print(
        f"GridSearchCV, six fits: {clock[1]:.0f} s with n_jobs=1, {clock[2]:.0f} s with n_jobs=2, "
        f"ratio {clock[2] / clock[1]:.2f}"
    )


def print_large() -> None:
    """Fit a million rows from a file that is mapped into memory, after a tenth of them."""
    print("| rows | features | fit, s of the clock | peak memory over that before, MiB | held out, nats per row |")
    print("| --- " * 5 + "|", flush=True)
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(20, 20)))[0]

    tasks = copula(8), two_moons(), eight_modes(10)

    def draw(n: int) -> np.ndarray:
        return (np.concatenate([task.sample(n, rng) for task in tasks], axis=1) @ rotation).astype(np.float32)

    test = draw(20_000)
    # A rotation leaves the density as it is.
    of_tasks = np.split(test @ rotation.T, [8, 10], axis=1)
    truth = sum(task.log_prob(part).mean() for task, part in zip(tasks, of_tasks, strict=True))
    with tempfile.NamedTemporaryFile() as file:
        rows = np.memmap(file.name, dtype=np.float32, mode="w+", shape=(10**6, 20))
        for start in range(0, len(rows), 10**5):
            rows[start : start + 10**5] = draw(10**5)
        rows.flush()
        for n in (10**5, 10**6):
            X = np.memmap(file.name, dtype=np.float32, mode="r", shape=(n, 20))
            started = time.perf_counter()
            density, peak = with_peak_memory(lambda X=X: EBMFlowDensity(random_state=0).fit(X))
            seconds_of_clock = time.perf_counter() - started
            score = density.score_samples(test).mean()
            print(f"| {n} | 20 | {seconds_of_clock:.0f} | {peak:.0f} | {score:.3f} |", flush=True)
    print(f"The truth has {truth:.3f}.")


PARTS = ("scoring", "fitting", "profile", "search", "large")


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
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
        print()
    if "profile" in options.parts:
        print_profile()
        print()
    if "search" in options.parts:
        print_search()
        print()
    if "large" in options.parts:
        print_large()


if __name__ == "__main__":
    main()
