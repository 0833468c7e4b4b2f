"""Calibration of class densities: temperature, offsets, and rows about which the densities are wrong."""

import warnings

import numpy as np
import pytest

from sk_ebm._calibration import Calibration, fit_calibration, no_calibration


def normal_log_densities(n=4000, seed=0):
    """Rows of two unit normals, at -1 and 1, in noise of another feature, and their log densities."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, n)
    x = rng.normal(2.0 * label - 1)
    return -0.5 * np.square(x[:, None] - [-1, 1]), np.c_[rng.normal(size=n)], label


def test_right_densities_stay_as_they_are():
    log_density, X, label = normal_log_densities()
    found = fit_calibration(log_density, X, label, np.ones(len(label)))
    assert found.scale == pytest.approx(1, abs=0.1)
    assert found.offset[1] - found.offset[0] == pytest.approx(0, abs=0.15)
    assert found.contamination < 0.05
    assert np.abs(found.tilt.slope).max() < 0.1
    assert found.offset_covariance.shape == (2, 2)


def test_temperature_and_offsets_are_found():
    log_density, X, label = normal_log_densities()
    found = fit_calibration(4 * log_density + [3, 0], X, label, np.ones(len(label)))
    assert found.scale == pytest.approx(0.25, abs=0.03)
    assert found.offset[1] - found.offset[0] == pytest.approx(0.75, abs=0.15)


@pytest.mark.parametrize("height", [-1e3, -np.inf])
def test_rows_that_their_class_finds_impossible_do_not_cost_the_others_their_evidence(height):
    log_density, X, label = normal_log_densities()
    odd = np.arange(0, len(label), 50)
    log_density[odd, label[odd]] = height
    found = fit_calibration(log_density, X, label, np.ones(len(label)))
    assert 0.7 < found.scale < 2
    # Of the rows with the strongest evidence, about one in seven is odd.
    assert 0.02 < found.contamination < 0.25


def test_a_tilt_makes_up_for_what_the_densities_miss():
    """The densities know one feature of two."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 4000)
    X = rng.normal(2.0 * label - 1, size=(2, 4000)).T * [1, 100] + [0, 5000]
    log_density = -0.5 * np.square(X[:, :1] - [-1, 1])
    calibration = fit_calibration(log_density, X, label, np.ones(4000))
    calibrated = calibration(log_density, X)
    truth = log_density - 0.5 * np.square((X[:, 1:] - 5000) / 100 - [-1, 1])
    before, after = (np.mean(values.argmax(1) == label) for values in (log_density, calibrated))
    best = np.mean(truth.argmax(1) == label)
    assert after > best - 0.01 > before + 0.04
    # An outlier of one feature is not worth more than a bounded amount.
    far = calibration(np.zeros((1, 2)), np.array([[0.0, 1e9]]))[0]
    assert abs(far[1] - far[0]) < 12


def test_weights_count_rows():
    log_density, X, label = normal_log_densities(600)
    weight = np.random.default_rng(0).integers(0, 4, len(label)).astype(float)
    repeated = np.repeat(np.arange(len(label)), weight.astype(int))
    weighted = fit_calibration(log_density, X, label, weight)
    copied = fit_calibration(log_density[repeated], X[repeated], label[repeated], np.ones(len(repeated)))
    for name in ("scale", "offset", "contamination", "offset_covariance"):
        np.testing.assert_allclose(getattr(weighted, name), getattr(copied, name), rtol=1e-4, atol=1e-5)
    for one, other in zip(weighted.tilt, copied.tilt, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_contamination_bounds_what_one_row_can_say():
    calibration = Calibration(1.0, np.zeros(3), None, 0.1, np.zeros((3, 3)))
    calibrated = calibration(np.array([[0.0, -1e6, -np.inf], [-np.inf] * 3]), np.zeros((2, 1)))
    expected = np.log([0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3])
    np.testing.assert_allclose(calibrated[0], expected)
    assert np.isneginf(calibrated[1]).all()


def test_no_calibration_changes_nothing():
    log_density = np.array([[-1.0, -np.inf], [-np.inf, -np.inf]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(no_calibration(np.array([0.1, 0.2]))(log_density, np.zeros((2, 1))), log_density)
