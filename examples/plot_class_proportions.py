"""
=================================
Class proportions with error bars
=================================

How much of a fitted density belongs to each class, and what are the class proportions of rows without labels? Both
answers come with standard errors.

The digits that ship with scikit-learn are thinned out, so that the commonest digit makes up .30 of the rows and the
rarest .02. A density that gets the relative weight of its modes wrong fails here.

Run with an optional path for the picture: ``python examples/plot_class_proportions.py class_proportions.png``.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from sk_ebm import DensityClassifier, EBMFlowDensity, class_proportions

SHARES = np.array([0.30, 0.20, 0.15, 0.10, 0.08, 0.06, 0.04, 0.03, 0.02, 0.02])
GREY, BLUE, ORANGE = "#999999", "#0072B2", "#D55E00"


def thin_out(X, y, n_rows, random_state):
    """Draw rows without replacement so that digit k makes up SHARES[k] of them."""
    rng = np.random.default_rng(random_state)
    counts = np.round(n_rows * SHARES).astype(int)
    rows = [rng.choice(np.flatnonzero(y == digit), count, replace=False) for digit, count in enumerate(counts)]
    return X[np.concatenate(rows)], np.repeat(np.arange(10), counts)


def show_bars(ax, columns, title):
    """Draw one group of bars per digit; columns are (label, color, shares, standard errors or None)."""
    width = 0.8 / len(columns)
    for k, (label, color, shares, std_errors) in enumerate(columns):
        position = np.arange(10) + (k - (len(columns) - 1) / 2) * width
        error = None if std_errors is None else 2 * std_errors
        ax.bar(position, shares, width, yerr=error, label=label, color=color, error_kw={"lw": 1, "capsize": 2})
    ax.set(title=title, xlabel="digit", ylabel="share", xticks=range(10))
    ax.legend()


def table(rows):
    """Format named rows of shares."""
    return "\n".join(f"  {name:<34}" + "".join(f"{100 * share:6.1f}" for share in shares) for name, shares in rows)


# %%
# A classifier learns the digits from a part of the rows. The density never sees a label.

pixels, labels = load_digits(return_X_y=True)
X = PCA(n_components=10).fit_transform(pixels)
X_labelled, X_rest, y_labelled, y_rest = train_test_split(X, labels, test_size=0.7, random_state=0, stratify=labels)
classifier = SVC().fit(X_labelled, y_labelled)
X_thin, y_thin = thin_out(X_rest, y_rest, 400, random_state=0)

# %%
# The share of each digit in a fitted density: proposals are classified and counted by their importance weights.

density = EBMFlowDensity(random_state=0).fit(X_thin)
of_density = class_proportions(density, classifier, random_state=0)
of_data = np.bincount(classifier.predict(X_thin), minlength=10) / len(X_thin)

print("Shares of the digits 0 to 9 in percent, as the classifier sees them")
print(
    table(
        [
            ("training rows", of_data),
            ("fitted density", of_density.proportions),
            ("standard error", of_density.std_errors),
        ]
    )
)
print(f"  largest difference {100 * np.abs(of_density.proportions - of_data).max():.1f} points")

# %%
# The proportions of unlabelled rows: one density per digit, fitted to labelled rows in which all digits are equally
# common, and the shares that make the unlabelled rows most likely. Some fifty rows of a digit support energies on a
# small mixture and no more, and asking for that saves time. Counting predicted labels is biased
# towards the shares of the labelled rows, little where the classes are as far apart as here.

model = DensityClassifier(EBMFlowDensity(base="mixture", max_iter=20), random_state=0).fit(X_labelled, y_labelled)
found = model.estimate_proportions(X_thin)
counted = np.bincount(model.predict(X_thin), minlength=10) / len(X_thin)

print("\nProportions of the digits 0 to 9 in unlabelled rows, in percent")
print(
    table(
        [
            ("true", SHARES),
            ("estimate_proportions", found.proportions),
            ("standard error", found.std_errors),
            ("predicted labels, counted", counted),
        ]
    )
)
for name, shares in (("estimate_proportions", found.proportions), ("predicted labels, counted", counted)):
    print(f"  mean absolute error of {name}: {100 * np.abs(shares - SHARES).mean():.2f} points")

# %%
# Error bars are two standard errors.

fig, axes = plt.subplots(1, 2, figsize=(12, 4), sharey=True, layout="constrained")
show_bars(
    axes[0],
    [
        ("training rows", GREY, of_data, None),
        ("fitted density", BLUE, of_density.proportions, of_density.std_errors),
    ],
    "shares in one density of all digits",
)
show_bars(
    axes[1],
    [
        ("true", GREY, SHARES, None),
        ("estimate_proportions", BLUE, found.proportions, found.std_errors),
        ("predicted labels, counted", ORANGE, counted, None),
    ],
    "proportions of unlabelled rows",
)

path = sys.argv[1] if len(sys.argv) > 1 else "class_proportions.png"
fig.savefig(path, dpi=120)
print(f"\nPicture written to {path}")
