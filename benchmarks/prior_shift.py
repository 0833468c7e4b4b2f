"""Print the error of class proportions under prior shift: DensityClassifier beside QuaPy's EMQ and KDEyML.

Run ``python benchmarks/prior_shift.py --data FOLDER --output prior_shift.jsonl``; without a folder of tables (`.npz`
with `X`, `y` and perhaps `keep`, column indices), only those of scikit-learn run. Finished fits are read back from the
output file.

Half of the rows train, 3000 at most; from the other half, samples of 100 and 500 rows are drawn with 100 prevalences
uniform on the simplex (artificial-prevalence protocol), the same for every method. Other labelled tables of the folder
run where they are named, without the classes that have fewer than 50 rows to train on. All methods see the same
features: those that are fit for a continuous density, standardised, or the first ten principal components of images and
of breast_cancer. EMQ and KDEyML have QuaPy's defaults on a logistic regression.
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
from typing import Any

import numpy as np
import quapy
import sklearn
import torch
from quapy.method.aggregative import EMQ, KDEyML
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sk_ebm import DensityClassifier, TrainingWarning

N_PREVALENCES, SAMPLE_SIZES, MAX_TRAIN, MIN_CLASS = 100, (100, 500), 3000, 50
OURS, WITH_PRIOR = "DensityClassifier", "DensityClassifier, prior_count=0.5"
METHODS: dict[str, Callable[[int], Any]] = {
    OURS: lambda seed: DensityClassifier(random_state=seed),
    "EMQ": lambda seed: EMQ(LogisticRegression(max_iter=2000)),
    "KDEyML": lambda seed: KDEyML(LogisticRegression(max_iter=2000), random_state=seed),
}
COLUMNS = [OURS, WITH_PRIOR, "EMQ", "KDEyML"]
TABLES = ["breast_cancer", "abalone", "ad_annthyroid", "ad_pageblocks", "banknote", "keel_phoneme", "digits"]
COMPONENTS = {"digits": [PCA(n_components=10)], "mnist10k": [PCA(n_components=10)]}
COMPONENTS["breast_cancer"] = [StandardScaler(), PCA(n_components=10)]


def tables(folder: Path | None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the name, features and labels of each table with two classes or more that have rows enough."""
    for name, X, y in all_tables(folder):
        counts = np.bincount(y)
        n_train = counts * min(0.5, MAX_TRAIN / len(y))
        has_rows_enough = n_train[y] >= MIN_CLASS
        X, y = X[has_rows_enough], y[has_rows_enough]
        if len(np.unique(y)) > 1:
            yield name, X, np.unique(y, return_inverse=True)[1]


def all_tables(folder: Path | None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the name, features and labels of each labelled table."""
    for load in (load_breast_cancer, load_digits):
        yield load.__name__.removeprefix("load_"), *load(return_X_y=True)
    for path in sorted(folder.glob("*.npz")) if folder else ():
        with np.load(path) as table:
            if "y" in table:
                X = table["X"][:, table["keep"]] if "keep" in table else table["X"]
                yield path.stem, X.astype(float), table["y"].astype(int)


def split(name: str, X: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return training and test features and labels."""
    parts = train_test_split(X, y, test_size=0.5, random_state=seed, stratify=y)
    X_train, X_test, y_train, y_test = parts
    X_train, y_train = X_train[:MAX_TRAIN], y_train[:MAX_TRAIN]
    feature_map = make_pipeline(*COMPONENTS.get(name, [StandardScaler()])).fit(X_train)
    return feature_map.transform(X_train), feature_map.transform(X_test), y_train, y_test


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
    head = ["mean absolute error", "classes", "rows", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name in dict.fromkeys(row["table"] for row in rows):
        of_table = [row for row in rows if row["table"] == name]
        for size in SAMPLE_SIZES:
            means = {m: np.mean([r[f"mae_{size}"] for r in of_table if r["method"] == m]) for m in COLUMNS}
            cells = [f"**{v:.4f}**" if v == min(means.values()) else f"{v:.4f}" for v in means.values()]
            lines.append(f"| {name} | {of_table[0]['n_classes']} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path("prior_shift.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tables", nargs="+", default=TABLES, help="names of tables")
    options = parser.parse_args()
    # A fit cut short is no result.
    warnings.filterwarnings("error", message=".*was interrupted", category=TrainingWarning)
    logging.disable(logging.WARNING)
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    done = {(row["table"], row["method"], row["seed"]) for row in rows}
    for name, X, y in tables(options.data):
        if name not in options.tables:
            continue
        for seed in options.seeds:
            X_train, X_test, y_train, y_test = split(name, X, y, seed)
            for method_name, make in METHODS.items():
                if (name, method_name, seed) in done:
                    continue
                started = time.perf_counter()
                method = make(seed).fit(X_train, y_train)
                row = {"table": name, "n_classes": int(y.max()) + 1, "method": method_name, "seed": seed}
                row["seconds"] = time.perf_counter() - started
                new = [row | mean_absolute_errors(method, X_test, y_test, seed)]
                if method_name == OURS:
                    method.set_params(prior_count=0.5)
                    new.append(row | {"method": WITH_PRIOR} | mean_absolute_errors(method, X_test, y_test, seed))
                rows += new
                with options.output.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in new)
                print(*new, sep="\n", file=sys.stderr, flush=True)
    print(
        f"quapy {quapy.__version__}, scikit-learn {sklearn.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads\n"
    )
    print(report(rows))


if __name__ == "__main__":
    main()
