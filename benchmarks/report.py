"""Turn the rows of `run.py` into RESULTS.md: medians over seeds, wins and losses, costs, and what misses its bar."""

import math
import platform
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

OURS, FLOWS = "EBMFlowDensity", ("normflows RQS", "zuko NSF")
PACKAGES = ("scikit-learn", "torch", "normflows", "zuko", "pyvinecopulib", "torchebm")
# A table of n rows in all is counted with the size it comes nearest to.
SIZES = (200, 1000, 5000, 20_000)
# What the README shows: the tasks of the core, some that are hard, and every table that was run.
README_SIZE = 1000
README_TASKS = """rings checkerboard two_moons eight_gaussians two_modes_10d student_t_5d copula_8d claw_1d funnel_10d
    eight_modes_50d ill_conditioned_20d four_moons_8d""".split()
README_MARKS = "<!-- accuracy table -->\n", "<!-- end of accuracy table -->\n"
_GRID_ERROR = 0.001
# Divergences (nats) below it are as good as none, and the mean over test rows may even be negative.
_LEAST_KL = 0.001
# Standard errors by which a divergence may seem negative by chance.
_MAX_STD_ERRORS = 4.0


class Cell:
    """All seeds of one task at one size."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows: dict[str, dict[int, dict]] = defaultdict(dict)
        # Medians over other seeds than ours would be no comparison.
        seeds = {row["seed"] for row in rows if row["model"] == OURS} or {row["seed"] for row in rows}
        for row in rows:
            if row["seed"] in seeds and _failure(row) is None:
                self.rows[row["model"]][row["seed"]] = row
        self.name, self.n_train = rows[0]["name"], rows[0]["n_train"]
        self.is_known = any("kl" in row for row in rows)

    def loss(self, model: str) -> float:
        """Return the median over seeds of KL, or of the negative log-likelihood (nats)."""
        of_model = self.rows.get(model, {}).values()
        losses = [max(row["kl"], _LEAST_KL) if self.is_known else -row["log_likelihood"] for row in of_model]
        return float(np.median(losses)) if losses and np.isfinite(losses).all() else math.inf

    def best_peer(self) -> str:
        """Return the peer of least loss."""
        return min((model for model in self.rows if model != OURS), key=self.loss)

    def lead(self, peer: str) -> tuple[float, float]:
        """Return how much more likely test rows are under our density than under a peer (nats), and its error.

        The lead is the median over seeds; the error is the larger of that over test rows, paired, and that over seeds.
        """
        if not self.rows[OURS]:
            return -math.inf, 0.0
        seeds = sorted(set(self.rows[OURS]) & set(self.rows[peer]))
        differences = [
            np.subtract(self.rows[OURS][seed]["parts"], self.rows[peer][seed]["parts"], dtype=float) for seed in seeds
        ]
        means = [float(difference.mean()) for difference in differences]
        within = math.sqrt(sum(d.var(ddof=1) / len(d) for d in differences)) / len(seeds)
        between = float(np.std(means, ddof=1)) / math.sqrt(len(seeds)) if len(seeds) > 1 else 0.0
        return float(np.median(means)), max(within, between)

    def median(self, model: str, key: str) -> float:
        """Return the median over seeds of a measurement."""
        found = [row[key] for row in self.rows.get(model, {}).values() if key in row]
        return float(np.median(found)) if found else math.nan


def _failure(row: dict) -> str | None:
    """Return why a row counts for nothing, or None.

    A divergence clearly below zero cannot be: log Z was estimated far too low, and the scores are those of no density.
    """
    if "error" in row:
        return row["error"]
    if "kl" in row and np.isfinite(row["parts"]).all():
        parts = np.asarray(row["parts"], dtype=float)
        if row["kl"] < -_MAX_STD_ERRORS * parts.std(ddof=1) / math.sqrt(len(parts)) - _LEAST_KL:
            return f"KL {row['kl']:.3f} < 0: its density integrates to more than one"
    return None


def cells_with_peers(rows: list[dict]) -> list[Cell]:
    """Return the cells that have more than our own rows."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["name"], row["n_train"]].append(row)
    cells = [Cell(group) for group in groups.values()]
    return [cell for cell in cells if any(model != OURS for model in cell.rows)]


