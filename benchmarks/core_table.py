"""Print the core table: KL(truth || model) in nats on eight tasks with known truth, default parameters.

Run ``python benchmarks/core_table.py --output core.jsonl``. Finished fits are read back from the output file, so an
interrupted run goes on where it stopped. Infinite values are impossible: every model here has full support; rows
where the truth is zero cannot be drawn from it.
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
from peers import tuned_gaussian_mixture, tuned_kernel_density
from tasks import Task, core_tasks

from sk_ebm import EBMFlowDensity, TrainingWarning

N_TRAIN, N_TEST, N_DRAWS = 1000, 10_000, 40_000
MODELS = ("KernelDensity", "GaussianMixture", "EBMFlowDensity")


def run_model(name: str, task: Task, seed: int, parameters: dict) -> dict:
    """Fit one model on one draw of the task, and measure it on test rows that nothing was tuned on."""
    rng = np.random.default_rng(seed)
    X_train, X_test = task.sample(N_TRAIN, rng), task.sample(N_TEST, rng)
    started = time.perf_counter()
    if name == "EBMFlowDensity":
        model = EBMFlowDensity(random_state=seed, **parameters).fit(X_train)
    elif name == "GaussianMixture":
        model = tuned_gaussian_mixture(X_train)
    else:
        model = tuned_kernel_density(X_train)
    row = {"task": task.name, "model": name, "seed": seed, "fit_seconds": time.perf_counter() - started}
    row["kl"] = float(np.mean(task.log_prob(X_test) - model.score_samples(X_test)))
    if name == "EBMFlowDensity":
        row |= {"ess": model.effective_sample_size_, "std_error": model.log_normalizer_std_error_}
        row |= {"shares": model.base_["shares"], "converged": model.converged_, "n_iter": model.n_iter_}
    if task.modes is not None and name == "EBMFlowDensity":
        row["tv_model"] = total_variation(task, model.sample(N_DRAWS, random_state=seed))
        row["tv_train"] = total_variation(task, X_train)
    return row


def total_variation(task: Task, X: np.ndarray) -> float:
    """Total variation between the shares of the modes in X and their true weights."""
    shares = np.bincount(task.modes(X), minlength=len(task.mode_weights)) / len(X)
    return 0.5 * float(np.abs(shares - task.mode_weights).sum())


def table(rows: list[dict]) -> str:
    """Format the mean over seeds as Markdown; the best model of a task is bold."""
    lines = [
        f"| KL in nats, n = {N_TRAIN} | " + " | ".join(MODELS) + " | seeds | sd | fit seconds, longest | ESS |",
        "| --- " * (len(MODELS) + 5) + "|",
    ]
    finished = dict.fromkeys(row["task"] for row in rows if row["model"] == "EBMFlowDensity")
    for task in finished:
        means = {m: np.mean([r["kl"] for r in rows if (r["task"], r["model"]) == (task, m)]) for m in MODELS}
        ours = [r for r in rows if (r["task"], r["model"]) == (task, "EBMFlowDensity")]
        cells = [f"**{v:.3f}**" if v == min(means.values()) else f"{v:.3f}" for v in means.values()]
        spread = f"{np.std([r['kl'] for r in ours]):.3f}"
        seconds = f"{max(r['fit_seconds'] for r in ours):.0f}"
        lines.append(
            f"| {task} | "
            + " | ".join([*cells, str(len(ours)), spread, seconds, f"{min(r['ess'] for r in ours):.2f}"])
            + " |"
        )
    lines.append("")
    for task in dict.fromkeys(row["task"] for row in rows if "tv_model" in row):
        ours = [r for r in rows if r["task"] == task and "tv_model" in r]
        model, train = (np.mean([r[key] for r in ours]) for key in ("tv_model", "tv_train"))
        lines.append(f"Mode weights, {task}: total variation {model:.4f} in draws, {train:.4f} in the training rows.")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("core.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=None, help="names of tasks; all by default")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument(
        "--parameters",
        type=json.loads,
        default={},
        help="JSON of parameters of EBMFlowDensity to try instead of the defaults, such as '{\"n_estimators\": 4}'; "
        "each choice needs an output file of its own",
    )
    options = parser.parse_args()
    # A fit cut short is no result.
    warnings.filterwarnings("error", message=".*was interrupted", category=TrainingWarning)
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    done = {(row["task"], row["model"], row["seed"]) for row in rows}
    for task in core_tasks():
        for seed in options.seeds:
            for name in options.models:
                if (task.name, name, seed) in done or (options.tasks and task.name not in options.tasks):
                    continue
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", module="sklearn")
                    rows.append(run_model(name, task, seed, options.parameters))
                with options.output.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(f"{task.name} {name} seed {seed}: KL {rows[-1]['kl']:.4f}", file=sys.stderr, flush=True)
    print(
        f"scikit-learn {sklearn.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads\n"
    )
    if {row["model"] for row in rows} == set(MODELS):
        print(table(rows))


if __name__ == "__main__":
    main()
