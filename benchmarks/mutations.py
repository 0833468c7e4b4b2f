"""Break the package a line at a time, from kernels and log Z to pictures: does a test fail?

Run ``python benchmarks/mutations.py``. It works on a copy; about ten minutes on two cores. ``--check`` only looks
whether the lines are still there.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The tests that are run for a module, and its lines: what stands there, and what breaks it.
TESTS = {
    "_kernels": ["test_kernels.py"],
    "_log_normalizer": ["test_log_normalizer.py"],
    "_support": ["test_support.py"],
    "_training": ["test_training.py", "test_faults.py", "test_density.py"],
    "_flow_fitting": ["test_flow_fitting.py", "test_flow.py"],
    "_sampler": ["test_sampler.py"],
    "_display": ["test_display.py"],
    "_soap": ["test_soap.py"],
    "_independence": ["test_independence.py"],
    "_kernel_density": ["test_kernel_density.py"],
    "_mixture_search": ["test_mixture_search.py"],
    "_mixture": ["test_base.py"],
}
MUTATIONS = {
    "_kernels": [
        ("- _log_langevin_kernel(state, position, step)", "+ _log_langevin_kernel(state, position, step)"),
        ("state.position + step * state.grad +", "state.position - step * state.grad +"),
        ("(2 * step).sqrt() * noise", "step.sqrt() * noise"),
        ("torch.where(moved, proposal.grad, state.grad)", "proposal.grad"),
        ("torch.where(is_accepted, proposal.log_density, state.log_density)", "proposal.log_density"),
        (
            "_metropolis(log_weight - state.log_weight, generator)",
            "_metropolis(state.log_weight - log_weight, generator)",
        ),
        ("torch.where(proposal.log_weight.isfinite(), proposal.log_weight, -math.inf)", "proposal.log_weight"),
        ("log_weight.gather(-1, chosen).squeeze(-1)", "log_weight[..., 0]"),
        ("/ (4 * step)", "/ (2 * step)"),
    ],
    "_soap": [
        ("left.mT @ matrix @ right", "left.mT @ matrix"),
        ("left @ matrix @ right.mT", "left @ matrix"),
        ("[gradient @ gradient.mT, gradient.mT @ gradient]", "[gradient.mT @ gradient, gradient.mT @ gradient]"),
        ('state["exp_avg"].copy_(self._turn(mean))', "pass"),
        ("covariance.lerp_(square, 1 - self.decay)", "pass"),
        ("nan_to_num(0.0, 0.0, 0.0)", "clone()"),
        ("self.turned.zero_()", "pass"),
        ("self.parameter.mul_(1 - decay)", "self.parameter"),
        ('"factor": matrix_factor', '"factor": 1.0'),
        ("matrix.parameter.grad = None", "pass"),
        ("parameter.dim() > 1 and min(parameter.shape[-2:]) > 1", "parameter.dim() > 1"),
    ],
    "_mixture_search": [
        ("own_generator = torch.Generator().set_state(generator.get_state())", "own_generator = generator"),
        ("without.score + _MIN_GAIN_OF_CROWDED", "without.score + 100 * _MIN_GAIN_OF_CROWDED"),
        ("without.score + _MIN_GAIN_OF_CROWDED", "without.score - 100 * _MIN_GAIN_OF_CROWDED"),
        ("[*parts, narrow] if", "parts if"),
        ("len(self.rows) // _MIN_ROWS_OF_CROWDED", "len(self.rows) // 10"),
        ("self.is_held_out] - optimism", "self.is_held_out]"),
        ("_MAX_SEARCH_VALUES // data.rows.shape[1]", "_MAX_SEARCH_VALUES"),
        ("loss <= _PARSIMONY * std_error", "loss <= 0"),
        ("trial.beats(chosen, _CLEARLY)", "trial.beats(chosen, 1e9)"),
        ("tighter if tighter.beats(chosen, _PROBABLY) else chosen", "chosen"),
        ("chosen = max(chosen, self.trial(", "chosen = min(chosen, self.trial("),
        ("k * _MIN_ROWS_PER_COMPONENT <= len(sample.rows)", "k <= 2"),
    ],
    "_kernel_density": [
        ("(weight / weight.sum()).log()", "torch.zeros_like(weight)"),
        ("log_share + log_det", "log_share"),
        ("(center + noise) @ self.inverse", "center @ self.inverse"),
        ("z[w > 0], w[w > 0]", "z, w + 1"),
        ("frames = (standardised, torch.eye(len(standardised)).to(standardised))", "frames = (standardised,) * 2"),
        ("scores.argmax()", "scores.argmin()"),
        ("len(frame) * widths.log()", "widths.log()"),
        ("MAX_ROWS_OF_KERNELS = 640", "MAX_ROWS_OF_KERNELS = 10"),
    ],
    "_independence": [
        ("of_parts).sum(0) + self.log_det", "of_parts).sum(0)"),
        ("dim=1) @ self.inverse", "dim=1) @ self.matrix"),
        ("(weight * is_in_bin) @", "is_in_bin @"),
        ("(weight.sum() / weight.square().sum())", "1.0"),
        ("n_tests * p_value", "p_value"),
        ("n_tests * p_value < _SIGNIFICANCE", "n_tests * p_value < 1e-60"),
        ("rank = (weight_of_value.cumsum(0) - 0.5 * weight_of_value)", "rank = weight_of_value.cumsum(0)"),
        (
            "label, before = torch.where(is_linked, label, d).amin(1), label",
            "label = torch.where(is_linked, label, d).amin(1); break",
        ),
        ("n_bins = max(_MIN_BINS, n_bins)", "n_bins = 8"),
        (", _MAX_BINS_OF_ALL // d)", ")"),
        ("if len(groups) > _MAX_GROUPS else", "if False else"),
    ],
    "_mixture": [
        ("leaves_out and not bool(climbs.all())", "False"),
        ("climbing[climbs], moments[climbs]", "climbing[: climbs.sum()], moments[climbs]"),
        ("whole[climbing] = part", "whole[: len(part)] = part"),
        ("self.weight[climbs], self.total[climbs]", "self.weight[: climbs.sum()], self.total[climbs]"),
    ],
    "_log_normalizer": [
        ("(weight.shape[-1] * weight.square().sum(-1))", "weight.square().sum(-1)"),
        ("(fractions > 0) & (n > 1)", "(fractions > 0)"),
        ("controls.T.to(weights) - 1", "controls.T.to(weights)"),
        ("(variance / n).sqrt()", "variance.sqrt()"),
        ("controlled_errors < std_errors", "controlled_errors > std_errors"),
        ("std_errors / means, math.inf", "std_errors, math.inf"),
    ],
    "_support": [
        ("logabsdet - scale.log().sum()", "logabsdet + scale.log().sum()"),
        ("log_det = log_det + log_det_margins", "log_det = log_det - log_det_margins"),
        ("log_density + 0.5 * z.square()", "log_density - 0.5 * z.square()"),
        (
            "torch.where(is_below, middle, low), torch.where(is_below, high, middle)",
            "torch.where(is_below, low, middle), torch.where(is_below, middle, high)",
        ),
        ("share = 1 / (n_samples + 1)", "share = 0.0"),
        ("math.log(total) - 2 * log_likelihood", "math.log(total) + 2 * log_likelihood"),
        ("shrinkage = min(1.0, 0.1 * (d / n_samples) ** 2)", "shrinkage = 0.0"),
    ],
    "_training": [
        ("positive_phase - negative_phase\n", "positive_phase + negative_phase\n"),
        (
            "(energy_at_move[:, chains] - energy_of_chains.detach())",
            "(energy_of_chains.detach() - energy_at_move[:, chains])",
        ),
        ("weight = self.is_trained_on[:, rows]", "weight = torch.ones_like(self.is_trained_on[:, rows])"),
        ("self.learning_rate /= 2", "self.learning_rate *= 2"),
        ("self._stale += 1", "self._stale += 2"),
        ("(~norm.isfinite()).to(norm.dtype)", "(~norm.isfinite()).to(norm.dtype) * 0"),
        ("first_gain = min(", "first_gain = max("),
        (
            "self.average.energy(self.judged.rows) - log_normalizer",
            "self.average.energy(self.judged.rows) + log_normalizer",
        ),
    ],
    "_flow_fitting": [
        ("    _write_back(flows, best)\n", ""),
        ("loss = -data_share", "loss = data_share"),
        ("best[name].data[better]", "best[name].data[running]"),
    ],
    "_sampler": [
        ("((weight - log_cap).exp() + uniform)", "(1 + uniform)"),
        ("2 * log_weight.logsumexp(0) - log_mean_square", "log_weight.logsumexp(0) - log_mean_square"),
        ("yield defensive_proposal(gaussians, list(ensemble.bases), _LEAST_SHARE)", "pass"),
        ("log_density(self.position, log_base) - log_proposal", "log_density(self.position, log_base)"),
        ("torch.where(is_finite, pool.log_proposal, math.inf)", "pool.log_proposal"),
    ],
    "_display": [
        ("self.axes[1], self.density.T", "self.axes[1], self.density"),
        ("error = np.minimum(1.96 *", "error = np.minimum(0 *"),
        ("hlines(self.truth,", "hlines(0 * self.truth,"),
        ("[share * mass if share < _WHOLE else mass for mass in masses]", "masses"),
        ("ax.set_xlim(*_limits(self.X[:, j]))", "pass"),
        ("ax.set_ylim(*_limits(self.X[:, i]))", "pass"),
        ("ax.scatter(rows[:, j], rows[:, i]", "ax.scatter(rows[:, i], rows[:, j]"),
        ("bins=bins, weights=heights,", "bins=bins, density=True,"),
        ("_some(self.draws, max(len(rows), 300))", "self.draws[: max(len(rows), 300)]"),
    ],
}


def check_lines() -> None:
    """Raise if a line to break is not there, or not once."""
    for module, lines in MUTATIONS.items():
        path = ROOT / "sk_ebm" / f"{module}.py"
        source = path.read_text()
        for old, _ in lines:
            if source.count(old) != 1:
                raise ValueError(
                    f"{path.name} has {source.count(old)} times {old!r}, not once: bring the list up to date."
                )


def is_caught(copy: Path, module: str, old: str, new: str) -> bool:
    """Return whether the tests of a module fail once a line of it is broken."""
    path = copy / "sk_ebm" / f"{module}.py"
    source = path.read_text()
    path.write_text(source.replace(old, new))
    try:
        tests = [f"tests/{name}" for name in TESTS[module]]
        command = [sys.executable, "-m", "pytest", "-q", "-x", *tests]
        # No compiled files: two versions of a line may be of one size and one second.
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=1200)
        if b" failed" not in done.stdout and b" passed" not in done.stdout:
            raise RuntimeError(f"The tests did not run: {done.stdout[-500:]!r} {done.stderr[-500:]!r}")
        return b" failed" in done.stdout
    finally:
        path.write_text(source)


def main() -> None:
    """Print what becomes of each mutation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", nargs="+", choices=list(MUTATIONS), default=list(MUTATIONS))
    parser.add_argument("--check", action="store_true", help="only look whether the lines are there")
    options = parser.parse_args()
    check_lines()
    if options.check:
        return
    n_caught = n_tried = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("sk_ebm", "tests", "docs", "pyproject.toml"):
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / part)
        for module in options.modules:
            for old, new in MUTATIONS[module]:
                caught = is_caught(copy, module, old, new)
                n_caught, n_tried = n_caught + caught, n_tried + 1
                print(f"{'caught  ' if caught else 'SURVIVED'} {module}: {old.strip()} -> {new.strip()}", flush=True)
    print(f"{n_caught} of {n_tried} caught")


if __name__ == "__main__":
    main()