def write_readme(rows: list[dict], path: Path) -> None:
    """Write the table of the README, between its marks."""
    cells = [cell for cell in cells_with_peers(rows) if _size(cell) == README_SIZE and cell.rows[OURS]]
    columns = {peer: [peer] for peer in ("KernelDensity", "GaussianMixture", "vine copula")}
    columns |= {"best spline flow": list(FLOWS), "Langevin EBM": ["Langevin EBM"], OURS: [OURS]}
    lines = ["| | " + " | ".join(columns) + " | our fit, s |", "| --- " * (len(columns) + 2) + "|"]

    def add(cell: Cell) -> None:
        losses = [min(cell.loss(model) for model in models) for models in columns.values()]
        texts = ["–" if math.isinf(loss) else f"{loss if cell.is_known else -loss:.3f}" for loss in losses]
        texts = [f"**{text}**" if loss == min(losses) else text for text, loss in zip(texts, losses, strict=True)]
        lines.append(f"| {cell.name} | " + " | ".join(texts) + f" | {cell.median(OURS, 'fit_seconds'):.0f} |")

    for cell in sorted((c for c in cells if c.name in README_TASKS), key=lambda c: README_TASKS.index(c.name)):
        add(cell)
    lines.append("| *held-out log-likelihood* |" + " |" * (len(columns) + 1))
    for cell in sorted((c for c in cells if not c.is_known), key=lambda c: c.name):
        add(cell)
    before, start, rest = path.read_text().partition(README_MARKS[0])
    _, end, after = rest.partition(README_MARKS[1])
    if not end:
        raise ValueError(f"{path} lacks the lines {README_MARKS}.")
    path.write_text(before + start + "\n".join(lines) + "\n" + end + after)


def _size(cell: Cell) -> int:
    """Return the size that a cell is counted with."""
    return min(SIZES, key=lambda size: abs(math.log(size / cell.n_train)))


def write_report(rows: list[dict], path: Path) -> None:
    """Write RESULTS.md."""
    cells = cells_with_peers(rows)
    models = [OURS, *dict.fromkeys(row["model"] for row in rows if row["model"] != OURS)]
    parts = [
        "# Results\n\nWritten by `python benchmarks/run.py` (its docstring has the whole command); do not edit.\n\n"
        + f"Medians over seeds; one thread of {platform.machine()}, Python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in PACKAGES)
        + ".\n\n**Bold**: best. Ours has a mark behind it: ✓ better than the best peer, ≈ within two paired standard "
        "errors of it, ✗ worse."
    ]
    for size in SIZES:
        of_size = [cell for cell in cells if _size(cell) == size]
        if of_size:
            parts.append(f"## n = {size}\n\n{_summary(of_size)}")
            for title, is_known in (("KL(truth || model) in nats", True), ("Held-out log-likelihood in nats", False)):
                chosen = [cell for cell in of_size if cell.is_known == is_known]
                if chosen:
                    parts.append(f"### {title}\n\n{_losses(chosen, models)}")
    parts += [f"## Cost\n\n{_costs(cells, models)}", f"## Is log Z right?\n\n{_log_normalizers(cells)}"]
    modes = _mode_weights(cells)
    if modes:
        parts.append(f"## Weights of modes in draws\n\n{modes}")
    failures = [(row, reason) for row in rows if (reason := _failure(row)) is not None]
    if failures:
        parts.append(
            "## Failures\n\n"
            + "\n".join(
                f"- {row['model']} on {row['name']}, n = {row['n_train']}, seed {row['seed']}: `{reason[:150]}`"
                for row, reason in failures
            )
        )
    path.write_text("\n\n".join(parts) + "\n")


def _mark(cell: Cell) -> str:
    lead, error = cell.lead(cell.best_peer())
    if abs(lead) <= 2 * error:
        return "≈"
    return "✓" if lead > 0 else "✗"


def _summary(cells: list[Cell]) -> str:
    marks = [_mark(cell) for cell in cells]
    leads = [cell.lead(cell.best_peer())[0] for cell in cells]
    ratios = [cell.loss(OURS) / cell.loss(cell.best_peer()) for cell in cells if cell.is_known]
    far = [
        cell.name
        for cell, lead in zip(cells, leads, strict=True)
        if (cell.loss(OURS) > 1.1 * cell.loss(cell.best_peer()) if cell.is_known else lead < -0.1)
    ]
    times = [
        cell.median(OURS, "fit_seconds") / min(cell.median(flow, "fit_seconds") for flow in FLOWS if flow in cell.rows)
        for cell in cells
        if any(flow in cell.rows for flow in FLOWS)
    ]
    as_good, better = np.mean([mark != "✗" for mark in marks]), np.mean([lead > 0 for lead in leads])
    n_seeds = sorted({len(cell.rows[OURS]) for cell in cells})
    fewer = [model for cell in cells for model in cell.rows if len(cell.rows[model]) < len(cell.rows[OURS])]
    lines = [
        f"- seeds per task: {' to '.join(str(n) for n in dict.fromkeys((n_seeds[0], n_seeds[-1])))}"
        + (f", fewer of {', '.join(dict.fromkeys(fewer))}" if fewer else ""),
        f"- at least as good as the best peer: {as_good:.0%} of {len(cells)} (bar: 90 %)",
        f"- better: {better:.0%} (bar: 60 %)",
        f"- far behind, KL over 1.1 x the best peer's or over 0.1 nat below it: {', '.join(far) or 'none'} (bar: none)",
    ]
    if ratios:
        lines.append(f"- median of KL / best peer's KL: {np.median(ratios):.3f} (bar: 0.7)")
    if times:
        lines.append(f"- fit time / that of the faster spline flow, median: {np.median(times):.2f} (bar: 2)")
    timed = [cell for cell in cells if "zuko NSF" in cell.rows]
    if timed:
        of_zuko = [cell.median(OURS, "fit_seconds") / cell.median("zuko NSF", "fit_seconds") for cell in timed]
        narrow = [ratio for ratio, cell in zip(of_zuko, timed, strict=True) if cell.median(OURS, "n_features") <= 10]
        lines.append(
            f"- fit time / zuko's: {min(of_zuko):.2f} to {max(of_zuko):.2f}, median {np.median(of_zuko):.2f}, with at "
            f"most ten features {np.median(narrow):.2f} (bar with 1000 and 5000 rows: 1); at most 1 on "
            f"{sum(ratio <= 1 for ratio in of_zuko)} of {len(timed)}"
        )
    return "\n".join(lines)


