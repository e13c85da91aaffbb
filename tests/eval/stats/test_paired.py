"""Paired statistics against formulas, tables, simulations and SciPy's own; false positives as often as promised."""

import math

import numpy as np
import pytest
from scipy import stats

from eval.compare.experiment import pooled
from eval.stats import estimates, paired

D = np.array([0.031, -0.012, 0.044, 0.052, 0.007, 0.019, 0.038, -0.004, 0.027, 0.061])

pytestmark = pytest.mark.filterwarnings("error")


def compare(d, reference=3.0, margin=0.02):
    return paired.compare(np.asarray(d, float), reference, margin)


def test_all_numbers_by_formula():
    result, n = compare(D), len(D)
    mean, sd = D.sum() / n, math.sqrt(((D - D.mean()) ** 2).sum() / (n - 1))
    assert (result.n, result.reference, result.above) == (n, 3, 0.8)
    assert (result.mean, result.sd, result.relative) == pytest.approx((mean, sd, mean / 3))
    assert result.p == pytest.approx(2 * stats.t.sf(mean / (sd / math.sqrt(n)), n - 1))
    assert result.p == pytest.approx(stats.ttest_rel(D + 5, np.full(n, 5.0)).pvalue)
    assert (result.low, result.high) == pytest.approx(stats.t.interval(0.95, n - 1, mean, stats.sem(D)))
    # Hedges' J for nine degrees of freedom is 0.9139 (his table; 1 - 3 / (4 * 9 - 1) = 0.9143 is the approximation).
    assert result.dz / (mean / sd) == pytest.approx(0.9139, abs=5e-5)
    assert result.units_for_effect == paired.needed(paired.power_of, result.dz)
    assert result.units_for_equivalence == paired.needed(paired.power_of_equivalence, 0.02 / sd)


def test_the_share_of_a_gap_is_a_ratio_of_sums_with_its_interval():
    rng = np.random.default_rng(6)
    gap = rng.uniform(0.5, 2, (400, 40))
    closed = 0.6 * gap + rng.normal(0, 0.05, gap.shape)
    shares = [paired.share(*sample) for sample in zip(closed, gap, strict=True)]
    assert shares[0].mean == pytest.approx(closed[0].sum() / gap[0].sum())
    assert 0.93 <= np.mean([share.low < 0.6 < share.high for share in shares]) <= 0.97
    assert all(math.isnan(value) for value in paired.share(closed[0], 0 * gap[0])[:3])


