"""Means with intervals, windows, slopes and moving averages, against computations of their own."""

import numpy as np
import pytest

from eval.stats import estimates


def test_an_estimate_is_students_interval_over_units():
    value = estimates.band(np.array([1.0, 2.0, 3.0, np.nan]))
    half = 4.302653 / np.sqrt(3)  # t(0.975, 2) * 1 / sqrt(3)
    assert value == pytest.approx((2, 2 - half, 2 + half, 3), rel=1e-6)
    assert estimates.band(np.array([1.0])) == pytest.approx((1, np.nan, np.nan, 1), nan_ok=True)
    assert estimates.band(np.array([np.nan])) == pytest.approx((np.nan, np.nan, np.nan, 0), nan_ok=True)


def test_windows_average_what_is_there():
    got = estimates.windows(np.array([1.0, 3.0, np.nan, 5.0, np.nan]), 2)
    np.testing.assert_array_equal(got, [2.0, 5.0, np.nan])


@pytest.mark.parametrize(("frames", "count"), [(1, 0), (4, 0), (5, 1), (10, 1), (13, 1), (14, 1), (15, 2), (20, 2)])
def test_a_window_that_is_less_than_half_full_is_left_out(frames, count):
    got = estimates.windows(np.arange(2.0 * frames).reshape(2, frames), 10)
    assert got.shape == (2, count)
    np.testing.assert_array_equal(
        got[0], [np.arange(at, min(at + 10, frames)).mean() for at in range(0, 10 * count, 10)]
    )


def test_a_slope_is_per_frame_and_leaves_nan_out():
    values = 5 + 0.003 * np.arange(40.0)
    values[[0, 7, 39]] = np.nan
    assert estimates.slope(values) == pytest.approx(0.003)
    assert np.isnan(estimates.slope(np.array([np.nan, 1.0])))


def test_a_moving_average_is_centred():
    values = np.array([0.0, 0, 0, 4, 0, 0, np.nan, 2])
    np.testing.assert_allclose(estimates.smooth(values, 3), [0, 0, 4 / 3, 4 / 3, 4 / 3, 0, 1, 2])
    np.testing.assert_allclose(estimates.smooth(values, 1), values)


@pytest.mark.parametrize("frames", [1, 7, 8, 9, 40])
def test_a_moving_average_can_stay_within_periods(frames):
    values = np.random.default_rng(0).normal(size=(2, frames))
    parts = [estimates.smooth(values[:, at : at + 8], 5) for at in range(0, frames, 8)]
    np.testing.assert_allclose(estimates.smooth(values, 5, 8), np.concatenate(parts, 1), atol=1e-12)


def test_group_means_keep_the_order_of_groups():
    got = estimates.group_means(np.array([[1.0, np.nan], [5, 2], [3, 4]]), ["y", "x", "y"])
    np.testing.assert_array_equal(got, [[2, 4], [5, 2]])
