"""Statistics of paired differences: t test, effect size, equivalence, sample sizes.

Arrays hold one difference d for each unit (a file or a speaker) on the last axis, without NaN. d is the loss of another
condition minus the loss of the condition under test, so that d > 0 means that the condition under test is better.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from eval.stats.estimates import Estimate, band

ALPHA, POWER = 0.05, 0.8
"""Two-sided error rate of all tests, and the power that sample sizes are given for."""
MOST = 1 << 20
"""Largest sample size that is looked for, a million units."""


class MeanTest(NamedTuple):
    """Mean of `n` units with its 95 % interval (Student's t) and the p-value of the two-sided t test."""

    mean: float
    low: float
    high: float
    n: int
    p: float


class Equivalence(NamedTuple):
    """Two one-sided t tests (Schuirmann 1987) against a margin."""

    p: float
    """Larger of the two p-values; below 0.05 the mean difference lies within the margin."""
    low: float
    """Lower bound of the 90 % interval, which lies within the margin if and only if p < 0.05."""
    high: float


class Paired(NamedTuple):
    """All statistics of one set of differences; NaN where there are too few units."""

    n: int
    mean: float
    """Nats."""
    sd: float
    low: float
    """Lower bound of the 95 % interval (Student's t)."""
    high: float
    p: float
    """Of the two-sided paired t test."""
    above: float
    """Share of units whose difference is above 0."""
    reference: float
    """Mean loss of the other condition, nats."""
    relative: float
    """mean / reference."""
    dz: float
    """Cohen's d_z, mean / sd, with Hedges' correction."""
    equivalence: Equivalence
    units_for_effect: float
    """Units that find a difference of this d_z with a power of `POWER`; inf: more than `MOST`."""
    units_for_equivalence: float
    """Units that establish equivalence within the margin with this power if there is no difference."""


def compare(d: np.ndarray, reference: float, margin: float, alpha: float = ALPHA) -> Paired:
    """Returns all statistics of differences d [n], n >= 0.

    Args:
      reference: mean loss of the other condition, nats; margin: of equivalence, nats; alpha: of the sample sizes.
    """
    test, sd, effect = mean_test(d), spread(d), hedges(d)
    return Paired(
        test.n,
        test.mean,
        sd,
        test.low,
        test.high,
        test.p,
        float((d > 0).mean()) if len(d) else math.nan,
        reference,
        test.mean / reference if reference else math.nan,
        effect,
        equivalence(d, margin),
        needed(power_of, effect, alpha),
        needed(power_of_equivalence, margin / sd if sd else math.inf, alpha),
    )


def spread(d: np.ndarray) -> float:
    """Returns the standard deviation of d [n]; 0 if it is rounding of equal numbers, NaN of fewer than two."""
    if len(d) < 2:
        return math.nan
    sd = float(d.std(ddof=1))
    return 0.0 if sd <= 1e-12 * float(np.abs(d).max()) else sd


def t_test(d: np.ndarray) -> np.ndarray:
    """Returns p of the two-sided paired t test, d [..., n] -> [...]; 1 if all d are 0, NaN of fewer than two units."""
    if d.shape[-1] < 2:
        return np.full(d.shape[:-1], np.nan)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # warnings about equal differences
        return np.where((d == 0).all(-1), 1.0, stats.ttest_1samp(d, 0, axis=-1).pvalue)


def mean_test(values: np.ndarray) -> MeanTest:
    """Tests whether the mean of values [U] is 0; NaN entries are left out."""
    values = values[np.isfinite(values)]
    return MeanTest(*(number.item() for number in band(values)), float(t_test(values)))


def hedges(d: np.ndarray) -> float:
    """Returns Cohen's d_z with Hedges' exact correction for n - 1 degrees of freedom; NaN of fewer than three units.

    Without the correction d_z of ten units is too large by 9 %. Source: Hedges 1981, doi 10.3102/10769986006002107,
    equation 6e.
    """
    sd, df = spread(d), len(d) - 1
    if df < 1:
        return math.nan
    mean = float(d.mean())
    if sd == 0:
        return math.copysign(math.inf, mean) if mean else 0.0
    if df < 2:
        return math.nan
    return mean / sd * math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2)


def share(closed: np.ndarray, gap: np.ndarray) -> Estimate:
    """Returns the closed share of a gap, sum of `closed` [n] / sum of `gap` [n]; NaN without a gap.

    The 95 % interval is Student's t of the linearised ratio.
    """
    if not gap.sum():
        return Estimate(math.nan, math.nan, math.nan, 0)
    ratio = closed.sum() / gap.sum()
    return Estimate(*(number.item() for number in band(ratio + (closed - ratio * gap) / gap.mean())))


def equivalence(d: np.ndarray, margin: float) -> Equivalence:
    """Tests whether the mean of d [n] lies between -margin and +margin; NaN of fewer than two units."""
    sd, df = spread(d), len(d) - 1
    if df < 1:
        return Equivalence(math.nan, math.nan, math.nan)
    mean, error = float(d.mean()), sd / math.sqrt(len(d))
    if sd == 0:
        return Equivalence(0.0 if abs(mean) < margin else 1.0, mean, mean)
    p = max(stats.t.sf((mean + margin) / error, df), stats.t.cdf((mean - margin) / error, df))
    half = stats.t.ppf(1 - ALPHA, df) * error
    return Equivalence(float(p), float(mean - half), float(mean + half))


def power_of(n: int, dz: float, alpha: float = ALPHA) -> float:
    """Returns the power of n units to find an effect dz by a two-sided paired t test at alpha (noncentral t)."""
    edge = stats.t.ppf(1 - alpha / 2, n - 1)
    shift = _shift(abs(dz) * math.sqrt(n), edge)
    # The far tail is below rounding, and nct returns NaN there, where the shift is large.
    far = stats.nct.cdf(-edge, n - 1, shift)
    return float(stats.nct.sf(edge, n - 1, shift) + np.nan_to_num(far))


def power_of_equivalence(n: int, margin: float, alpha: float = ALPHA) -> float:
    """Returns the power of n units to establish equivalence if there is no difference; margin in standard deviations.

    The noncentral t ignores that both one-sided tests share a standard deviation, which does not matter at a power of
    `POWER`.
    """
    edge = stats.t.ppf(1 - alpha, n - 1)
    # By symmetry both tests fail equally often.
    return float(max(0.0, 1 - 2 * np.nan_to_num(stats.nct.cdf(edge, n - 1, _shift(margin * math.sqrt(n), edge)))))


def _shift(noncentrality: float, edge: float) -> float:
    """Returns the noncentrality, bounded where more does not change the power; nct takes seconds for much more."""
    return min(noncentrality, 20 * edge + 20)


def needed(power: Callable[[int, float, float], float], effect: float, alpha: float = ALPHA) -> float:
    """Returns the fewest units for which power(units, effect, alpha) is `POWER`; inf of more than `MOST`, NaN of an
    unknown effect."""
    if math.isnan(effect):
        return math.nan
    if effect == 0 or math.isinf(effect):
        return 2 if effect else math.inf
    units = bisect_left(range(MOST + 1), POWER, lo=2, key=lambda n: power(n, effect, alpha))
    return units if units <= MOST else math.inf


def holm(p: Sequence[float]) -> np.ndarray:
    """Returns p-values adjusted for their family (Holm 1979), so that the family errs in at most 5 %; NaN stay out of
    the family."""
    p = np.asarray(p, np.float64)
    adjusted = np.full(p.shape, np.nan)
    order = np.flatnonzero(np.isfinite(p))[np.argsort(p[np.isfinite(p)], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * p[order]))
    return adjusted
