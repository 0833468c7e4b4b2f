"""Print the error of class proportions under prior shift: DensityClassifier beside QuaPy's EMQ and KDEyML.

Run ``python benchmarks/prior_shift.py --data FOLDER --output prior_shift.jsonl``; without a folder of tables (`X`, `y`,
`.npz`), only those of scikit-learn run. Finished fits are read back from the output file.

Half of the rows train; from the other half, samples of 100 and 500 rows are drawn with 100 prevalences uniform on the
simplex (artificial-prevalence protocol), the same for every method. All methods see the same features: standardised,
and for the digits and breast_cancer ten principal components. EMQ and KDEyML have QuaPy's defaults on a logistic
regression.
"""

import argparse
import json
import logging
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import quapy
import sklearn
import torch
from quapy.method.aggregative import EMQ, KDEyML
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from sk_ebm import DensityClassifier, TrainingWarning

N_PREVALENCES, SAMPLE_SIZES, MAX_TRAIN = 100, (100, 500), 3000
METHODS: dict[str, Callable[[int], object]] = {
    "DensityClassifier": lambda seed: DensityClassifier(random_state=seed),
    "EMQ": lambda seed: EMQ(LogisticRegression(max_iter=2000)),
    "KDEyML": lambda seed: KDEyML(LogisticRegression(max_iter=2000), random_state=seed),
}
TABLES = ("ad_annthyroid", "ad_pageblocks", "abalone", "banknote", "keel_phoneme")


def tables(folder: Path | None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the name, features and labels of each table."""
    yield "digits", *load_digits(return_X_y=True)
    yield "breast_cancer", *load_breast_cancer(return_X_y=True)
    for name in TABLES if folder else ():
        with np.load(folder / f"{name}.npz") as table:
            yield name, table["X"][:, table["keep"]].astype(float), table["y"]


def split(name: str, X: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return training and test features and labels."""
    parts = train_test_split(X, y, test_size=0.5, random_state=seed, stratify=y)
    X_train, X_test, y_train, y_test = parts
    X_train, y_train = X_train[:MAX_TRAIN], y_train[:MAX_TRAIN]
    maps = [PCA(n_components=10)] if name == "digits" else [StandardScaler()]
    if name == "breast_cancer":
        maps.append(PCA(n_components=10))
    for feature_map in maps:
        feature_map.fit(X_train)
        X_train, X_test = feature_map.transform(X_train), feature_map.transform(X_test)
    return X_train, X_test, y_train, y_test


def mean_absolute_errors(method, X: np.ndarray, y: np.ndarray, seed: int) -> dict[str, float]:
    """Return the mean absolute error for each sample size."""
    errors = {}
    for size in SAMPLE_SIZES:
        rng = np.random.default_rng(1000 * seed + size)
        found = []
        for prevalence in rng.dirichlet(np.ones(y.max() + 1), N_PREVALENCES):
            counts = rng.multinomial(size, prevalence)
            rows = np.concatenate([rng.choice(np.flatnonzero(y == c), n) for c, n in enumerate(counts)])
            found.append(np.abs(method.quantify(X[rows]) - counts / size).mean())
        errors[f"mae_{size}"] = float(np.mean(found))
    return errors


def report(rows: list[dict]) -> str:
    """Format means over seeds as Markdown; the best method is bold."""
    lines = ["| mean absolute error | rows | " + " | ".join(METHODS) + " |", "| --- " * (2 + len(METHODS)) + "|"]
    for name in dict.fromkeys(row["table"] for row in rows):
        for size in SAMPLE_SIZES:
            of_table = [row for row in rows if row["table"] == name]
            means = {m: np.mean([r[f"mae_{size}"] for r in of_table if r["method"] == m]) for m in METHODS}
            cells = [f"**{v:.4f}**" if v == min(means.values()) else f"{v:.4f}" for v in means.values()]
            lines.append(f"| {name} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path("prior_shift.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tables", nargs="+", default=None, help="names of tables; all by default")
    options = parser.parse_args()
    # A fit cut short is no result.
    warnings.filterwarnings("error", message=".*was interrupted", category=TrainingWarning)
    logging.disable(logging.WARNING)
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    done = {(row["table"], row["method"], row["seed"]) for row in rows}
    for name, X, y in tables(options.data):
        for seed in options.seeds:
            X_train, X_test, y_train, y_test = split(name, X, np.asarray(y, int), seed)
            for method_name, make in METHODS.items():
                if (name, method_name, seed) in done or (options.tables and name not in options.tables):
                    continue
                started = time.perf_counter()
                method = make(seed).fit(X_train, y_train)
                row = {"table": name, "method": method_name, "seed": seed, "seconds": time.perf_counter() - started}
                rows.append(row | mean_absolute_errors(method, X_test, y_test, seed))
                with options.output.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(rows[-1], file=sys.stderr, flush=True)
    print(
        f"quapy {quapy.__version__}, scikit-learn {sklearn.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads\n"
    )
    print(report(rows))


if __name__ == "__main__":
    main()
