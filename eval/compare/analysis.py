"""The statistics of an `Experiment`. Imports no jax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from eval.compare.experiment import BEYOND, BOUND_NAMES, LATER, REGIONS, Experiment, Span
from eval.stats import paired
from eval.stats.estimates import Estimate, band, group_means, slope, unit_means
from eval.stats.paired import ALPHA, MeanTest, Paired
from eval.stats.verdict import Rule, Verdict, advise, verdict

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Nats by which persist and reset may differ in a file's first chunk, by the model's type.

There is nothing to reset yet, so both compute the same and only rounding is left: float32 gives 1e-6 in a chunk's mean,
bfloat16, with 8 bits, at most 0.003 (docs/evaluation.md)."""


class FirstChunk(NamedTuple):
    """Persist against reset in the first chunk, where nothing has been reset yet."""

    pairs: int
    """Checkpoints that were run under both, times files; 0: nothing could be checked."""
    largest: float
    """Largest absolute difference, nats; NaN where nothing was checked."""
    where: str
    """Checkpoint and file of it."""
    tolerance: float

    @property
    def broken(self) -> str | None:
        """Why no result counts; None if nothing is wrong."""
        if not self.pairs or self.largest <= self.tolerance:
            return None
        return (
            f"BROKEN: persist and reset differ by {self.largest:.2g} nats in the first chunk ({self.where}), where"
            f" nothing has been reset yet and only rounding ({self.tolerance:g}) is allowed. No result of this run"
            " counts: mend the evaluation first."
        )


class Seed(NamedTuple):
    """A comparison in one region, for one checkpoint of each condition."""

    test: MeanTest
    holm: float
    """p, adjusted for the seeds."""


class Compared(NamedTuple):
    """A comparison in one region."""

    paired: Paired
    """Differences averaged over seeds."""
    holm: float
    """p, adjusted for the comparisons in this region."""
    holm_equivalence: float
    verdict: Verdict | None
    """None in a broken run."""
    seeds: list[Seed]
    """Empty of a single checkpoint."""
    over_seeds: MeanTest | None
    """Mean of the seeds' means, the seed as unit."""


class Comparison(NamedTuple):
    """Another condition against the first."""

    name: str
    regions: dict[str, Compared]
    trend: MeanTest
    """Of the difference over chunks after the first, nats per chunk."""


class Losses(NamedTuple):
    """Means over units of a condition, whose seeds are averaged first, or of a bound."""

    regions: dict[str, Estimate]
    chunks: list[Estimate]
    closed: dict[str, Estimate] = {}
    """Share of the gap between the bounds that the condition closes, by region; empty without bounds."""
    closed_by_chunk: list[Estimate] = []
    closed_by_seed: list[Estimate] = []
    """Each checkpoint's, beyond the attention window."""


class Analysis(NamedTuple):
    """The statistics of an experiment; docs/evaluation/compare.md explains the numbers."""

    units: int
    first_chunk: FirstChunk
    losses: dict[str, Losses]
    """By condition."""
    bounds: dict[str, Losses]
    """Of a controlled task: `ideal` and `memoryless`; empty without."""
    comparisons: list[Comparison]


def analyse(experiment: Experiment) -> Analysis:
    """Returns the statistics of an experiment; without verdicts if it is broken."""
    first_chunk = _first_chunk(experiment)
    by_region = {region: _compare(experiment, region, first_chunk.broken is None) for region in REGIONS}
    comparisons = [
        Comparison(other.name, {region: by_region[region][i] for region in REGIONS}, _trend(experiment, other.name))
        for i, other in enumerate(experiment.conditions[1:])
    ]
    bounds = {
        name: _losses(experiment, lambda span, name=name: experiment.bound(name, span))
        for name in (BOUND_NAMES if experiment.bounds else ())
    }
    losses = {condition.name: _condition(experiment, condition.name) for condition in experiment.conditions}
    return Analysis(len(set(experiment.groups)), first_chunk, losses, bounds, comparisons)