def _losses(cells: list[Cell], models: list[str]) -> str:
    lines = ["| | n | " + " | ".join(models) + " |", "| --- " * (len(models) + 2) + "|"]
    for cell in sorted(cells, key=lambda cell: cell.name):
        losses = {model: cell.loss(model) for model in models}
        texts = []
        for model, loss in losses.items():
            text = "–" if math.isinf(loss) else f"{loss if cell.is_known else -loss:.3f}"
            text = f"**{text}**" if loss == min(losses.values()) else text
            texts.append(f"{text} {_mark(cell)}" if model == OURS else text)
        lines.append(f"| {cell.name} | {cell.n_train} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _costs(cells: list[Cell], models: list[str]) -> str:
    columns = {
        "fit seconds": "fit_seconds",
        "rows scored per second": "score_rows_per_second",
        "rows drawn per second": "sample_rows_per_second",
        "peak memory of the fit, MiB": "fit_peak_mib",
    }
    measured = {key for cell in cells for of_model in cell.rows.values() for row in of_model.values() for key in row}
    columns = {title: key for title, key in columns.items() if key in measured}
    lines = ["| median over tasks | n | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    for model in models:
        for n_train in sorted({cell.n_train for cell in cells if cell.is_known}):
            of_size = [cell for cell in cells if cell.n_train == n_train and model in cell.rows]
            if of_size:
                values = [np.array([cell.median(model, key) for cell in of_size]) for key in columns.values()]
                texts = ["–" if np.isnan(v).all() else f"{np.nanmedian(v):,.3g}" for v in values]
                lines.append(f"| {model} | {n_train} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _log_normalizers(cells: list[Cell]) -> str:
    rows = [row for cell in cells for row in cell.rows[OURS].values() if "log_normalizer_error" in row]
    if not rows:
        return "No task of one or two dimensions was run."
    errors = np.array([row["log_normalizer_error"] for row in rows])
    std_errors = np.array([row["std_error"] for row in rows])
    ess = [cell.median(OURS, "ess") for cell in cells]
    return (
        f"Log of the integral of the fitted density by quadrature, {len(rows)} fits in one and two dimensions: root "
        f"mean square {np.sqrt(np.mean(errors**2)):.4f} nats, largest {np.abs(errors).max():.4f}; standard errors "
        f"claimed: median {np.median(std_errors):.4f}; within three of them and {_GRID_ERROR} for the grid: "
        f"{np.mean(np.abs(errors) <= 3 * std_errors + _GRID_ERROR):.0%}. Effective sample size over all tasks: median "
        f"{np.median(ess):.2f}, least {min(ess):.3f}."
    )


def _mode_weights(cells: list[Cell]) -> str:
    note = (
        "Total variation between the weights of the modes and their shares in 10 000 draws, which are noisy by "
        "themselves; of the peers, the one that comes nearest, which nobody could know beforehand.\n"
    )
    lines = [note, "| total variation | n | EBMFlowDensity | best peer | training rows |", "| --- " * 5 + "|"]
    for cell in sorted(cells, key=lambda cell: (cell.name, cell.n_train)):
        ours = cell.median(OURS, "tv")
        if math.isfinite(ours):
            peers = {model: cell.median(model, "tv") for model in cell.rows if model != OURS}
            best = min(peers, key=lambda model: peers[model])
            lines.append(
                f"| {cell.name} | {cell.n_train} | {ours:.4f} | {peers[best]:.4f} ({best}) "
                f"| {cell.median(OURS, 'tv_train'):.4f} |"
            )
    return "\n".join(lines) if len(lines) > 3 else ""
