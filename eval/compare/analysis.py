"""The statistics of an `Experiment`. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.compare.experiment import BEYOND, BOUND_NAMES, LATER, REGIONS, Experiment, differences, pooled
from eval.stats import paired
from eval.stats.estimates import Estimate, band, group_means
from eval.stats.paired import ALPHA, Interval, Paired, Slope
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


class OneSeed(NamedTuple):
    """A comparison in one region, for one checkpoint of each condition."""

    paired: Paired
    holm: float


class Compared(NamedTuple):
    """A comparison in one region."""

    paired: Paired
    """Differences averaged over seeds."""
    holm: float
    """p of the paired t, adjusted."""
    holm_equivalence: float
    verdict: Verdict | None
    """None in a broken run."""
    seeds: list[OneSeed]
    """Empty of a single checkpoint."""
    over_seeds: Slope | None
    """Mean of the seeds' means, the seed as unit."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Another condition against the first."""

    name: str
    regions: dict[str, Compared]
    trend: Slope
    """Of the difference over chunks after the first, nats per chunk."""


@dataclasses.dataclass(frozen=True)
class Losses:
    """Of a condition, means over units; seeds are averaged first."""

    regions: dict[str, Estimate]
    chunks: list[Estimate]
    seeds: list[float]
    """Each checkpoint's after the first chunk."""
    closed: dict[str, Interval]
    """Share of the gap that it closes, by region; empty without bounds."""
    closed_by_chunk: list[Interval]
    closed_by_seed: list[Interval]
    """Each checkpoint's, beyond the attention window."""


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The statistics of an experiment; `eval.compare.results.NOTES` explains the numbers."""

    units: int
    first_chunk: FirstChunk
    losses: dict[str, Losses]
    """By condition."""
    bounds: dict[str, list[Estimate]]
    """Of a controlled task: ideal and memoryless by chunk; empty without."""
    bounds_by_region: dict[str, dict[str, Estimate]]
    """The same by region."""
    comparisons: list[Comparison]


def of_units(values: np.ndarray, groups: list[str]) -> np.ndarray:
    """Returns one number for each unit that has one, [F] -> [U]."""
    means = group_means(values, groups)
    return means[np.isfinite(means)]


def analyse(experiment: Experiment) -> Analysis:
    """Returns the statistics of an experiment; without verdicts if it is broken."""
    first, *others = experiment.conditions
    checked = _first_chunk(experiment)
    found = {region: _compare(experiment, region, checked.broken is None) for region in REGIONS}
    starts, bounds = experiment.setting.starts, BOUND_NAMES if experiment.bounds else ()
    return Analysis(
        len(set(experiment.groups)),
        checked,
        {one.name: _losses(experiment, one.name) for one in experiment.conditions},
        {name: [_bound(experiment, name, chunk) for chunk in experiment.chunks] for name in bounds},
        {
            name: {region: _bound(experiment, name, (start, None)) for region, start in starts.items()}
            for name in bounds
        },
        [
            Comparison(other.name, {region: found[region][i] for region in REGIONS}, _trend(experiment, other.name))
            for i, other in enumerate(others)
        ],
    )


def _first_chunk(experiment: Experiment) -> FirstChunk:
    """Compares persist with reset of the same checkpoint, in every file, before the first reset."""
    by_arm: dict[str, dict[str, np.ndarray]] = {"persist": {}, "reset": {}}
    for one in experiment.conditions:
        if one.arm in by_arm:
            by_arm[one.arm] |= zip(one.checkpoints, experiment.loss(one.name, 0, experiment.setting.chunk), strict=True)
    scored = pooled(experiment.weight, experiment.weight, experiment.within(0, experiment.setting.chunk)) > 0
    both = [name for name in by_arm["persist"] if name in by_arm["reset"]]
    tolerance = TOLERANCE[experiment.setting.dtype]
    if not both or not scored.any():
        return FirstChunk(0, math.nan, "", tolerance)
    apart = np.abs(np.stack([(by_arm["persist"][name] - by_arm["reset"][name])[scored] for name in both]))
    apart = np.where(np.isnan(apart), np.inf, apart)
    at = np.unravel_index(apart.argmax(), apart.shape)
    file = [file for file, there in zip(experiment.files, scored, strict=True) if there][at[1]]
    return FirstChunk(apart.size, float(apart[at]), f"{both[at[0]]}, {file.name}", tolerance)


def _compare(experiment: Experiment, region: str, sound: bool) -> list[Compared]:
    """Compares every other condition with the first in one region: a family."""
    setting, groups = experiment.setting, experiment.groups
    start, (first, *others) = setting.starts[region], experiment.conditions
    rule = Rule(setting.margin, setting.threshold, experiment.unit)

    def of(d: np.ndarray, loss: np.ndarray) -> Paired:
        reference = of_units(loss, groups)
        mean = float(reference.mean()) if len(reference) else math.nan
        # The least p of a family is multiplied by its size.
        alpha = ALPHA / len(others)
        return paired.compare(of_units(d, groups), mean, setting.margin, setting.threshold / 100, alpha)

    found = []
    for other in others:
        d, loss = differences(experiment, other.name, start), experiment.loss(other.name, start)
        several = [of(*seed) for seed in zip(d, loss, strict=True)] if len(d) > 1 else []
        found.append((of(d.mean(0), loss.mean(0)), several))
    adjusted = paired.holm([whole.p.t for whole, _ in found])
    equivalent = paired.holm([whole.equivalence.p for whole, _ in found])
    compared = []
    for other, (whole, several), p, same in zip(others, found, adjusted, equivalent, strict=True):
        seeds = [OneSeed(*one) for one in zip(several, paired.holm([one.p.t for one in several]), strict=True)]
        over = paired.mean_slope(np.array([one.mean for one in several])) if several else None
        result = None
        if sound:
            means = [one.paired.mean for one in seeds]
            result = verdict(whole, p, same, rule, (first.name, other.name), means)
            if region == LATER and (first.arm, other.arm) == ("persist", "reset"):
                result = advise(result, experiment.unit)
        compared.append(Compared(whole, float(p), float(same), result, seeds, over))
    return compared


def _trend(experiment: Experiment, name: str) -> Slope:
    chunks = experiment.chunks[1:]
    if not chunks:
        return paired.mean_slope(np.zeros(0))
    first = experiment.conditions[0].name
    d = (experiment.by_chunk(name) - experiment.by_chunk(first)).mean(0)[:, 1:]
    weight = np.stack([np.where(experiment.within(*chunk), experiment.weight, 0).sum(-1) for chunk in chunks], -1)
    return paired.mean_slope(of_units(paired.slopes(d, weight), experiment.groups))


def _losses(experiment: Experiment, name: str) -> Losses:
    starts = experiment.setting.starts
    spans = [(start, None) for start in starts.values()]
    closed = [_closed(experiment, name, span) for span in [*spans, *experiment.chunks]] if experiment.bounds else []
    return Losses(
        {region: _estimate(experiment.loss(name, start).mean(0), experiment) for region, start in starts.items()},
        [_estimate(values, experiment) for values in experiment.by_chunk(name).mean(0).T],
        [
            float(of_units(seed, experiment.groups).mean()) if np.isfinite(seed).any() else math.nan
            for seed in experiment.loss(name, starts[LATER])
        ],
        dict(zip(REGIONS, closed, strict=False)),
        closed[len(REGIONS) :],
        [
            _closed(experiment, name, (starts[BEYOND], None), [seed])
            for seed in range(len(experiment.losses[name]) if experiment.bounds else 0)
        ],
    )


def _closed(
    experiment: Experiment, name: str, span: tuple[int, int | None], seeds: Sequence[int] | slice = slice(None)
) -> Interval:
    """Returns the share of the gap between the bounds that a condition closes over frames [start, end), its losses averaged over
    `seeds`."""
    bounds, used = experiment.bounds, experiment.within(*span)
    ideal, memoryless = (pooled(values, bounds.weight, used) for values in (bounds.ideal, bounds.memoryless))
    loss = np.where(experiment.filled(*span), experiment.loss(name, *span)[seeds].mean(0), np.nan)
    memoryless, ideal = (np.where(np.isfinite(loss), values, np.nan) for values in (memoryless, ideal))
    closed, gap = (of_units(values, experiment.groups) for values in (memoryless - loss, memoryless - ideal))
    return paired.share(closed, gap) if len(closed) == len(gap) else Interval(math.nan, math.nan, math.nan)


def _bound(experiment: Experiment, name: str, span: tuple[int, int | None]) -> Estimate:
    """Returns the best loss, `ideal` or `memoryless`, over frames [start, end)."""
    bounds = experiment.bounds
    means = pooled(getattr(bounds, name), bounds.weight, experiment.within(*span))
    return _estimate(np.where(experiment.filled(*span), means, np.nan), experiment)


def _estimate(values: np.ndarray, experiment: Experiment) -> Estimate:
    """Returns the mean over units of one number a file, [F]."""
    found = band(group_means(values, experiment.groups))
    return Estimate(*(field.item() for field in found))
