"""Fit random small tables with random parameters, again and again: no crash, no NaN, no hang, no growing memory.

Run ``python benchmarks/soak.py``: 300 fits and then 100 of one and the same, whose memory is watched.
"""

import argparse
import time
import warnings

import numpy as np
import torch

from sk_ebm import EBMFlowDensity, LowEffectiveSampleSizeWarning, TrainingWarning

CHOICES = {
    "base": ["auto", "gaussian", "student_t", "mixture", "heavy_tailed_mixture", "flow"],
    "feature_map": ["auto", "standard", "marginal"],
    "flow": ["spline", "affine"],
    "sampler": ["isir", "imh"],
    "n_estimators": [1, 2, 3, 6],
    "max_iter": [1, 3, 10],
    "n_chains": [1, 16, 128],
    "n_local_steps": [0, 1, 3],
    "batch_size": [1, 32, 256],
    "hidden_layer_sizes": [(4,), (32, 32), "auto"],
    "learning_rate": ["auto", 1e-4, 0.1],
    "alpha": [0.0, 0.1, 10.0],
    "early_stopping": [True, False],
    "tol": [0.0, 0.001, 0.1],
    "validation_fraction": [0.1, 0.25, 0.5],
}
N_WATCHED, N_WATCHES = 100, 3
# Seconds that no fit of this size may take, and MiB that memory may grow by over a hundred fits.
MAX_SECONDS, MAX_GROWTH = 60, 20


def random_table(rng: np.random.Generator) -> np.ndarray:
    """Draw 2 to 200 rows of 1 to 8 features: round, heavy-tailed, in clusters, or rounded so that rows repeat."""
    n, d = int(rng.integers(2, 200)), int(rng.integers(1, 9))
    kind = rng.integers(4)
    X = rng.standard_t(2, size=(n, d)) if kind == 1 else rng.normal(size=(n, d))
    if kind == 2:
        X += 6 * (rng.random((n, 1)) < 0.3)
    if kind == 3:
        X = X.round(1)
    return X * 10.0 ** rng.integers(-9, 10, size=d) + rng.normal()


def resident_mib() -> float:
    """Return the memory that this process holds now (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def fit_and_check(X: np.ndarray, parameters: dict) -> float:
    """Fit, score and sample; return the seconds it took."""
    started = time.perf_counter()
    density = EBMFlowDensity(**parameters).fit(X)
    assert np.isfinite(density.score_samples(X)).all(), parameters
    assert np.isfinite(density.sample(50, random_state=0)).all(), parameters
    assert np.isfinite(density.log_normalizer_), parameters
    return time.perf_counter() - started


def main() -> None:
    """Run the fits and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fits", type=int, default=300)
    parser.add_argument("--watched", type=int, default=N_WATCHED, help="fits of one table whose memory is watched")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(options.seed)
    seconds, refused = [], {}
    for category in (LowEffectiveSampleSizeWarning, TrainingWarning):
        warnings.simplefilter("ignore", category)
    for k in range(options.fits):
        X = random_table(rng)
        parameters = {name: values[rng.integers(len(values))] for name, values in CHOICES.items()}
        try:
            seconds.append(fit_and_check(X, parameters | {"random_state": k}))
        except ValueError as error:
            refused[str(error)[:60]] = refused.get(str(error)[:60], 0) + 1
        if (k + 1) % 10 == 0:
            print(f"[{k + 1}/{options.fits}] longest {max(seconds):.1f} s, {resident_mib():.0f} MiB", flush=True)
    print(f"{len(seconds)} fits, {sum(refused.values())} refused: {refused}; longest {max(seconds, default=0):.1f} s")
    assert max(seconds, default=0) < MAX_SECONDS
    if options.watched:
        # The allocator grows in steps, which a few fits may show as a slope; what leaks grows every time.
        assert any(growth_per_fit(options.watched) * 100 < MAX_GROWTH for _ in range(N_WATCHES))


def growth_per_fit(n_fits: int) -> float:
    """Fit one table again and again; return by how many MiB memory grows each time."""
    X, memory = np.random.default_rng(0).normal(size=(100, 3)), []
    for _ in range(n_fits):
        fit_and_check(X, {"max_iter": 3, "n_estimators": 2, "n_chains": 64, "random_state": 0})
        memory.append(resident_mib())
    # The first fits fill caches.
    settled = memory[len(memory) // 5 :]
    slope = float(np.polyfit(np.arange(len(settled)), settled, 1)[0]) if len(settled) > 1 else 0.0
    print(f"memory: {memory[0]:.0f} MiB after one fit, {memory[-1]:.0f} after {len(memory)}, {slope:+.3f} a fit")
    return slope


if __name__ == "__main__":
    main()