def _first_chunk(experiment: Experiment) -> FirstChunk:
    """Compares persist with reset of the same checkpoint, in every file, before the first reset."""
    span = (0, experiment.setting.chunk)
    by_arm: dict[str, dict[str, np.ndarray]] = {"persist": {}, "reset": {}}
    for condition in experiment.conditions:
        if condition.arm in by_arm:
            by_arm[condition.arm] |= zip(condition.checkpoints, experiment.loss(condition.name, span), strict=True)
    scored = np.where(experiment.within(span), experiment.weight, 0).sum(-1) > 0
    both = [name for name in by_arm["persist"] if name in by_arm["reset"]]
    tolerance = TOLERANCE[experiment.setting.dtype]
    if not both or not scored.any():
        return FirstChunk(0, math.nan, "", tolerance)
    apart = np.abs(np.stack([(by_arm["persist"][name] - by_arm["reset"][name])[scored] for name in both]))
    apart = np.where(np.isnan(apart), np.inf, apart)
    checkpoint, file = np.unravel_index(apart.argmax(), apart.shape)
    where = f"{both[checkpoint]}, {experiment.files[np.flatnonzero(scored)[file]].name}"
    return FirstChunk(apart.size, float(apart.max()), where, tolerance)


def _compare(experiment: Experiment, region: str, sound: bool) -> list[Compared]:
    """Compares every other condition with the first in one region: a family."""
    setting, groups = experiment.setting, experiment.groups
    span, (first, *others) = setting.regions[region], experiment.conditions
    rule = Rule(setting.margin, setting.threshold, experiment.unit)

    family = []
    for other in others:
        d, loss = (unit_means(of(other.name, span).mean(0), groups) for of in (experiment.differences, experiment.loss))
        # Holm multiplies the least p of a family by its size, so sample sizes are for this part of the error rate.
        reference = float(loss.mean()) if len(loss) else math.nan
        family.append(paired.compare(d, reference, setting.margin, ALPHA / len(others)))
    adjusted = paired.holm([whole.p for whole in family])
    equivalent = paired.holm([whole.equivalence.p for whole in family])
    results = []
    for i, (other, whole) in enumerate(zip(others, family, strict=True)):
        several = len(other.checkpoints) > 1
        by_seed = experiment.differences(other.name, span) if several else []
        tests = [paired.mean_test(unit_means(d, groups)) for d in by_seed]
        means = [test.mean for test in tests]
        seeds = [Seed(test, float(p)) for test, p in zip(tests, paired.holm([test.p for test in tests]), strict=True)]
        judged = None
        if sound:
            judged = verdict(whole, adjusted[i], equivalent[i], rule, (first.name, other.name), means)
            if region == LATER and (first.arm, other.arm) == ("persist", "reset"):
                judged = advise(judged, experiment.unit)
        over_seeds = paired.mean_test(np.array(means)) if several else None
        results.append(Compared(whole, float(adjusted[i]), float(equivalent[i]), judged, seeds, over_seeds))
    return results


def _trend(experiment: Experiment, name: str) -> MeanTest:
    weight = [np.where(experiment.within(chunk), experiment.weight, 0).sum(-1) for chunk in experiment.chunks]
    # The first chunk has no weight.
    slopes = slope(experiment.differences_by_chunk(name)[:, 1:], np.stack(weight, -1)[:, 1:])
    return paired.mean_test(unit_means(slopes, experiment.groups))


def _losses(experiment: Experiment, loss: Callable[[Span], np.ndarray]) -> Losses:
    """Averages nats per token that `loss` returns of a span, [S, F]."""

    def mean(span: Span) -> Estimate:
        values = np.where(experiment.filled(span), loss(span).mean(0), np.nan)
        return Estimate(*(number.item() for number in band(group_means(values, experiment.groups))))

    regions = experiment.setting.regions
    return Losses({region: mean(span) for region, span in regions.items()}, list(map(mean, experiment.chunks)))


def _condition(experiment: Experiment, name: str) -> Losses:
    losses = _losses(experiment, lambda span: experiment.loss(name, span))
    if not experiment.bounds:
        return losses

    def closed(span: Span) -> Estimate:
        return _closed(experiment, span, experiment.loss(name, span).mean(0))

    regions = experiment.setting.regions
    return losses._replace(
        closed={region: closed(span) for region, span in regions.items()},
        closed_by_chunk=list(map(closed, experiment.chunks)),
        closed_by_seed=[_closed(experiment, regions[BEYOND], loss) for loss in experiment.loss(name, regions[BEYOND])],
    )


def _closed(experiment: Experiment, span: Span, loss: np.ndarray) -> Estimate:
    """Returns the share of the gap between the bounds over a span that losses [F] close."""
    ideal, memoryless = (experiment.bound(name, span)[0] for name in BOUND_NAMES)
    used = np.isfinite(loss + ideal + memoryless) & experiment.filled(span)
    closed, gap = (unit_means(np.where(used, memoryless - other, np.nan), experiment.groups) for other in (loss, ideal))
    return paired.share(closed, gap)
