"""
=================================
The density of handwritten digits
=================================

Fit the digits that ship with scikit-learn, reduced to their first ten principal components, and ask of the model what
one asks of a density estimator: how probable are images it has not seen, and what do its own draws look like?

The labels are kept aside while the densities are fitted. They only serve at the end, to train a classifier that counts
how many images of each digit the model draws.

Run with an optional path for the picture: ``python examples/plot_quickstart.py quickstart.png``.
"""

import sys
from time import perf_counter

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neighbors import KernelDensity
from sklearn.svm import SVC

from sk_ebm import EBMFlowDensity

BLUE, ORANGE = "#0072B2", "#D55E00"


def tuned_kernel_density(X):
    """Choose the bandwidth by cross-validated likelihood.

    A tree of one leaf sums the kernels exactly. With the default number of leaves the log densities come out too high
    where the bandwidth is small for the number of dimensions (scikit-learn issues 7492 and 25799).
    """
    grid = {"bandwidth": np.linspace(2.0, 5.0, 13)}
    return GridSearchCV(KernelDensity(leaf_size=len(X)), grid, cv=5).fit(X).best_estimator_


def tuned_gaussian_mixture(X):
    """Choose the number of components and the covariance type by cross-validated likelihood."""
    grid = {"n_components": [1, 5, 10, 15, 20, 30, 40], "covariance_type": ["full", "tied", "diag"]}
    return GridSearchCV(GaussianMixture(random_state=0), grid, cv=5).fit(X).best_estimator_


def class_shares(labels):
    """Share of each of the ten digits among the labels."""
    return np.bincount(labels, minlength=10) / len(labels)


def show_features(ax, X, color, title):
    """Scatter the first two principal components."""
    ax.scatter(X[:, 0], X[:, 1], s=8, color=color, alpha=0.6, linewidths=0)
    ax.set(title=title, xlabel="first component", ylabel="second component", aspect="equal")


def show_digits(ax, images, title):
    """Tile fifty images of 8 x 8 pixels in five rows of ten."""
    tiles = np.pad(images.reshape(5, 10, 8, 8), [(0, 0), (0, 0), (1, 1), (1, 1)])
    ax.imshow(tiles.transpose(0, 2, 1, 3).reshape(50, 100), cmap="gray_r", vmin=0, vmax=16)
    ax.set(title=title, xticks=[], yticks=[])


# %%
# Data: ten principal components of 8 x 8 images, a part held out.

pixels, labels = load_digits(return_X_y=True)
train_pixels, test_pixels, train_labels, _ = train_test_split(pixels, labels, test_size=0.3, random_state=0)
pca = PCA(n_components=10).fit(train_pixels)
X_train, X_test = pca.transform(train_pixels), pca.transform(test_pixels)

# %%
# Three densities of the same features, so that their log-likelihoods can be compared.

fits = {
    "EBMFlowDensity": EBMFlowDensity(random_state=0).fit,
    "KernelDensity, tuned": tuned_kernel_density,
    "GaussianMixture, tuned": tuned_gaussian_mixture,
}

print(f"{len(X_train)} training rows, {len(X_test)} held-out rows, {X_train.shape[1]} features")
print("\nHeld-out mean log-likelihood in nats per row (higher is better), and the time to fit")
densities = {}
for name, fit in fits.items():
    start = perf_counter()
    densities[name] = fit(X_train)
    seconds = perf_counter() - start
    print(f"  {name:<24}{densities[name].score_samples(X_test).mean():8.2f}{seconds:8.1f} s")

model = densities["EBMFlowDensity"]
print(
    f"\nlog Z = {model.log_normalizer_:.4f} +- {model.log_normalizer_std_error_:.4f}, "
    f"effective sample size {model.effective_sample_size_:.2f} of the draws"
)

# %%
# Does the model draw each digit as often as the data hold it? One classifier labels both.

classifier = SVC().fit(X_train, train_labels)
samples = model.sample(5000, random_state=0)
data_shares = class_shares(classifier.predict(X_train))
model_shares = class_shares(classifier.predict(samples))

print("\nClass shares")
print("  digit           " + "".join(f"{digit:7d}" for digit in range(10)))
print("  training rows   " + "".join(f"{share:7.3f}" for share in data_shares))
print("  model samples   " + "".join(f"{share:7.3f}" for share in model_shares))
print(f"  total variation {np.abs(data_shares - model_shares).sum() / 2:7.3f}")

# %%
# Held-out images beside draws, both seen through the same ten components.

fig, axes = plt.subplots(2, 2, figsize=(10, 7.4), height_ratios=[1.9, 1], layout="constrained")
show_features(axes[0, 0], X_test, BLUE, "held-out digits")
show_features(axes[0, 1], samples[: len(X_test)], ORANGE, "model samples")
axes[0, 1].set(xlim=axes[0, 0].get_xlim(), ylim=axes[0, 0].get_ylim())
show_digits(axes[1, 0], pca.inverse_transform(X_test[:50]), "held-out digits, ten components")
show_digits(axes[1, 1], pca.inverse_transform(samples[:50]), "model samples, ten components")

path = sys.argv[1] if len(sys.argv) > 1 else "quickstart.png"
fig.savefig(path, dpi=120)
print(f"\nPicture written to {path}")
