"""Figures of `python -m eval compare`: loss by chunk of every condition, and paired differences by file; PNG and
PDF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eval.compare.analysis import Analysis, of_units
from eval.compare.experiment import BOUND_NAMES, LATER, Experiment, differences
from eval.stats.estimates import Estimate, band, group_means
from eval.streaming.plots import CHECKPOINTS, COLOURS, DASHES, KINDS, save
from ttt_jax.config import FRAME_RATE

LOSSES, DIFFERENCES = "loss_by_chunk", "differences"
FILES = tuple(f"{name}.{kind}" for name in (LOSSES, DIFFERENCES) for kind in KINDS)
"""All that is drawn."""


def draw_all(experiment: Experiment, analysis: Analysis, folder: Path) -> list[Path]:
    """Draw both figures to `folder`; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    return [
        *save(losses(experiment, analysis), folder, LOSSES),
        *save(paired_differences(experiment, analysis), folder, DIFFERENCES),
    ]


def losses(experiment: Experiment, analysis: Analysis) -> Any:
    """Loss by chunk of every condition, and what each other one has more than the first."""
    from matplotlib import pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    setting, first = experiment.setting, experiment.conditions[0]
    counted = [value.n for value in analysis.losses[first.name].chunks]
    shown = max((i + 1 for i, n in enumerate(counted) if n > analysis.units / 2), default=0)
    longest = max(file.frames for file in experiment.files)
    ends = np.minimum(np.arange(1, shown + 1) * setting.chunk, longest)
    middles = (np.arange(shown) * setting.chunk + ends) / 2
    for i, one in enumerate(experiment.conditions):
        found = analysis.losses[one.name].chunks[:shown]
        # Each thinner than the one before, so that curves on top of each other all show.
        width = 1.4 + 0.6 * (len(experiment.conditions) - 1 - i)
        # Files differ more than conditions do: one band shows that, the differences below have their own.
        _curve(upper, middles, found, _style(experiment, i), width, one.name, banded=not i)
        if i:
            d = (experiment.by_chunk(one.name) - experiment.by_chunk(first.name)).mean(0)
            found = _estimates(d, experiment)[:shown]
            _curve(lower, middles, found, _style(experiment, i), 1.4, one.name, banded=True)
    for (name, found), dashes in zip(analysis.bounds.items(), ((6, 2), (2, 2)), strict=False):
        means = [value.mean for value in found[:shown]]
        upper.plot(middles, means, color="0.35", lw=1.2, dashes=dashes, label=BOUND_NAMES[name])
    lower.axhline(0, color="black", lw=0.8)
    beyond = _end_scale(upper, lower, experiment, analysis)
    _mark(upper, lower, experiment)
    over = f"band: 95 % over {analysis.units} {experiment.unit}" if analysis.units > 1 else "one unit, so no band"
    fewer = f" ({counted[shown - 1]} at the end)" if shown and counted[shown - 1] < analysis.units else ""
    figure.suptitle(
        f"Loss by chunk of {setting.chunk} frames, codebooks weighted {setting.weighting}; {over}{fewer}", fontsize=10
    )
    upper.set_title(f"Loss of the codebooks (band: {first.name})", fontsize=10, loc="left")
    lower.set_title(
        f"Minus {first.name}, paired by file: above 0 {first.name} is better{beyond}", fontsize=10, loc="left"
    )
    for axis in (upper, lower):
        axis.set_ylabel("nats per token")
        axis.grid(alpha=0.25)
    upper.set_xlim(0, max(1, ends[-1] if shown else longest))
    lower.set_xlabel("frames")
    end = upper.get_xlim()[1] / FRAME_RATE
    name, seconds = ("minutes", 60) if end > 300 else ("seconds", 1)
    rate = FRAME_RATE * seconds
    lower.secondary_xaxis(-0.2, functions=(lambda x: x / rate, lambda x: x * rate)).set_xlabel(name)
    handles, labels = upper.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    return figure


