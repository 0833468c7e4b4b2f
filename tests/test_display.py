"""Pictures: their structure, not their pixels."""

import sys

import matplotlib
import numpy as np
import pytest
from scipy.integrate import trapezoid
from sklearn.mixture import GaussianMixture
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KernelDensity

from sk_ebm import (
    ClassProportions,
    DensityClassifier,
    DensityDisplay,
    EBMFlowDensity,
    ProportionsDisplay,
    TrainingDisplay,
)


@pytest.fixture(autouse=True)
def no_windows():
    backend = matplotlib.get_backend()
    matplotlib.use("agg", force=True)
    yield
    from matplotlib import pyplot

    pyplot.close("all")
    matplotlib.use(backend, force=True)


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).normal(size=(120, 4)) * [1, 2, 0.5, 1] + [0, 5, 0, -3]


@pytest.fixture(scope="module")
def fitted(rows):
    return EBMFlowDensity(n_estimators=2, max_iter=10, random_state=0).fit(rows[:, :2])


def test_one_feature_is_a_curve_that_integrates_to_one(rows):
    display = DensityDisplay.from_estimator(KernelDensity(bandwidth=0.3).fit(rows[:, :1]), rows[:, :1])
    curve, rug = display.ax_.lines
    assert trapezoid(curve.get_ydata(), curve.get_xdata()) == pytest.approx(1, abs=0.05)
    assert len(rug.get_xdata()) == len(rows)
    assert display.ax_.get_xlabel() == "feature 0"


def test_two_features_are_contours_of_shares_of_the_density(rows, fitted):
    display = DensityDisplay.from_estimator(fitted, rows[:, :2])
    cell = np.prod([axis[1] - axis[0] for axis in display.axes])
    assert display.density.sum() * cell == pytest.approx(1, abs=0.08)
    assert display.density.shape == (200, 200)
    # The first axis of the grid is the first feature, which is drawn to the right.
    low, high = display.ax_.get_xlim()
    assert low < rows[:, 0].min() < rows[:, 0].max() < high
    bar = display.figure_.axes[1]
    assert bar.get_yticklabels()[0].get_text() == "99%"


def test_contours_enclose_what_they_say(rows, fitted):
    from sk_ebm._display import _levels_of_mass

    display = DensityDisplay.from_estimator(fitted, rows[:, :2])
    levels, masses = _levels_of_mass(display.density)
    for level, mass in zip(levels, masses, strict=True):
        inside = display.density[display.density >= level].sum() / display.density.sum()
        assert inside == pytest.approx(mass, abs=0.01)


@pytest.mark.parametrize("n_features", [1, 2])
def test_a_picture_says_how_much_of_the_density_it_shows(rows, n_features):
    X = rows[:, :n_features]
    wide, narrow = (
        DensityDisplay.from_estimator(KernelDensity(bandwidth=bandwidth).fit(X), X).ax_ for bandwidth in (5.0, 0.1)
    )
    assert "of the density is in view" in wide.get_title()
    assert 5 < int(wide.get_title().split("%")[0]) < 60
    assert narrow.get_title() == ""


@pytest.mark.parametrize("density", [GaussianMixture(2, random_state=0), KernelDensity()])
def test_more_features_are_a_corner_plot(rows, density):
    display = DensityDisplay.from_estimator(density.fit(rows), rows, n_samples=300, random_state=0)
    assert display.axes_.shape == (4, 4)
    assert display.axes_[0, 1] is None
    assert len(display.axes_[2, 1].collections) == 2
    assert display.draws.shape == (300, 4)
    assert display.axes_[3, 2].get_xlabel() == "feature 2"
    assert display.axes_[2, 0].get_ylabel() == "feature 2"


def test_features_of_a_corner_plot_can_be_chosen(rows):
    display = DensityDisplay.from_estimator(GaussianMixture().fit(rows), rows, features=[3, 1])
    assert display.feature_names == ["feature 3", "feature 1"]
    np.testing.assert_array_equal(display.X, rows[:, [3, 1]])


def test_one_feature_of_many_may_be_chosen(rows):
    display = DensityDisplay.from_estimator(GaussianMixture().fit(rows), rows, features=[2])
    assert display.axes_.shape == (1, 1)


def test_frames_keep_their_names(rows):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows[:, :1], columns=["height"])
    display = DensityDisplay.from_estimator(KernelDensity().fit(frame), frame)
    assert display.ax_.get_xlabel() == "height"


def test_pictures_go_into_given_axes(rows):
    from matplotlib import pyplot

    figure, ax = pyplot.subplots()
    display = DensityDisplay.from_estimator(KernelDensity().fit(rows[:, :1]), rows[:, :1], ax=ax)
    assert display.ax_ is ax
    assert display.figure_ is figure


def test_training_is_shown_in_four_panels_with_a_line_per_base(fitted):
    display = TrainingDisplay.from_estimator(fitted)
    bases = dict.fromkeys(check["base"] for check in fitted.history_)
    assert [len(ax.lines) for ax in display.axes_] == [2 * len(bases), len(bases), 2 * len(bases), len(bases)]
    shown = display.axes_[0].lines[0].get_ydata()
    first = [c["validation_log_likelihood"] for c in fitted.history_ if c["base"] == next(iter(bases))]
    np.testing.assert_array_equal(shown, first)


def estimate(*proportions, classes=("a", "b")):
    return ClassProportions(np.array(classes), np.array(proportions), np.full(len(proportions), 0.1))


def test_proportions_are_bars_with_intervals_and_marks_for_the_truth():
    found = {"ours": estimate(0.7, 0.3), "theirs": estimate(0.98, 0.02)}
    display = ProportionsDisplay.from_proportions(found, truth=[0.6, 0.4])
    bars = [bar for container in display.ax_.containers for bar in container if hasattr(bar, "get_height")]
    assert [bar.get_height() for bar in bars if hasattr(bar, "get_height")][:2] == [0.7, 0.3]
    assert [label.get_text() for label in display.ax_.get_xticklabels()] == ["a", "b"]
    legend = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert set(legend) == {"ours", "theirs", "truth"}
    assert display.ax_.get_ylim()[0] == 0


def test_any_number_of_estimates_is_shown():
    display = ProportionsDisplay.from_proportions({f"estimate {k}": estimate(0.5, 0.5) for k in range(9)})
    assert len(display.ax_.get_legend().get_texts()) == 9


def test_proportions_come_from_an_estimator(rows):
    y = (rows[:, 0] > 0).astype(int)
    model = DensityClassifier(GaussianMixture(), calibrate=False).fit(rows, y)
    display = ProportionsDisplay.from_estimator(model, rows)
    np.testing.assert_array_equal(display.proportions["estimate"].classes, [0, 1])


def test_proportions_over_other_classes_are_refused():
    with pytest.raises(ValueError, match="'theirs' is over"):
        ProportionsDisplay.from_proportions({"ours": estimate(1, 0), "theirs": estimate(1, 0, classes="bc")})
    with pytest.raises(ValueError, match="one share for each of 2 classes"):
        ProportionsDisplay.from_proportions({"ours": estimate(1, 0)}, truth=[1])


def test_a_classifier_has_no_density_to_show(rows):
    with pytest.raises(TypeError, match="has no `sample`"):
        DensityDisplay.from_estimator(GaussianNB().fit(rows, rows[:, 0] > 0), rows)


def test_without_matplotlib_the_error_says_what_to_install(rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        DensityDisplay.from_estimator(KernelDensity().fit(rows[:, :1]), rows[:, :1])
