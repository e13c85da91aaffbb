"""Figures of `python -m eval compare`: loss by chunk of every condition, and paired differences by file; PNG and
PDF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eval.compare.analysis import Analysis
from eval.compare.experiment import BOUND_NAMES, LATER, Experiment
from eval.results.figures import CHECKPOINTS, COLOURS, DASHES, KINDS, save
from eval.stats.estimates import Band, band, group_means, unit_means
from ttt_jax.config import FRAME_RATE

LOSSES, DIFFERENCES = "loss_by_chunk", "differences"
FILES = tuple(f"{name}.{kind}" for name in (LOSSES, DIFFERENCES) for kind in KINDS)
"""All that is drawn."""


def draw_all(experiment: Experiment, analysis: Analysis, folder: Path) -> list[Path]:
    """Draws both figures to `folder`; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    return [
        *save(losses(experiment, analysis), folder, LOSSES),
        *save(paired_differences(experiment, analysis), folder, DIFFERENCES),
    ]


def losses(experiment: Experiment, analysis: Analysis) -> Any:
    """Returns a figure of every condition's loss by chunk, above its differences from the first."""
    from matplotlib import pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    setting, first = experiment.setting, experiment.conditions[0].name
    counts = [value.n for value in analysis.losses[first].chunks]
    shown = max((i + 1 for i, n in enumerate(counts) if n > analysis.units / 2), default=0)
    middles = np.array([(start + min(end, experiment.longest)) / 2 for start, end in experiment.chunks[:shown]])
    for i, condition in enumerate(experiment.conditions):
        style = _style(experiment, i) | {"label": condition.name, "marker": "o" if shown <= 40 else None}
        # Each thinner than the one before, so that curves on top of each other all show.
        width = 1.4 + 0.6 * (len(experiment.conditions) - 1 - i)
        means = analysis.losses[condition.name].chunks[:shown]
        upper.plot(middles, [value.mean for value in means], lw=width, ms=1.6 + width, **style)
        # Files differ more than conditions do: the first one's band shows that, the differences have their own.
        axis, values = upper, Band(*np.array(means, np.float64).reshape(-1, 4).T)
        if i:
            d = experiment.differences_by_chunk(condition.name)[:, :shown]
            axis, values = lower, band(group_means(d, experiment.groups))
            lower.plot(middles, values.mean, lw=1.4, ms=3, **style)
        firm = values.n > 2  # over two units an interval is so wide that it would flatten every curve
        axis.fill_between(middles, values.low, values.high, where=firm, color=style["color"], alpha=0.15, lw=0)
    for name, bound in analysis.bounds.items():
        style = {"color": "0.35", "lw": 1.2, "dashes": (6, 2) if name == "ideal" else (2, 2)}
        upper.plot(middles, [value.mean for value in bound.chunks[:shown]], label=BOUND_NAMES[name], **style)
    lower.axhline(0, color="black", lw=0.8)
    beyond = _end_scale(upper, lower, experiment, analysis)
    upper.set_title(_mark(upper, lower, experiment), fontsize=8, loc="right")
    over = f"band: 95 % over {analysis.units} {experiment.unit}" if analysis.units > 1 else "one unit, so no band"
    fewer = f" ({counts[shown - 1]} at the end)" if shown and counts[shown - 1] < analysis.units else ""
    figure.suptitle(
        f"Loss by chunk of {setting.chunk} frames, codebooks weighted {setting.weighting}; {over}{fewer}", fontsize=10
    )
    upper.set_title(f"Loss of the codebooks (band: {first})", fontsize=10, loc="left")
    lower.set_title(f"Minus {first}, paired by file: above 0 {first} is better{beyond}", fontsize=10, loc="left")
    for axis in (upper, lower):
        axis.set_ylabel("nats per token")
        axis.grid(alpha=0.25)
    end = min(shown * setting.chunk or experiment.longest, experiment.longest)
    upper.set_xlim(0, end)
    lower.set_xlabel("frames")
    lower.secondary_xaxis(-0.2, functions=(lambda x: x / FRAME_RATE, lambda x: x * FRAME_RATE)).set_xlabel("seconds")
    handles, labels = upper.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    return figure


