"""What `python -m eval compare` found: the statistics on an `Experiment`, and results.json, which holds both. Nothing here imports jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.compare.experiment import (
    BEYOND,
    BOUND_NAMES,
    LATER,
    REGIONS,
    WINDOW,
    Bounds,
    Condition,
    Experiment,
    File,
    Setting,
    differences,
    pooled,
)
from eval.results import schema as stored_
from eval.stats import paired
from eval.stats.estimates import Estimate, band, group_means
from eval.stats.paired import ALPHA, Interval, Paired, Slope
from eval.stats.verdict import Rule, Verdict, advise, verdict
from eval.streaming.summary import WEIGHTINGS

COMMAND, FORMAT = "python -m eval compare", 1
"""What marks results.json as this command's, and its version."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Nats by which persist and reset may differ in a file's first chunk, by the model's type. There is nothing to reset yet, so both compute
the same and only rounding is left: float32 gives 1e-6 in a chunk's mean, bfloat16, with 8 bits, at most 0.003 (docs/evaluation.md)."""

NOTES = {
    "losses": "by condition, checkpoint (seed), file and piece: nats per scored token of the own codebooks, weighted; null: nothing is"
    " scored there. Files are cut into pieces where a chunk begins and where attention ends; `pieces` are their first frames."
    " `weight`, by file and piece, is the weight of the scored tokens: the loss over several pieces is the mean weighted by it",
    "chunks": "means over units by chunk; a chunk that a file fills to less than half is left out for that file, here and in the trend"
    " (not from the parts of files, which are means over tokens)",
    "unit": "a file, or the mean over the files of one speaker where the manifest names speakers; frames are never units",
    "difference": "loss of the other condition minus loss of the first, which is under test, by the same file: above 0 the first is"
    " better. Of several checkpoints (seeds) the file's differences are averaged first: p-values speak of new files for these seeds;"
    " `seeds` has each seed alone, `over_seeds` the mean with the seed as unit",
    "regions": f"{LATER}: frames from the second chunk on; {WINDOW}: also beyond the longest attention window of a layer; {BEYOND}:"
    " also beyond all that attention could hand on from layer to layer (the sum of context - 1 over layers, and the longest delay of"
    " a codebook), so that without memory nothing can know it",
    "paired": "n units, mean and sd of the differences in nats, 95 % BCa bootstrap interval (low, high), two-sided p of paired t,"
    " Wilcoxon's signed ranks and sign-flip permutation, share of units above 0, reference: mean loss of the other condition,"
    " relative = mean / reference, dz: Cohen's d_z with Hedges' exact correction",
    "equivalence": "two one-sided paired t tests against the margin (p: the larger), 90 % interval",
    "power": "units for 80 % power at 0.05 divided by the number of comparisons, two-sided: for_effect: to find this d_z; for_equivalence: to establish equivalence if there"
    " is truly no difference; of_threshold: power that n units had for an effect of the threshold. null: more than a million, or"
    " not known",
    "holm": "p of the paired t adjusted for the comparisons with the first condition in one region; holm_equivalence: the same for"
    " the equivalence tests; of a seed: adjusted for the seeds of its comparison",
    "trend": "slope of the difference over chunks after the first, nats per chunk: least squares by file, chunks weighted by their"
    " tokens, then a mean over units with a 95 % interval (Student's t) and its p; above 0 the benefit grows",
    "closed": "share of the gap between the best possible loss without and with memory from beyond attention that a condition closes,"
    " (memoryless - loss) / (memoryless - ideal), sums over units, 95 % BCa interval",
}
"""What the numbers in results.json are."""


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
        """Why no result counts; None where none is known."""
        if not self.pairs or self.largest <= self.tolerance:
            return None
        return (
            f"BROKEN: persist and reset differ by {self.largest:.2g} nats in the first chunk ({self.where}), where nothing has been reset"
            f" yet and only rounding ({self.tolerance:g}) is allowed. No result of this run counts: mend the evaluation first."
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
    """All that is said about an experiment; `NOTES` says what the numbers are."""

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
    """One number for each unit that has one, [F] -> [U]."""
    means = group_means(values, groups)
    return means[np.isfinite(means)]


def analyse(experiment: Experiment) -> Analysis:
    """The statistics of an experiment; of a broken one without verdicts."""
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
    """Persist against reset of the same checkpoint, in every file, while nothing has been reset."""
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
    """Every other condition against the first in one region: a family."""
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
        said = None
        if sound:
            means = [one.paired.mean for one in seeds]
            said = verdict(whole, p, same, rule, (first.name, other.name), means)
            if region == LATER and (first.arm, other.arm) == ("persist", "reset"):
                said = advise(said, experiment.unit)
        compared.append(Compared(whole, float(p), float(same), said, seeds, over))
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
    """Share of the gap between the bounds that a condition closes over frames [start, end), its losses averaged over `seeds`."""
    bounds, used = experiment.bounds, experiment.within(*span)
    ideal, memoryless = (pooled(values, bounds.weight, used) for values in (bounds.ideal, bounds.memoryless))
    loss = np.where(experiment.filled(*span), experiment.loss(name, *span)[seeds].mean(0), np.nan)
    memoryless, ideal = (np.where(np.isfinite(loss), values, np.nan) for values in (memoryless, ideal))
    closed, gap = (of_units(values, experiment.groups) for values in (memoryless - loss, memoryless - ideal))
    return paired.share(closed, gap) if len(closed) == len(gap) else Interval(math.nan, math.nan, math.nan)


def _bound(experiment: Experiment, name: str, span: tuple[int, int | None]) -> Estimate:
    """The best loss, `ideal` or `memoryless`, over frames [start, end)."""
    bounds = experiment.bounds
    means = pooled(getattr(bounds, name), bounds.weight, experiment.within(*span))
    return _estimate(np.where(experiment.filled(*span), means, np.nan), experiment)


def _estimate(values: np.ndarray, experiment: Experiment) -> Estimate:
    """Mean over units of one number a file, [F]."""
    found = band(group_means(values, experiment.groups))
    return Estimate(*(field.item() for field in found))


# results.json


def write(folder: Path, experiment: Experiment, analysis: Analysis, about: dict[str, Any]) -> Path:
    """Write results.json to `folder`, at once or not at all; its path.

    Args:
      experiment, analysis: what was found and what it comes to; about: what else to say at the top (versions, cost).
    """
    bounds = experiment.bounds
    content = {
        **about,
        "command": COMMAND,
        "format": FORMAT,
        "notes": NOTES | {"weighting": WEIGHTINGS[experiment.setting.weighting]},
        "broken": analysis.first_chunk.broken,
        "verdicts": {
            one.name: {region: one.regions[region].verdict for region in REGIONS} for one in analysis.comparisons
        },
        "setting": experiment.setting,
        "regions": experiment.setting.starts,
        "counts": {"files": len(experiment.files), "units": analysis.units, "unit": experiment.unit},
        "conditions": experiment.conditions,
        "analysis": analysis,
        "checkpoints": experiment.checkpoints,
        "files": experiment.files,
        "skipped": experiment.skipped,
        "pieces": experiment.pieces,
        "weight": experiment.weight,
        "losses": experiment.losses,
        "bounds": bounds,
    }
    return stored_.write(folder, _named(content))


def _named(value: Any) -> Any:
    """`value` with the fields of named tuples and dataclasses by name."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _named(value._asdict())
    if dataclasses.is_dataclass(value):
        return _named({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {name: _named(item) for name, item in value.items()}
    return [_named(item) for item in value] if isinstance(value, list | tuple) else value


def read(folder: Path) -> tuple[Experiment, dict[str, Any]]:
    """The experiment that `write` wrote to `folder`, and its `about`.

    Raises `InputError` as `eval.results.schema.read`.
    """
    stored = stored_.read(folder, COMMAND, FORMAT)
    array = lambda values: np.array(values, np.float64)  # noqa: E731
    experiment = Experiment(
        Setting(**stored["setting"]),
        [Condition(**one | {"checkpoints": tuple(one["checkpoints"])}) for one in stored["conditions"]],
        [File(**file) for file in stored["files"]],
        array(stored["weight"]),
        {name: array(values) for name, values in stored["losses"].items()},
        Bounds(**{name: array(values) for name, values in stored["bounds"].items()}) if stored["bounds"] else None,
        stored["checkpoints"],
        stored["skipped"],
    )
    return experiment, {name: stored[name] for name in ("evaluated_with", "cost") if name in stored}
