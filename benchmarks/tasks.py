"""Tasks whose true density is known: draw rows, score rows, and say which mode a row belongs to."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.special import logsumexp

EIGHT_WEIGHTS = [0.30, 0.20, 0.15, 0.10, 0.08, 0.07, 0.05, 0.05]


class Task(NamedTuple):
    """A known density: `sample(n, rng)` draws rows, `log_prob(X)` is in nats, `modes(X)` labels rows."""

    name: str
    sample: Callable[[int, np.random.Generator], np.ndarray]
    log_prob: Callable[[np.ndarray], np.ndarray]
    modes: Callable[[np.ndarray], np.ndarray] | None = None
    mode_weights: np.ndarray | None = None


def gaussian_mixture(name: str, weights, means, scales) -> Task:
    """Mixture of spherical Gaussians with one standard deviation per component."""
    weights, means = np.asarray(weights, float), np.asarray(means, float)
    scales = np.broadcast_to(np.asarray(scales, float), weights.shape)
    d = means.shape[1]

    def sample(n, rng):
        k = rng.choice(len(weights), n, p=weights)
        return means[k] + scales[k, None] * rng.standard_normal((n, d))

    def joint(X):
        distance = ((X[:, None] - means) / scales[:, None]) ** 2
        return np.log(weights) - d * np.log(scales) - 0.5 * (distance.sum(-1) + d * math.log(2 * math.pi))

    return Task(name, sample, lambda X: logsumexp(joint(X), axis=1), lambda X: joint(X).argmax(1), weights)


def rings() -> Task:
    """Three concentric rings of unequal weight; the radius is Gaussian, the angle uniform."""
    weights, radii, width = np.array([0.5, 0.3, 0.2]), np.array([1.0, 2.5, 4.0]), 0.15

    def sample(n, rng):
        r = radii[rng.choice(3, n, p=weights)] + width * rng.standard_normal(n)
        angle = rng.uniform(0, 2 * np.pi, n)
        return np.c_[r * np.cos(angle), r * np.sin(angle)]

    def log_prob(X):
        r = np.hypot(X[:, 0], X[:, 1])
        joint = np.log(weights) + stats.norm.logpdf(r[:, None], radii, width)
        return logsumexp(joint, axis=1) - np.log(2 * np.pi * r)

    return Task("rings", sample, log_prob, lambda X: np.abs(np.hypot(*X.T)[:, None] - radii).argmin(1), weights)


def checkerboard() -> Task:
    """Uniform on the eight dark squares of a 4 x 4 board of side 8."""

    def sample(n, rng):
        column = rng.integers(0, 4, n)
        row = 2 * rng.integers(0, 2, n) + column % 2
        return np.c_[column, row] * 2.0 - 4 + rng.uniform(0, 2, (n, 2))

    def log_prob(X):
        cell = np.floor((X + 4) / 2)
        inside = ((cell >= 0) & (cell < 4)).all(1) & ((cell.sum(1) % 2) == 0)
        return np.where(inside, -math.log(32), -np.inf)

    return Task("checkerboard", sample, log_prob)


def two_moons() -> Task:
    """Two interleaved half circles blurred by Gaussian noise; the density is the blur integrated along the arcs."""
    noise, angles = 0.1, (np.arange(800) + 0.5) / 800 * np.pi
    curves = np.r_[np.c_[np.cos(angles), np.sin(angles)], np.c_[1 - np.cos(angles), 0.5 - np.sin(angles)]]

    def sample(n, rng):
        upper = rng.random(n) < 0.5
        angle = rng.uniform(0, np.pi, n)
        first = np.c_[np.cos(angle), np.sin(angle)]
        second = np.c_[1 - np.cos(angle), 0.5 - np.sin(angle)]
        return np.where(upper[:, None], first, second) + noise * rng.standard_normal((n, 2))

    return Task("two_moons", sample, arcs("", curves, noise).log_prob)


def eight_gaussians() -> Task:
    """Eight Gaussians on a circle with weights from .30 down to .05."""
    angles = np.arange(8) * np.pi / 4
    return gaussian_mixture("eight_gaussians", EIGHT_WEIGHTS, 4 * np.c_[np.cos(angles), np.sin(angles)], 0.5)


def two_modes(n_features: int, share: float = 0.7) -> Task:
    """Two Gaussians of unequal weights, six standard deviations apart."""
    offset = 3 / math.sqrt(n_features) * np.ones(n_features)
    name = f"two_modes_{n_features}d" + ("" if share == 0.7 else f"_{share:g}")
    return gaussian_mixture(name, [share, 1 - share], [offset, -offset], 1.0)


def eight_modes(n_features: int) -> Task:
    """Eight Gaussians of weights from .30 down to .05 in many dimensions, about six standard deviations apart."""
    rng = np.random.default_rng(8)
    directions = np.linalg.qr(rng.standard_normal((n_features, 8)))[0].T
    return gaussian_mixture(f"eight_modes_{n_features}d", EIGHT_WEIGHTS, 6 / math.sqrt(2) * directions, 1.0)


def student_t(n_features: int = 5, df: float = 3.0) -> Task:
    """Multivariate Student t with equal correlations of one half."""
    law = stats.multivariate_t(np.zeros(n_features), 0.5 + 0.5 * np.eye(n_features), df=df)
    return Task("student_t_5d", lambda n, rng: law.rvs(n, random_state=rng), law.logpdf)


def copula(n_features: int = 8) -> Task:
    """Gaussian copula, correlation .6 ** |i - j|, with lognormal and gamma margins in turn."""
    index = np.arange(n_features)
    correlation = 0.6 ** np.abs(index[:, None] - index)
    law = stats.multivariate_normal(np.zeros(n_features), correlation)
    margins = [stats.lognorm(0.8) if j % 2 == 0 else stats.gamma(1.5) for j in index]

    def sample(n, rng):
        scores = law.rvs(n, random_state=rng)
        return np.column_stack([m.isf(stats.norm.sf(scores[:, j])) for j, m in enumerate(margins)])

    def log_prob(X):
        scores = np.column_stack([stats.norm.isf(m.sf(X[:, j])) for j, m in enumerate(margins)])
        log_margins = sum(m.logpdf(X[:, j]) for j, m in enumerate(margins))
        return law.logpdf(scores) - stats.norm.logpdf(scores).sum(1) + log_margins

    return Task("copula_8d", sample, log_prob)


def claw() -> Task:
    """The claw of Marron and Wand (1992): five narrow peaks on a standard normal."""
    means = np.r_[0, np.arange(5) / 2 - 1][:, None]
    return gaussian_mixture("claw_1d", [0.5] + [0.1] * 5, means, [1.0] + [0.1] * 5)


def skewed_bimodal() -> Task:
    """The asymmetric bimodal density of Marron and Wand (1992), their number 8."""
    return gaussian_mixture("skewed_bimodal_1d", [0.75, 0.25], [[0.0], [1.5]], [1.0, 1 / 3])


def forty_gaussians() -> Task:
    """Forty Gaussians at random places of a large square, as in flow annealed importance sampling (Midgley 2023)."""
    means = np.random.default_rng(40).uniform(-40, 40, (40, 2))
    return gaussian_mixture("forty_gaussians", np.full(40, 1 / 40), means, 1.3)


def arcs(name: str, curves: np.ndarray, noise: float) -> Task:
    """Points spread evenly over the points of curves (k, 2), blurred by Gaussian noise."""

    def sample(n, rng):
        return curves[rng.integers(len(curves), size=n)] + noise * rng.standard_normal((n, 2))

    def log_prob(X):
        out = np.empty(len(X))
        for start in range(0, len(X), 2000):
            rows = slice(start, start + 2000)
            distance = ((X[rows, None] - curves) ** 2).sum(-1)
            out[rows] = logsumexp(-0.5 * distance / noise**2, axis=1)
        return out - math.log(len(curves)) - math.log(2 * math.pi * noise**2)

    return Task(name, sample, log_prob)


def spirals() -> Task:
    """Two arms of a spiral, one and a half turns each."""
    angles = 3 * np.pi * np.sqrt((np.arange(1500) + 0.5) / 1500)
    arm = (angles / np.pi)[:, None] * np.c_[np.cos(angles), np.sin(angles)]
    return arcs("spirals", np.r_[arm, -arm], 0.1)


def pinwheel() -> Task:
    """Five Gaussian blades, each row turned by an angle that grows with its radius, which keeps areas."""
    blades, scales, twist = 5, np.array([0.4, 0.1]), 1.0

    def turned(X, angle):
        cos, sin = np.cos(angle), np.sin(angle)
        return np.c_[cos * X[:, 0] - sin * X[:, 1], sin * X[:, 0] + cos * X[:, 1]]

    def sample(n, rng):
        X = [1.5, 0] + scales * rng.standard_normal((n, 2))
        X = turned(X, rng.integers(blades, size=n) * 2 * np.pi / blades)
        return turned(X, twist * np.hypot(*X.T))

    def log_prob(X):
        X = turned(X, -twist * np.hypot(*X.T))
        joint = [stats.norm.logpdf(turned(X, -k * 2 * np.pi / blades), [1.5, 0], scales).sum(1) for k in range(blades)]
        return logsumexp(joint, axis=0) - math.log(blades)

    return Task("pinwheel", sample, log_prob)


def banana() -> Task:
    """A Gaussian bent along a parabola."""

    def sample(n, rng):
        first = rng.standard_normal(n)
        return np.c_[first, first**2 + 0.3 * rng.standard_normal(n)]

    def log_prob(X):
        return stats.norm.logpdf(X[:, 0]) + stats.norm.logpdf(X[:, 1], X[:, 0] ** 2, 0.3)

    return Task("banana", sample, log_prob)


def funnel(n_features: int = 10) -> Task:
    """The funnel of Neal (2003), with a mouth of standard deviation 1.5."""

    def sample(n, rng):
        v = 1.5 * rng.standard_normal(n)
        return np.c_[v, np.exp(v / 2)[:, None] * rng.standard_normal((n, n_features - 1))]

    def log_prob(X):
        v = X[:, 0]
        return stats.norm.logpdf(v, 0, 1.5) + stats.norm.logpdf(X[:, 1:], 0, np.exp(v / 2)[:, None]).sum(1)

    return Task(f"funnel_{n_features}d", sample, log_prob)


def ill_conditioned(n_features: int = 20) -> Task:
    """A Gaussian whose covariance, in a random frame, has eigenvalues from one to a million."""
    frame = np.linalg.qr(np.random.default_rng(20).standard_normal((n_features, n_features)))[0]
    law = stats.multivariate_normal(np.zeros(n_features), (frame * np.geomspace(1, 1e6, n_features)) @ frame.T)
    return Task("ill_conditioned_20d", lambda n, rng: law.rvs(n, random_state=rng), law.logpdf)


def badly_scaled() -> Task:
    """Three Gaussians in five dimensions, in units from 1e-6 to 1e6."""
    units = np.geomspace(1e-6, 1e6, 5)
    inner = gaussian_mixture("", [0.5, 0.3, 0.2], np.random.default_rng(5).normal(0, 3, (3, 5)), 1.0)
    return Task(
        "badly_scaled_5d",
        lambda n, rng: units * inner.sample(n, rng),
        lambda X: inner.log_prob(X / units) - np.log(units).sum(),
        lambda X: inner.modes(X / units),
        inner.mode_weights,
    )


def four_moons() -> Task:
    """Four independent pairs of moons side by side: eight dimensions, sixteen modes."""
    inner = two_moons()
    return Task(
        "four_moons_8d",
        lambda n, rng: np.hstack([inner.sample(n, rng) for _ in range(4)]),
        lambda X: sum(inner.log_prob(X[:, 2 * k : 2 * k + 2]) for k in range(4)),
    )


def core_tasks() -> list[Task]:
    """Return the eight tasks of the core table."""
    return [
        rings(),
        checkerboard(),
        two_moons(),
        eight_gaussians(),
        two_modes(10),
        student_t(),
        copula(),
        claw(),
    ]


def all_tasks() -> list[Task]:
    """Return every task with a known truth."""
    return [
        *core_tasks(),
        skewed_bimodal(),
        spirals(),
        pinwheel(),
        forty_gaussians(),
        banana(),
        funnel(),
        eight_modes(10),
        eight_modes(50),
        two_modes(100),
        ill_conditioned(),
        badly_scaled(),
        four_moons(),
    ]
