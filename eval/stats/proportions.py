"""Statistics of accuracies: intervals of a proportion over clusters, and two of them on the same clusters.

An item (a word in several voices, or one pair) is the unit: its score is the mean of its pairs', from 0 to 1. Arrays
hold one score for each item, without NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from eval.stats.estimates import Estimate

RESAMPLES = 10_000
"""Of the bootstrap."""
BLOCK = 1 << 22
"""Most numbers of resamples that are held at once."""
Z = float(stats.norm.ppf(0.975))
NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


class Difference(NamedTuple):
    """One set of scores against another on the same items; NaN without items."""

    difference: Estimate
    """Mean difference, with a 95 % percentile interval by bootstrap over items."""
    better: int
    """Items on which the first scores more."""
    worse: int
    p: float
    """Of the two-sided exact sign test over items, which is McNemar's exact test where an item is one pair."""


def accuracy(items: np.ndarray, pairs: int) -> Estimate:
    """Returns the mean of items [n] with its 95 % interval: Wilson's, with the effective number of items.

    The effective number is that of coin throws whose mean would vary as much as this one: n / (design effect), where
    the design effect is the variance of the items over p (1 - p). Items of one pair give n, so that the interval is
    Wilson's own; items of several voices give more, at most the number of `pairs`. Where all items are equal, nothing
    is known of how much they vary, and it is n. Unlike Student's t the interval stays within 0 and 1, and 5 right
    items of 5 leave [0.57, 1].

    Sources: Wilson 1927, doi 10.1080/01621459.1927.10502953; with the effective size Franco et al. 2019, doi
    10.1093/jssam/smy019, who recommend this form for clusters.
    """
    n = len(items)
    if not n:
        return NOTHING
    mean, variance = float(items.mean()), float(items.var())
    size = min(n * mean * (1 - mean) / variance, pairs) if variance > 0 else n
    size = max(size, n)  # rounding: no variance within [0, 1] exceeds p (1 - p)
    centre = (mean + Z**2 / (2 * size)) / (1 + Z**2 / size)
    half = Z / (1 + Z**2 / size) * math.sqrt(mean * (1 - mean) / size + Z**2 / (4 * size**2))
    # At 0 and 1 the bound is the mean itself, but for rounding.
    return Estimate(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)), n)


def mean_of(parts: Sequence[Estimate]) -> Estimate:
    """Returns the unweighted mean of independent accuracies; NaN if one of them has no items.

    The interval puts together the distances of the bounds from the means (MOVER), which suits intervals that are not
    symmetric. Source: Zou and Donner 2008, doi 10.1002/sim.3095.
    """
    if not parts or not all(part.n for part in parts):
        return NOTHING
    mean = sum(part.mean for part in parts) / len(parts)
    below = math.hypot(*(part.mean - part.low for part in parts)) / len(parts)
    above = math.hypot(*(part.high - part.mean for part in parts)) / len(parts)
    return Estimate(mean, mean - below, mean + above, sum(part.n for part in parts))


def compare(items: np.ndarray, others: np.ndarray, seed: int = 0) -> Difference:
    """Compares the scores of the same items, [n] and [n]: `items` minus `others`."""
    d = items - others
    if not len(d):
        return Difference(NOTHING, 0, 0, math.nan)
    better, worse = int((d > 0).sum()), int((d < 0).sum())
    return Difference(bootstrap(d, seed), better, worse, sign_test(better, worse))


def sign_test(better: int, worse: int) -> float:
    """Returns p of the exact two-sided binomial test of `better` against `worse` items; 1 of none."""
    tail = stats.binom.cdf(min(better, worse), better + worse, 0.5)
    return min(1.0, 2 * float(tail))


def bootstrap(d: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """Returns the mean of d [n], n >= 1, with its 95 % percentile interval over resampled items.

    Drawing items with replacement draws how often each distinct value comes, which is multinomial; scores of a few
    voices have few distinct values, so that 60,000 items cost no more than 60.
    """
    values, counts = np.unique(d, return_counts=True)
    rng, block = np.random.default_rng(seed), max(1, BLOCK // len(values))
    means = [
        rng.multinomial(len(d), counts / len(d), size=min(block, resamples - start)) @ values / len(d)
        for start in range(0, resamples, block)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Estimate(float(d.mean()), float(low), float(high), len(d))