def paired_differences(experiment: Experiment, analysis: Analysis) -> Any:
    """For each comparison the differences after the first chunk: a dot a unit, sorted; paler dots are seeds; the mean
    with its interval."""
    from matplotlib import pyplot as plt

    start = experiment.setting.starts[LATER]
    others = experiment.conditions[1:]
    figure, axis = plt.subplots(figsize=(8, 1.8 + 1.1 * len(others)), layout="constrained")
    for i, (one, found) in enumerate(zip(others, analysis.comparisons, strict=True)):
        place, (colour, _) = len(others) - 1 - i, _style(experiment, i + 1)
        d = differences(experiment, one.name, start)
        units = of_units(d.mean(0), experiment.groups)
        order = np.argsort(units)
        # Sorted from left to right and from below to above, so that dots do not hide each other.
        heights = place + np.linspace(-0.28, 0.28, len(units)) if len(units) > 1 else np.array([float(place)])
        if len(d) > 1:
            for seed in d:
                values = of_units(seed, experiment.groups)
                axis.scatter(values[order], heights[: len(values)], s=9, color=colour, alpha=0.3, lw=0)
        axis.scatter(units[order], heights[: len(units)], s=22, color=colour, lw=0, zorder=3)
        whole = found.regions[LATER].paired
        if whole.n:
            low, high = (whole.mean if np.isnan(edge) else edge for edge in (whole.low, whole.high))
            bar = axis.errorbar(
                whole.mean,
                place - 0.4,
                xerr=[[whole.mean - low], [high - whole.mean]],
                fmt="D",
                color="black",
                markersize=5,
                capsize=4,
                lw=1.4,
                zorder=4,
            )
            bar.set_label("mean, 95 % BCa interval")
    margin = experiment.setting.margin
    left, right = axis.get_xlim()
    left, right = min(left, 0), max(right, 0)
    axis.axvline(0, color="black", lw=0.8)
    drawn = margin < 1.5 * max(abs(left), abs(right))  # a wider margin would press all dots together
    if drawn:
        axis.axvspan(-margin, margin, color="0.5", alpha=0.12, lw=0)
        pad = 0.05 * (right - left)
        left, right = min(left, -margin - pad), max(right, margin + pad)
    axis.set_xlim(left, right)
    axis.set_ylim(-0.65, len(others) - 0.45)
    axis.set_yticks(range(len(others)), [one.name for one in reversed(others)])
    axis.set_xlabel(
        f"nats per token minus {experiment.conditions[0].name}, frames from {start} on; above 0"
        f" {experiment.conditions[0].name} is better"
    )
    axis.grid(alpha=0.25, axis="x")
    seeds = f"; pale: its {len(experiment.conditions[0].checkpoints)} seeds" * (
        len(experiment.conditions[0].checkpoints) > 1
    )
    grey = f"grey: margin of {margin:g}" if drawn else f"the margin of {margin:g} is wider than the figure"
    interval = "; diamond: mean with 95 % BCa interval" if analysis.units > 2 else "; diamond: mean"
    figure.suptitle(f"A dot is one of the {experiment.unit}{seeds}{interval}\n{grey}", fontsize=10)
    return figure


def _style(experiment: Experiment, i: int) -> tuple[str, tuple[float, ...]]:
    """Colour and dashes of condition `i`: of its arm, where no two conditions share one."""
    arms = [one.arm for one in experiment.conditions]
    if len(set(arms)) == len(arms):
        return COLOURS[arms[i]], DASHES.get(arms[i], ())
    return CHECKPOINTS[i % len(CHECKPOINTS)], ((), (4, 2), (1, 1))[i // len(CHECKPOINTS) % 3]


def _estimates(values: np.ndarray, experiment: Experiment) -> list[Estimate]:
    """Means over units by chunk, [F, C]."""
    found = band(group_means(values, experiment.groups))
    return [Estimate(*numbers) for numbers in zip(*(field.tolist() for field in found), strict=True)]


def _end_scale(upper: Any, lower: Any, experiment: Experiment, analysis: Analysis) -> str:
    """Where the worth of memory is known, curves far off would flatten all others: both scales end before them; their
    losses in words."""
    if not analysis.bounds:
        return ""
    best, least = (analysis.bounds_by_region[name][LATER].mean for name in ("memoryless", "ideal"))
    top, first = best + (best - least), analysis.losses[experiment.conditions[0].name].regions[LATER].mean
    losses = {one.name: analysis.losses[one.name].regions[LATER].mean for one in experiment.conditions}
    off = [f"{name} {loss:.2f}" for name, loss in losses.items() if loss > top]
    if not off or not best > least or not top > first:
        return ""
    for axis, end in ((upper, top), (lower, top - first)):
        lowest = min(
            np.nanmin(line.get_ydata(), initial=end) for line in axis.get_lines() if line.get_label()[0] != "_"
        )
        axis.set_ylim(lowest - 0.05 * (end - lowest), end)
    return f"; off the scale: loss of {', '.join(off)}"


def _curve(
    axis: Any,
    x: np.ndarray,
    found: list[Estimate],
    style: tuple[str, tuple],
    width: float,
    label: str,
    banded: bool,
) -> None:
    colour, dashes = style
    mean, low, high, n = np.array(found, np.float64).reshape(-1, 4).T
    marker = "o" if len(x) <= 40 else None
    axis.plot(x, mean, color=colour, dashes=dashes, lw=width, marker=marker, markersize=1.6 + width, label=label)
    if banded:
        firm = n > 2  # over two units an interval is so wide that it would flatten every curve
        axis.fill_between(x, low, high, where=firm, color=colour, alpha=0.15, lw=0)


def _mark(upper: Any, lower: Any, experiment: Experiment) -> None:
    """Dotted lines where one layer's window and where all attention ends; their places in words."""
    setting, longest = experiment.setting, max(file.frames for file in experiment.files)
    words = []
    for name, frame, style in (("window", setting.window, ":"), ("reach of all layers", setting.reach, "-.")):
        if frame < longest:
            for axis in (upper, lower):
                axis.axvline(frame, color="black", lw=0.9, ls=style)
        words.append(f"{name} {frame:,}" + ("" if frame < longest else " (not reached)"))
    upper.set_title(f"attention, frames: {' (dotted), '.join(words)} (dash-dotted)", fontsize=8, loc="right")