def paired_differences(experiment: Experiment, analysis: Analysis) -> Any:
    """Returns a figure of the differences after the first chunk: a dot a unit, paler dots for seeds, the mean with its
    interval."""
    from matplotlib import pyplot as plt

    span, margin = experiment.setting.regions[LATER], experiment.setting.margin
    first, *others = experiment.conditions
    figure, axis = plt.subplots(figsize=(8, 1.8 + 1.1 * len(others)), layout="constrained")
    for i, (condition, comparison) in enumerate(zip(others, analysis.comparisons, strict=True), 1):
        place, colour = len(others) - i, _style(experiment, i)["color"]
        d = experiment.differences(condition.name, span)
        units = unit_means(d.mean(0), experiment.groups)
        order = np.argsort(units)
        # Sorted from left to right and from below to above, so that dots do not hide each other.
        heights = place + (np.linspace(-0.28, 0.28, len(units)) if len(units) > 1 else np.zeros(len(units)))
        for seed in d if len(d) > 1 else ():
            axis.scatter(unit_means(seed, experiment.groups)[order], heights, s=9, color=colour, alpha=0.3, lw=0)
        axis.scatter(units[order], heights, s=22, color=colour, lw=0, zorder=3)
        paired = comparison.regions[LATER].paired
        half = [[np.nan_to_num(paired.high - paired.mean)]] * 2  # no bar of one unit
        bar = {"color": "black", "markersize": 5, "capsize": 4, "lw": 1.4, "zorder": 4}
        axis.errorbar(paired.mean, place - 0.4, xerr=half, fmt="D", **bar)
    left, right = min(axis.get_xlim()[0], 0), max(axis.get_xlim()[1], 0)
    axis.axvline(0, color="black", lw=0.8)
    drawn = margin < 1.5 * max(-left, right)  # a wider margin would press all dots together
    if drawn:
        axis.axvspan(-margin, margin, color="0.5", alpha=0.12, lw=0)
        pad = 0.05 * (right - left)
        left, right = min(left, -margin - pad), max(right, margin + pad)
    axis.set_xlim(left, right)
    axis.set_ylim(-0.65, len(others) - 0.45)
    axis.set_yticks(range(len(others)), [condition.name for condition in reversed(others)])
    axis.set_xlabel(f"nats per token minus {first.name}, frames from {span[0]} on; above 0 {first.name} is better")
    axis.grid(alpha=0.25, axis="x")
    seeds = f"; pale: its {len(first.checkpoints)} seeds" if len(first.checkpoints) > 1 else ""
    grey = f"grey: margin of {margin:g}" if drawn else f"the margin of {margin:g} is wider than the figure"
    interval = "mean with 95 % interval" if analysis.units > 1 else "mean"
    figure.suptitle(f"A dot is one of the {experiment.unit}{seeds}; diamond: {interval}\n{grey}", fontsize=10)
    return figure


def _style(experiment: Experiment, i: int) -> dict[str, Any]:
    """Returns colour and dashes of condition `i`: of its arm, where no two conditions share one."""
    arms = [condition.arm for condition in experiment.conditions]
    if len(set(arms)) == len(arms):
        return {"color": COLOURS[arms[i]], "dashes": DASHES.get(arms[i], ())}
    dashes = ((), (4, 2), (1, 1))[i // len(CHECKPOINTS) % 3]
    return {"color": CHECKPOINTS[i % len(CHECKPOINTS)], "dashes": dashes}


def _end_scale(upper: Any, lower: Any, experiment: Experiment, analysis: Analysis) -> str:
    """Ends both scales before curves that would flatten all others, where the worth of memory is known; returns the
    losses of these curves in words."""
    if not analysis.bounds:
        return ""
    least, best = (analysis.bounds[name].regions[LATER].mean for name in BOUND_NAMES)
    losses = {name: losses.regions[LATER].mean for name, losses in analysis.losses.items()}
    top, first = best + (best - least), losses[experiment.conditions[0].name]
    off = [f"{name} {loss:.2f}" for name, loss in losses.items() if loss > top]
    if not off or not best > least or not top > first:
        return ""
    for axis, end in ((upper, top), (lower, top - first)):
        curves = [line.get_ydata() for line in axis.get_lines() if line.get_label()[0] != "_"]
        lowest = min(np.nanmin(curve, initial=end) for curve in curves)
        axis.set_ylim(lowest - 0.05 * (end - lowest), end)
    return f"; off the scale: loss of {', '.join(off)}"


def _mark(upper: Any, lower: Any, experiment: Experiment) -> str:
    """Draws lines where one layer's window and where all attention ends; returns their places in words."""
    setting, words = experiment.setting, []
    for name, frame, style in (("window", setting.window, ":"), ("reach of all layers", setting.reach, "-.")):
        reached = frame < experiment.longest
        for axis in (upper, lower) if reached else ():
            axis.axvline(frame, color="black", lw=0.9, ls=style)
        words.append(f"{name} {frame:,}" + ("" if reached else " (not reached)"))
    return f"attention, frames: {' (dotted), '.join(words)} (dash-dotted)"
