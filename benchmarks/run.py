"""Fit every density to every task and table, and write what it costs and how good it is.

Run ``python benchmarks/run.py --data FOLDER --output results.jsonl --report benchmarks/RESULTS.md``; with
``--readme README.md`` it writes the table of the README too. Every job is a process of its own with one thread.
Finished jobs are read back from the output file, so an interrupted run goes on where it stopped. Without a folder of
tables, only those that scikit-learn bundles run.
"""

import argparse
import json
import multiprocessing
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from memory import with_peak_memory  # noqa: E402
from peers import PEERS  # noqa: E402
from report import write_readme, write_report  # noqa: E402
from tables import tables  # noqa: E402
from tasks import Task, all_tasks  # noqa: E402

from sk_ebm import EBMFlowDensity, TrainingWarning  # noqa: E402

OURS = "EBMFlowDensity"
N_TEST, N_PARTS, N_DRAWS, N_GRID, N_OUTER_GRID = 5000, 25, 10_000, 1000, 20


class Job(NamedTuple):
    """One density, fitted to `n_train` rows drawn with the seed."""

    name: str
    n_train: int
    seed: int
    model: str


def run_job(job: Job, folder: Path | None, parameters: dict) -> dict:
    """Fit, score and sample in a fresh process; times are those of its one thread on a processor, not of the clock."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # A fit cut short is no result.
    warnings.filterwarnings("error", message=".*was interrupted", category=TrainingWarning)
    task = next((task for task in all_tasks() if task.name == job.name), None)
    X_train, X_test = draw(job, task, folder)
    started = time.process_time()
    if job.model == OURS:
        density, peak = with_peak_memory(lambda: EBMFlowDensity(random_state=job.seed, **parameters).fit(X_train))
    else:
        density, peak = with_peak_memory(lambda: PEERS[job.model](X_train, job.seed))
    fitted = time.process_time()
    log_density = density.score_samples(X_test)
    scored = time.process_time()
    row = job._asdict() | {"n_features": X_train.shape[1], "fit_seconds": fitted - started}
    row["log_likelihood"] = float(log_density.mean())
    row["score_rows_per_second"] = len(X_test) / (scored - fitted)
    drawn = density.sample(N_DRAWS)
    row["sample_rows_per_second"] = N_DRAWS / (time.process_time() - scored)
    row["fit_peak_mib"] = peak
    if task is not None:
        log_density = log_density - task.log_prob(X_test)
        row["kl"] = -float(log_density.mean())
        if task.modes is not None:
            row["tv"], row["tv_train"] = total_variation(task, drawn), total_variation(task, X_train)
    if job.model == OURS:
        row |= {"ess": density.effective_sample_size_, "std_error": density.log_normalizer_std_error_}
        row |= {"shares": density.base_["shares"], "outcome": density.outcome_}
        if task is not None and X_train.shape[1] <= 2:
            row["log_normalizer_error"] = log_integral(density, X_test)
    # Means over parts of the test rows, the same for every model: enough for paired errors.
    row["parts"] = [round(float(part.mean()), 5) for part in np.array_split(log_density, N_PARTS)]
    return row


def draw(job: Job, task: Task | None, folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Return training and test rows; of a table, a fifth of the rows is for the test."""
    rng = np.random.default_rng(job.seed)
    if task is not None:
        return task.sample(job.n_train, rng), task.sample(N_TEST, rng)
    X = tables(folder)[job.name]()
    order = rng.permutation(len(X))
    n_test = min(len(X) // 5, N_TEST)
    return X[order[n_test:][: job.n_train]], X[order[:n_test]]


def total_variation(task: Task, X: np.ndarray) -> float:
    """Total variation between the shares of the modes in X and their true weights."""
    shares = np.bincount(task.modes(X[np.isfinite(X).all(1)]), minlength=len(task.mode_weights))
    return 0.5 * float(np.abs(shares / shares.sum() - task.mode_weights).sum())


def log_integral(density: EBMFlowDensity, X: np.ndarray) -> float:
    """Return the log of the integral of a density of one or two features, which is zero if log Z is right.

    A fine grid covers the rows; what lies beyond is integrated on a coarse one that reaches a thousand times as far.
    """
    low, high = X.min(0) - X.std(0), X.max(0) + X.std(0)
    middle, half_width = (low + high) / 2, (high - low) / 2
    inner = _product([(np.arange(N_GRID) + 0.5) * 2 / N_GRID - 1] * X.shape[1])
    mass = np.exp(density.score_samples(middle + half_width * inner)).sum() * np.prod(half_width * 2 / N_GRID)
    # Midpoints of cells in u = arsinh(x), aligned with the border of the fine grid.
    step = np.arcsinh(1.0) / N_OUTER_GRID
    u = (np.arange(N_OUTER_GRID * np.arcsinh(1000.0) // np.arcsinh(1.0)) + 0.5) * step
    outer = _product([np.concatenate([-u[::-1], u])] * X.shape[1])
    outer = outer[(np.abs(np.sinh(outer)) > 1).any(1)]
    volume = np.prod(np.cosh(outer) * half_width * step, axis=1)
    mass += (np.exp(density.score_samples(middle + half_width * np.sinh(outer))) * volume).sum()
    return float(np.log(mass))


def _product(axes: list[np.ndarray]) -> np.ndarray:
    """Return the rows of the grid that axes span."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


def all_jobs(options: argparse.Namespace) -> list[Job]:
    """Return the jobs asked for; a table that has too few rows is fitted to all it has, once."""
    jobs = {}
    models = options.models or [OURS, *PEERS]
    available: dict[str, int | None] = {task.name: None for task in all_tasks()}
    for name, load in tables(options.data).items():
        n_rows = len(load())
        available[name] = n_rows - min(n_rows // 5, N_TEST)
    for size in options.sizes:
        for name, n_available in available.items():
            n_train = size if n_available is None else min(size, n_available)
            # Most of a table, or not at all: the same fit would else stand in several columns.
            if (options.tasks and name not in options.tasks) or n_train < 0.6 * size:
                continue
            for seed in options.seeds:
                for model in models:
                    jobs[Job(name, n_train, seed, model)] = None
    return list(jobs)


def main() -> None:
    """Run what is missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path("results.jsonl"))
    parser.add_argument("--report", type=Path, default=None)
    parser.add_argument("--readme", type=Path, default=None, help="a README whose table of accuracy to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 1000, 5000, 20_000])
    parser.add_argument("--tasks", nargs="+", default=None, help="names of tasks and tables; all by default")
    parser.add_argument("--models", nargs="+", default=None, choices=[OURS, *PEERS])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--parameters",
        type=json.loads,
        default={},
        help="JSON of parameters of EBMFlowDensity to try instead of the defaults, such as '{\"n_estimators\": 4}'; "
        "each choice needs an output of its own",
    )
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    done = {Job(*(row[field] for field in Job._fields)) for row in rows}
    missing = [job for job in all_jobs(options) if job not in done]
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, max_tasks_per_child=1) as executor:
        futures = {executor.submit(run_job, job, options.data, options.parameters): job for job in missing}
        for k, future in enumerate(as_completed(futures), 1):
            job = futures[future]
            try:
                row = future.result()
            except (BrokenProcessPool, TrainingWarning):
                # The machine or the user ended it: nothing to record.
                executor.shutdown(cancel_futures=True)
                raise
            except Exception as error:  # A density may fail on a table; that is a result too.
                row = job._asdict() | {"error": repr(error)[:300]}
            rows.append(row)
            with options.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            left = (time.perf_counter() - started) / k * (len(missing) - k)
            value = row.get("kl", row.get("log_likelihood", row.get("error")))
            print(
                f"[{k}/{len(missing)}] {job.name} n={job.n_train} seed {job.seed} {job.model}: {value}, "
                f"{row.get('fit_seconds', 0):.0f} s; about {left / 60:.0f} min left",
                flush=True,
            )
    if options.report:
        write_report(rows, options.report)
    if options.readme:
        write_readme(rows, options.readme)


if __name__ == "__main__":
    main()
