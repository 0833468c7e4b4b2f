"""Pictures: their structure, not their pixels."""

import sys

import matplotlib
import numpy as np
import pytest
from scipy.integrate import trapezoid
from sklearn.mixture import GaussianMixture
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

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
    np.testing.assert_array_equal(display.ax_.collections[1].get_offsets(), rows[:, :2])
    bar = display.figure_.axes[1]
    assert bar.get_yticklabels()[0].get_text() == "99%"


def test_the_first_feature_of_contours_is_to_the_right():
    X = np.random.default_rng(0).normal(np.repeat([[0, 3], [10, 0]], [90, 10], axis=0), 0.3)
    display = DensityDisplay.from_estimator(KernelDensity(bandwidth=0.3).fit(X), X)
    innermost = [path for path in display.ax_.collections[0].get_paths() if len(path.vertices)][-1]
    np.testing.assert_allclose(innermost.vertices.mean(0), [0, 3], atol=0.3)


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


def test_contours_in_part_in_view_are_of_shares_of_the_whole(rows):
    display = DensityDisplay.from_estimator(KernelDensity(bandwidth=5.0).fit(rows[:, :2]), rows[:, :2])
    share = int(display.ax_.get_title().split("%")[0])
    outermost = display.figure_.axes[1].get_yticklabels()[0].get_text()
    assert int(outermost.rstrip("%")) == pytest.approx(0.99 * share, abs=1)


def test_a_density_in_other_units_than_the_rows_is_noticed(rows):
    X = 1000 * rows[:, :2]
    density = make_pipeline(StandardScaler(), KernelDensity(bandwidth=0.3)).fit(X)
    title = DensityDisplay.from_estimator(density, X).ax_.get_title()
    assert "the density adds up to" in title
    assert "is X in its units" in title


@pytest.mark.parametrize("density", [GaussianMixture(2, random_state=0), KernelDensity()])
def test_more_features_are_a_corner_plot(rows, density):
    display = DensityDisplay.from_estimator(density.fit(rows), rows, n_samples=300, random_state=0)
    assert display.axes_.shape == (4, 4)
    assert display.axes_[0, 1] is None
    assert len(display.axes_[2, 1].collections) == 2
    assert display.draws.shape == (300, 4)
    assert display.axes_[3, 2].get_xlabel() == "feature 2"
    assert display.axes_[2, 0].get_ylabel() == "feature 2"


def test_draws_in_a_corner_plot_are_of_all_components():
    """A mixture draws one component after the other."""
    X = np.repeat([[0.0, 0, 0], [10, 10, 10]], 100, axis=0) + np.random.default_rng(0).normal(size=(200, 3))
    display = DensityDisplay.from_estimator(GaussianMixture(2, random_state=0).fit(X), X)
    drawn, data = (collection.get_offsets() for collection in display.axes_[2, 1].collections)
    assert np.mean(drawn[:, 0] > 5) == pytest.approx(0.5, abs=0.1)
    np.testing.assert_array_equal(data, X[:, [1, 2]])


def test_histograms_of_a_corner_plot_are_densities_of_all_draws(rows):
    draws = np.r_[rows, 1e3 + rows]
    display = DensityDisplay(rows, list("abcd"), draws=draws).plot()
    model, data = display.axes_[1, 1].patches[:30], display.axes_[1, 1].patches[30]
    assert sum(bar.get_height() * bar.get_width() for bar in model) == pytest.approx(0.5)
    heights = data.get_xy()[1:-1:2, 1]
    np.testing.assert_allclose([2 * bar.get_height() for bar in model], heights)


def test_stray_draws_do_not_shrink_a_corner_plot(rows):
    display = DensityDisplay(rows, list("abcd"), draws=np.r_[rows, [[1e6] * 4]]).plot()
    for low, high in (display.axes_[2, 1].get_xlim(), display.axes_[1, 1].get_xlim(), display.axes_[2, 1].get_ylim()):
        assert high - low < 30


def test_a_constant_feature_has_a_place_in_a_corner_plot(rows, recwarn):
    X = np.c_[rows[:, :2], np.ones(len(rows))]
    DensityDisplay(X, list("abc"), draws=X).plot()
    assert not recwarn.list


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


def test_columns_may_be_called_by_numbers(rows, recwarn):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows[:, :2])
    display = DensityDisplay.from_estimator(KernelDensity().fit(frame), frame)
    assert display.ax_.get_xlabel() == "0"
    assert not recwarn.list


def test_pictures_go_into_given_axes(rows):
    from matplotlib import pyplot

    figure, ax = pyplot.subplots()
    display = DensityDisplay.from_estimator(KernelDensity().fit(rows[:, :1]), rows[:, :1], ax=ax)
    assert display.ax_ is ax
    assert display.figure_ is figure
    with pytest.raises(ValueError, match="a figure of its own"):
        DensityDisplay.from_estimator(GaussianMixture().fit(rows), rows, ax=ax)


def test_a_picture_of_nothing_is_refused(rows):
    with pytest.raises(ValueError, match="nothing to draw"):
        DensityDisplay(rows, list("abcd")).plot()


def test_few_enough_rows_are_shown():
    X = np.random.default_rng(0).normal(size=(3999, 1))
    rug = DensityDisplay.from_estimator(GaussianMixture().fit(X), X).ax_.lines[1]
    assert 1000 < len(rug.get_xdata()) <= 2000


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
    *intervals, truth = display.ax_.collections
    ends = [segment[:, 1] for interval in intervals for segment in interval.get_segments()]
    # Shares and their intervals are between zero and one.
    np.testing.assert_allclose(ends, [[0.504, 0.896], [0.104, 0.496], [0.784, 1], [0, 0.216]])
    np.testing.assert_array_equal([segment[:, 1] for segment in truth.get_segments()], [[0.6, 0.6], [0.4, 0.4]])
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