def test_equivalence_is_two_one_sided_tests():
    half = stats.t.ppf(0.95, len(D) - 1) * stats.sem(D)
    for margin in (0.02, 0.05):
        result = paired.equivalence(D, margin)
        above = stats.ttest_1samp(D, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(D, margin, alternative="less").pvalue
        assert result == pytest.approx((max(above, below), D.mean() - half, D.mean() + half))
        assert (result.p < 0.05) == (-margin < result.low and result.high < margin)
        assert paired.equivalence(-D, margin).p == pytest.approx(result.p)


def test_holm_by_hand():
    np.testing.assert_allclose(paired.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(paired.holm([0.5, 0.9]), [1, 1])
    np.testing.assert_allclose(paired.holm([0.02, 0.021]), [0.04, 0.04])  # never below that of a smaller p
    np.testing.assert_allclose(paired.holm([0.02, math.nan, 0.5]), [0.04, math.nan, 0.5])


@pytest.mark.parametrize(("dz", "units"), [(0.2, 199), (0.3, 90), (0.4, 52), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_sample_sizes_are_those_of_the_tables(dz, units):
    assert paired.needed(paired.power_of, dz) == paired.needed(paired.power_of, -dz) == units
    assert paired.power_of(units, dz) >= 0.8 > paired.power_of(units - 1, dz)


def test_power_is_what_simulated_experiments_have():
    rng = np.random.default_rng(7)
    result = np.mean(paired.t_test(rng.normal(0.6, 1, (4000, 15))) < 0.05)
    assert result == pytest.approx(paired.power_of(15, 0.6), abs=0.025)
    units = paired.needed(paired.power_of_equivalence, 0.02 / 0.05)
    result = [paired.equivalence(d, 0.02).p < 0.05 for d in rng.normal(0, 0.05, (1000, units))]
    assert np.mean(result) == pytest.approx(0.8, abs=0.035)
    assert paired.power_of_equivalence(units, 0.4) >= 0.8 > paired.power_of_equivalence(units - 1, 0.4)
    assert paired.needed(paired.power_of, 0.5, 0.05 / 3) > 34  # a stricter test needs more


def test_unknown_numbers_are_nan():
    for d in ([], [0.1]):
        result = compare(d)
        unknown = (result.sd, result.low, result.dz, result.p, *result.equivalence, *result[-2:])
        assert result.n == len(d)
        assert all(math.isnan(value) for value in unknown)
    two = compare([0.1, 0.2])
    assert math.isnan(two.dz)
    assert two.p == pytest.approx(0.2048, abs=1e-4)
    for effect in (0.0, 1e-4):
        assert paired.needed(paired.power_of, effect) == math.inf


def test_equal_differences():
    none = compare(np.zeros(5))
    assert (none.mean, none.sd, none.low, none.high, none.dz) == (0, 0, 0, 0, 0)
    assert (none.p, none.equivalence.p, none.units_for_effect) == (1, 0, math.inf)
    same = compare(np.full(6, 0.1))
    assert (same.mean, same.low, same.high) == pytest.approx((0.1, 0.1, 0.1))
    assert (same.equivalence.p, same.dz, same.units_for_effect) == (1, math.inf, 2)


def test_slopes_are_weighted_least_squares():
    rng = np.random.default_rng(8)
    values, weight = rng.normal(0, 1, (3, 7)), rng.uniform(0.1, 2, (3, 7))
    values[0, 2] = math.nan
    weight[1, 5:] = 0
    values[2, 1:] = math.nan
    result = estimates.slope(values, weight)
    for i in (0, 1):
        used = np.isfinite(values[i]) & (weight[i] > 0)
        expected = np.polyfit(np.arange(7)[used], values[i][used], 1, w=np.sqrt(weight[i][used]))[0]
        assert result[i] == pytest.approx(expected)
    assert math.isnan(result[2])
    low, high = stats.t.interval(0.95, 9, D.mean(), stats.sem(D))
    expected = (D.mean(), low, high, 10, stats.ttest_1samp(D, 0).pvalue)
    assert paired.mean_test(np.append(D, math.nan)) == pytest.approx(expected)


# Without an effect p < 0.05 must come in 5 % of experiments: the whole command rests on that.

EXPERIMENTS, FILES, CHUNKS = 2000, 12, 8


def no_effect(seed, conditions):
    """Returns losses of conditions that do not differ, pooled after the first chunk: [conditions, experiments, files].

    Files are hard or easy and drift, which all conditions share; each condition has noise of its own by file and by
    chunk, larger in some files, and chunks follow from each other.
    """
    rng = np.random.default_rng(seed)
    shape = (EXPERIMENTS, FILES, CHUNKS)
    shared = rng.normal(3, 0.4, (*shape[:2], 1)) + 0.05 * rng.normal(0, 1, shape).cumsum(-1)
    noise = [
        rng.normal(0, 0.01, (*shape[:2], 1))
        + rng.normal(0, 0.02, shape).cumsum(-1) * rng.uniform(0.5, 1.5, (1, FILES, 1))
        for _ in range(conditions)
    ]
    weight = rng.uniform(500, 1000, (FILES, CHUNKS))
    weight[0, 5:] = 0
    losses = np.where(weight > 0, shared + np.stack(noise), np.nan)
    return pooled(losses, weight, np.arange(CHUNKS) > 0)


@pytest.mark.parametrize("seed", [11, pytest.param(12, marks=pytest.mark.slow)])
def test_false_positives(seed):
    first, other = no_effect(seed, 2)
    assert 0.035 <= np.mean(paired.t_test(other - first) < 0.05) <= 0.065


def test_false_positives_of_a_family():
    first, *others = no_effect(13, 4)
    p = np.stack([paired.t_test(other - first) for other in others], -1)
    assert np.mean((p < 0.05).any(-1)) > 0.08  # three chances, unadjusted
    assert 0.02 <= np.mean([(paired.holm(family) < 0.05).any() for family in p]) <= 0.065


def test_false_equivalence():
    """A difference as large as the margin is called equivalent in at most 5 %."""
    rng = np.random.default_rng(14)
    result = [paired.equivalence(d, 0.02).p < 0.05 for d in rng.normal(0.02, 0.02, (EXPERIMENTS, FILES))]
    assert 0.035 <= np.mean(result) <= 0.065
