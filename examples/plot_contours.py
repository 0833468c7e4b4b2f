"""
=================
Contours of a fit
=================

Fit 1000 points on three rings of unequal weight, and show the points, the fitted density and draws from it side by
side. A density with three rings is hard to build from Gaussian bumps: the energy network bends to the shape instead.

Run with an optional path for the picture: ``python examples/plot_contours.py rings.png``.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import PowerNorm

from sk_ebm import EBMFlowDensity

LIMIT = 5.0


def draw_rings(n_samples, random_state):
    """Points on three rings: uniform angles, Gaussian radii."""
    rng = np.random.default_rng(random_state)
    radius = rng.choice([1.0, 2.5, 4.0], size=n_samples, p=[0.5, 0.3, 0.2]) + 0.15 * rng.standard_normal(n_samples)
    angle = rng.uniform(0.0, 2 * np.pi, n_samples)
    return np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])


def density_on_grid(model, n_points):
    """Fitted density on a square grid, shape (n_points, n_points)."""
    ticks = np.linspace(-LIMIT, LIMIT, n_points)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    return np.exp(model.score_samples(grid)).reshape(n_points, n_points)


def show_points(ax, X, title):
    """Scatter points on a plain ground."""
    ax.scatter(X[:, 0], X[:, 1], s=5, color="#0072B2", alpha=0.6, linewidths=0)
    ax.set(title=title)


# %%
# Fit.

X = draw_rings(1000, random_state=0)
model = EBMFlowDensity(random_state=0).fit(X)

# %%
# The density over the square of the picture should integrate to nearly one.

n_points = 300
density = density_on_grid(model, n_points)
print(f"Integral of the density over the square: {density.sum() * (2 * LIMIT / (n_points - 1)) ** 2:.4f}")

# %%
# Points, density, draws. Square-root colours keep the thin outer ring visible beside the inner one.

fig, axes = plt.subplots(1, 3, figsize=(13, 4), sharex=True, sharey=True, layout="constrained")
show_points(axes[0], X, "1000 training points")
image = axes[1].imshow(density, norm=PowerNorm(0.5), origin="lower", extent=(-LIMIT, LIMIT, -LIMIT, LIMIT))
fig.colorbar(image, ax=axes[1], shrink=0.8)
axes[1].set(title="fitted density")
show_points(axes[2], model.sample(1000, random_state=0), "1000 model draws")
for ax in axes:
    ax.set(aspect="equal", xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT))

path = sys.argv[1] if len(sys.argv) > 1 else "rings.png"
fig.savefig(path, dpi=120)
print(f"Picture written to {path}")
