"""Print how well densities keep the weights of modes: of known mixtures, and of the digits.

Run ``python benchmarks/mode_weights.py --output mode_weights.jsonl``. Finished fits are read back from the output file,
so an interrupted run goes on where it stopped.

On mixtures, the weights of the modes of a fitted density are found by importance sampling from the truth, whatever
the density's own sampler does. Total variation is from the weights of the modes in the same draws, unweighted: both
share the noise of the draws, which would else be as large as what is measured. No density can know the truth better
than its training rows do, so what a training loses is the distance from the weights in the training rows. The best that
can be had is what an oracle has: maximum likelihood among mixtures of as many spherical Gaussians as in the truth.
"""

import argparse
import json
import platform
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import sklearn
import torch
from langevin import LangevinEBM
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from tasks import Task, eight_gaussians, eight_modes, two_modes

from sk_ebm import EBMFlowDensity, TrainingWarning, class_proportions

N_TRAIN, N_DRAWS, N_REPETITIONS, N_TRUTH = 5000, 1_000_000, 100, 200_000


def tasks() -> list[Task]:
    """Return the mixtures."""
    pairs = [two_modes(d, share) for share in (0.7, 0.95) for d in (2, 10, 50)]
    return [*pairs, eight_gaussians(), eight_modes(10)]


def shift_of_mode_weights(task: Task, log_density, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Return how much the modes of a density outweigh those of the truth, and the ESS fraction behind it."""
    X = task.sample(N_DRAWS, rng)
    log_weight = log_density(X) - task.log_prob(X)
    weight = np.exp(log_weight - log_weight.max())
    modes, n_modes = task.modes(X), len(task.mode_weights)
    shares = np.bincount(modes, weights=weight, minlength=n_modes) / weight.sum()
    true_shares = np.bincount(modes, minlength=n_modes) / len(X)
    return shares - true_shares, weight.sum() ** 2 / np.square(weight).sum() / len(X)


def total_variation(shares: np.ndarray, weights: np.ndarray | float) -> float:
    """Half the summed absolute difference."""
    return 0.5 * float(np.abs(shares - weights).sum())


def run_mixture(task: Task, seed: int) -> dict:
    """Fit both models to one draw of the task."""
    rng = np.random.default_rng(seed)
    X = task.sample(N_TRAIN, rng)
    counts = np.bincount(task.modes(X), minlength=len(task.mode_weights))
    started = time.perf_counter()
    model = EBMFlowDensity(random_state=seed).fit(X)
    row = {"task": task.name, "seed": seed, "fit_seconds": time.perf_counter() - started}
    shift_of_rows = counts / N_TRAIN - task.mode_weights
    row["tv_train"] = total_variation(shift_of_rows, 0)
    oracle = GaussianMixture(len(counts), covariance_type="spherical", n_init=5, random_state=seed)
    for name, log_density in (
        ("ebm", model.score_samples),
        ("langevin", LangevinEBM(random_state=seed).fit(X).log_density),
        ("oracle", oracle.fit(X).score_samples),
    ):
        shift, row[f"ess_{name}"] = shift_of_mode_weights(task, log_density, rng)
        row[f"tv_{name}"], row[f"tv_{name}_to_rows"] = total_variation(shift, 0), total_variation(shift, shift_of_rows)
    # Do the intervals cover the model's own shares?
    truth = class_proportions(model, task.modes, n_samples=N_TRUTH, random_state=10_000)
    covered = []
    for repetition in range(N_REPETITIONS):
        found = class_proportions(model, task.modes, n_samples=2000, random_state=repetition)
        covered.append(np.abs(found.proportions - truth.proportions) <= 1.645 * found.std_errors)
    row["coverage"] = float(np.mean(covered))
    drawn = np.bincount(task.modes(model.sample(40_000, random_state=seed)), minlength=len(task.mode_weights)) / 40_000
    row["tv_draws_to_shares"] = total_variation(drawn, truth.proportions)
    return row


def run_digits(seed: int) -> dict:
    """Compare class shares of the density with those of its training rows, judged by a classifier of other rows."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=0.4, random_state=seed, stratify=labels)
    pca = PCA(n_components=10).fit(parts[0])
    X, other = pca.transform(parts[0]), pca.transform(parts[1])
    classifier = SVC().fit(other, parts[3])
    model = EBMFlowDensity(random_state=seed).fit(X)
    found = class_proportions(model, classifier, random_state=seed)
    data = np.bincount(classifier.predict(X), minlength=10) / len(X)
    return {
        "task": "digits",
        "seed": seed,
        "largest_difference": float(np.abs(found.proportions - data).max()),
        "largest_std_error": float(found.std_errors.max()),
        "tv": total_variation(found.proportions, data),
    }


def report(rows: list[dict]) -> str:
    """Format means over seeds as Markdown."""
    lines = [
        "| total variation from the true weights | training rows | oracle | EBMFlowDensity | Langevin EBM | ratio to "
        "training rows | ratio to Langevin | EBMFlowDensity from training rows | Langevin EBM from training rows | "
        "coverage of 90 % intervals | draws against shares | ESS | fit seconds |",
        "| --- " * 13 + "|",
    ]
    mixtures = [row for row in rows if row["task"] != "digits"]
    for name in dict.fromkeys(row["task"] for row in mixtures):
        of_task = [row for row in mixtures if row["task"] == name]
        mean = {key: float(np.mean([row[key] for row in of_task])) for key in of_task[0] if key not in ("task", "seed")}
        lines.append(
            f"| {name} | {mean['tv_train']:.4f} | {mean['tv_oracle']:.4f} | {mean['tv_ebm']:.4f} "
            f"| {mean['tv_langevin']:.4f} "
            f"| {mean['tv_ebm'] / mean['tv_train']:.2f} | {mean['tv_ebm'] / mean['tv_langevin']:.2f} "
            f"| {mean['tv_ebm_to_rows']:.4f} | {mean['tv_langevin_to_rows']:.4f} "
            f"| {mean['coverage']:.2f} | {mean['tv_draws_to_shares']:.4f} | {mean['ess_ebm']:.2f} "
            f"| {mean['fit_seconds']:.0f} |"
        )
    lines.append("")
    lines += [
        f"Digits, seed {row['seed']}: largest difference of a class share {100 * row['largest_difference']:.2f} points "
        f"(standard error at most {100 * row['largest_std_error']:.2f}), total variation {row['tv']:.4f}."
        for row in rows
        if row["task"] == "digits"
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("mode_weights.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=None, help="names of tasks; all by default")
    options = parser.parse_args()
    # A fit cut short is no result.
    warnings.filterwarnings("error", message=".*was interrupted", category=TrainingWarning)
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    done = {(row["task"], row["seed"]) for row in rows}
    jobs = {task.name: lambda seed, task=task: run_mixture(task, seed) for task in tasks()} | {"digits": run_digits}
    for name, job in jobs.items():
        for seed in options.seeds:
            if (name, seed) in done or (options.tasks and name not in options.tasks):
                continue
            rows.append(job(seed))
            with options.output.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], file=sys.stderr, flush=True)
    print(
        f"scikit-learn {sklearn.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, n = {N_TRAIN}\n"
    )
    print(report(rows))


if __name__ == "__main__":
    main()
