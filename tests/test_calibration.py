"""Calibration of class densities: temperature, offsets, and rows about which the densities are wrong."""

import warnings

import numpy as np
import pytest

from sk_ebm._calibration import Calibration, fit_calibration, no_calibration


def normal_log_densities(n=4000, seed=0):
    """Rows of two unit normals, at -1 and 1, under both of them."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, n)
    x = rng.normal(2.0 * label - 1)
    return -0.5 * np.square(x[:, None] - [-1, 1]), label


def test_right_densities_stay_as_they_are():
    log_density, label = normal_log_densities()
    found = fit_calibration(log_density, label, np.ones(len(label)))
    assert found.scale == pytest.approx(1, abs=0.1)
    assert found.offset[1] - found.offset[0] == pytest.approx(0, abs=0.15)
    assert found.contamination < 0.05
    assert found.offset_covariance.shape == (2, 2)


def test_temperature_and_offsets_are_found():
    log_density, label = normal_log_densities()
    found = fit_calibration(4 * log_density + [3, 0], label, np.ones(len(label)))
    assert found.scale == pytest.approx(0.25, abs=0.03)
    assert found.offset[1] - found.offset[0] == pytest.approx(0.75, abs=0.15)


@pytest.mark.parametrize("height", [-1e3, -np.inf])
def test_rows_that_their_class_finds_impossible_do_not_cost_the_others_their_evidence(height):
    log_density, label = normal_log_densities()
    odd = np.arange(0, len(label), 50)
    log_density[odd, label[odd]] = height
    found = fit_calibration(log_density, label, np.ones(len(label)))
    assert 0.7 < found.scale < 2
    # Of the rows with the strongest evidence, about one in seven is odd.
    assert 0.02 < found.contamination < 0.25


def test_weights_count_rows():
    log_density, label = normal_log_densities(600)
    weight = np.random.default_rng(0).integers(0, 4, len(label)).astype(float)
    repeated = np.repeat(np.arange(len(label)), weight.astype(int))
    weighted = fit_calibration(log_density, label, weight)
    copied = fit_calibration(log_density[repeated], label[repeated], np.ones(len(repeated)))
    for one, other in zip(weighted, copied, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_contamination_bounds_what_one_row_can_say():
    calibration = Calibration(1.0, np.zeros(3), 0.1, np.zeros((3, 3)))
    calibrated = calibration(np.array([[0.0, -1e6, -np.inf], [-np.inf] * 3]))
    expected = np.log([0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3])
    np.testing.assert_allclose(calibrated[0], expected)
    assert np.isneginf(calibrated[1]).all()


def test_no_calibration_changes_nothing():
    log_density = np.array([[-1.0, -np.inf], [-np.inf, -np.inf]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(no_calibration(np.array([0.1, 0.2]))(log_density), log_density)
