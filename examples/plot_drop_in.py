"""
=================================================
In place of KernelDensity and GaussianMixture
=================================================

Four examples of scikit-learn's documentation with the class changed and little else: the density of one feature,
new digits, a map, and the contours of a mixture. No bandwidth, kernel or number of components is chosen; scikit-learn's
own choices are kept for comparison.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from scipy.stats import norm
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity

from sk_ebm import EBMFlowDensity

BLACK, BLUE, ORANGE = "#222222", "#0072B2", "#D55E00"

# %%
# One feature
# -----------
# After "Simple 1D Kernel Density Estimation": 100 rows of two normal laws.

rng = np.random.RandomState(1)
X = np.concatenate((rng.normal(0, 1, 30), rng.normal(5, 1, 70)))[:, np.newaxis]
grid = np.linspace(-5, 10, 1000)[:, np.newaxis]
truth = 0.3 * norm(0, 1).pdf(grid[:, 0]) + 0.7 * norm(5, 1).pdf(grid[:, 0])

fig, ax = plt.subplots(layout="constrained")
ax.fill_between(grid[:, 0], truth, color=BLACK, alpha=0.2, linewidth=0, label="truth")
for name, density, color in (
    ("KernelDensity, bandwidth 0.5", KernelDensity(kernel="gaussian", bandwidth=0.5), ORANGE),
    ("EBMFlowDensity", EBMFlowDensity(random_state=0), BLUE),
):
    curve = np.exp(density.fit(X).score_samples(grid))
    ax.plot(grid[:, 0], curve, color=color, lw=2, label=name)
    print(f"{name}: mean absolute difference from the truth {np.abs(curve - truth).mean():.4f}")
ax.plot(X[:, 0], np.full(len(X), -0.005), "|", color=BLACK, label="rows")
ax.legend(loc="upper left", frameon=False)
ax.set(xlabel="x", ylabel="density")

# %%
# New digits
# ----------
# After "Kernel Density Estimation": digits reduced to fifteen components, and 44 draws beside 44 of the data.

pixels, _ = load_digits(return_X_y=True)
pca = PCA(n_components=15, whiten=False)
components = pca.fit_transform(pixels)
search = GridSearchCV(KernelDensity(leaf_size=len(pixels)), {"bandwidth": np.logspace(-1, 1, 20)})
kernel_density = search.fit(components).best_estimator_
# Three members instead of six: this page is built often.
density = EBMFlowDensity(n_estimators=3, random_state=0).fit(components)

fig, axes = plt.subplots(3, 1, figsize=(6.4, 8), layout="constrained")
images = {
    "digits of the data": components[:44],
    f"draws of KernelDensity, bandwidth {kernel_density.bandwidth:.1f}": kernel_density.sample(44, random_state=0),
    "draws of EBMFlowDensity": density.sample(44, random_state=0),
}
for ax, (title, rows) in zip(axes, images.items(), strict=True):
    tiles = np.pad(pca.inverse_transform(rows).reshape(4, 11, 8, 8), [(0, 0), (0, 0), (1, 1), (1, 1)])
    ax.imshow(tiles.transpose(0, 2, 1, 3).reshape(40, 110), cmap="gray_r", vmin=0, vmax=16)
    ax.set(title=title, xticks=[], yticks=[])

# %%
# A map
# -----
# After "Kernel Density Estimate of Species Distributions", without its download: sightings along two coasts and around
# a lake, all at sea or on the shore. KernelDensity measures distances on the sphere; the energies learn the shape of
# the coast from latitudes and longitudes alone, as if these were flat coordinates. The colours of each map are its own:
# one density is per radian, the other per degree.

rng = np.random.default_rng(0)
along = rng.uniform(-40, 10, 500)
coast = np.column_stack([along, -60 + 0.006 * (along + 15) ** 2 + rng.gamma(2, 1.0, 500)])
angle = rng.uniform(0, 2 * np.pi, 300)
lake = np.column_stack([-10 + 6 * np.sin(angle), -40 + 6 * np.cos(angle)]) + rng.normal(0, 0.5, (300, 2))
sightings = np.concatenate([coast, lake])  # latitude, longitude in degrees

latitude, longitude = np.meshgrid(np.linspace(-45, 15, 150), np.linspace(-65, -25, 150), indexing="ij")
places = np.column_stack([latitude.ravel(), longitude.ravel()])
on_sphere = KernelDensity(bandwidth=0.04, metric="haversine", algorithm="ball_tree").fit(np.radians(sightings))
maps = {
    "KernelDensity on the sphere": on_sphere.score_samples(np.radians(places)),
    "EBMFlowDensity": EBMFlowDensity(random_state=0).fit(sightings).score_samples(places),
}
fig, axes = plt.subplots(1, 2, figsize=(8, 5), sharey=True, layout="constrained")
for ax, (title, log_density) in zip(axes, maps.items(), strict=True):
    ax.contourf(longitude, latitude, np.exp(log_density).reshape(latitude.shape), levels=25, cmap="Reds")
    ax.plot(sightings[:, 1], sightings[:, 0], ".", ms=1.5, color=BLACK, alpha=0.5)
    ax.set(title=title, xlabel="longitude", aspect="equal")
axes[0].set_ylabel("latitude")

# %%
# Contours of a mixture
# ---------------------
# After "Density Estimation for a Gaussian mixture": a round and a stretched cluster, as contours of the negative
# log-likelihood.

rng = np.random.RandomState(0)
shifted = rng.randn(300, 2) + np.array([20, 20])
stretched = np.dot(rng.randn(300, 2), np.array([[0.0, -0.7], [3.5, 0.7]]))
X = np.vstack([shifted, stretched])
xx, yy = np.meshgrid(np.linspace(-20.0, 30.0, 200), np.linspace(-20.0, 40.0, 200))
grid = np.array([xx.ravel(), yy.ravel()]).T

fig, axes = plt.subplots(1, 2, figsize=(9, 4.5), sharey=True, layout="constrained")
for ax, density in zip(axes, (GaussianMixture(n_components=2), EBMFlowDensity(random_state=0)), strict=True):
    surprise = -density.fit(X).score_samples(grid).reshape(xx.shape)
    contours = ax.contour(xx, yy, surprise, norm=LogNorm(vmin=1.0, vmax=1000.0), levels=np.logspace(0, 3, 10))
    ax.scatter(X[:, 0], X[:, 1], 0.8, color=BLACK)
    ax.set_title(type(density).__name__)
fig.colorbar(contours, ax=axes, shrink=0.8, extend="both", label="negative log density (nats)")
plt.show()
