"""Intervals of accuracies, the sign test, the bootstrap and means of parts, against SciPy and simulations."""

import numpy as np
import pytest
from scipy import stats

from eval.stats import proportions
from eval.stats.estimates import Estimate


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (4, 10), (7, 12), (25, 50), (199, 200), (0, 1)])
def test_items_of_one_pair_have_wilsons_interval(right, n):
    value = proportions.accuracy(np.repeat([1.0, 0.0], [right, n - right]), n)
    expected = stats.binomtest(right, n).proportion_ci(0.95, "wilson")
    assert value == pytest.approx((right / n, expected.low, expected.high, n), abs=1e-12)
    assert 0 <= value.low <= value.mean <= value.high <= 1


def test_the_size_is_the_number_of_throws_that_vary_as_much():
    rng = np.random.default_rng(0)
    voices = rng.integers(0, 2, (400, 4)).astype(float)
    value = proportions.accuracy(voices.mean(1), voices.size)
    pooled = stats.binomtest(int(voices.sum()), voices.size).proportion_ci(0.95, "wilson")
    assert value.high - value.low == pytest.approx(pooled.high - pooled.low, rel=0.1)  # independent voices are pairs
    value = proportions.accuracy(np.repeat(voices[:, 0], 4).reshape(400, 4).mean(1), voices.size)
    alone = stats.binomtest(int(voices[:, 0].sum()), 400).proportion_ci(0.95, "wilson")
    assert (value.low, value.high) == pytest.approx(alone)  # voices that repeat each other are one


def test_little_spread_does_not_make_a_few_items_certain():
    equal = proportions.accuracy(np.full(5, 0.5), 5)
    assert equal == pytest.approx(proportions.accuracy(np.array([0, 1, 0, 1, 0.5]), 5), abs=0.06)
    almost = proportions.accuracy(np.array([0.5] * 9 + [1.0]), 10)
    wilson = proportions.accuracy(np.array([1.0] * 11 + [0.0] * 9), 20)  # the same mean
    assert almost.high - almost.low > wilson.high - wilson.low
    assert proportions.accuracy(np.array([]), 0).n == 0


@pytest.mark.parametrize(("items", "rate", "spread"), [(20, 0.5, 3), (50, 0.8, 1), (200, 0.6, 1), (200, 0.5, None)])
def test_intervals_cover_the_rate(items, rate, spread):
    """Items differ in how hard they are, so their voices agree more than chance would have it."""
    rng, covered = np.random.default_rng(items), 0
    for _ in range(1000):
        hard = np.full(items, rate) if spread is None else rng.beta(2 * spread * rate, 2 * spread * (1 - rate), items)
        value = proportions.accuracy(rng.binomial(4, hard) / 4, 4 * items)
        covered += value.low <= rate <= value.high
    assert 920 <= covered <= 980


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (5, 0), (3, 9), (10, 10), (420, 313)])
def test_the_sign_test_is_exact(better, worse):
    expected = stats.binomtest(better, better + worse, 0.5).pvalue if better + worse else 1
    assert proportions.sign_test(better, worse) == pytest.approx(expected)
    assert proportions.sign_test(worse, better) == proportions.sign_test(better, worse)


def test_the_bootstrap_resamples_items():
    d = np.random.default_rng(1).choice([-1, -0.25, 0, 0.5, 1], 300, p=[0.1, 0.2, 0.3, 0.2, 0.2])
    value = proportions.bootstrap(d, 0)
    rng = np.random.default_rng(7)
    means = d[rng.integers(0, 300, (10_000, 300))].mean(1)
    assert (value.low, value.high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.004)
    assert (value.mean, value.n) == (pytest.approx(d.mean()), 300)
    assert proportions.bootstrap(d, 0) == value
    fine = np.random.default_rng(1).normal(size=100)
    assert proportions.bootstrap(fine, 0) != proportions.bootstrap(fine, 1)


def test_the_bootstrap_in_blocks(monkeypatch):
    d = np.random.default_rng(1).normal(size=50)  # 50 distinct values
    whole = proportions.bootstrap(d, 0, 1000)
    monkeypatch.setattr(proportions, "BLOCK", 50 * 64)
    assert proportions.bootstrap(d, 0, 1000) == pytest.approx(whole)


def test_a_difference_in_favour_of_the_first():
    first, second = np.array([1.0] * 30 + [0.0] * 10), np.array([1.0] * 15 + [0.0] * 25)
    found = proportions.compare(first, second)
    assert (found.better, found.worse) == (15, 0)
    assert found.p == pytest.approx(2 * 0.5**15)
    assert found.difference.mean == 15 / 40
    assert 0 < found.difference.low < 15 / 40 < found.difference.high
    same = proportions.compare(first, first)
    assert (same.better, same.worse, same.p, same.difference.low) == (0, 0, 1, 0)
    assert np.isnan(proportions.compare(first[:0], first[:0]).p)


def test_errors_of_a_family_without_differences():
    rng = np.random.default_rng(3)
    ps = np.array([proportions.sign_test(int(b), 40 - int(b)) for b in rng.binomial(40, 0.5, 4000)])
    assert (ps < 0.05).mean() <= 0.055


def test_the_mean_of_parts():
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(1000):
        parts = [
            proportions.accuracy((rng.random(n) < rate).astype(float), n)
            for n, rate in ((40, 0.95), (200, 0.6), (20, 0.5))
        ]
        value = proportions.mean_of(parts)
        covered += value.low <= (0.95 + 0.6 + 0.5) / 3 <= value.high
    assert 920 <= covered <= 980
    assert value.n == 260
    one = Estimate(0.6, 0.5, 0.8, 7)
    assert proportions.mean_of([one]) == pytest.approx(one)
    assert proportions.mean_of([one, one]) == pytest.approx((0.6, 0.6 - 0.1 / 2**0.5, 0.6 + 0.2 / 2**0.5, 14))
    assert proportions.mean_of([one, proportions.NOTHING]).n == 0
    assert proportions.mean_of([]).n == 0
