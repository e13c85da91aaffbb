"""The figure of `python -m eval recall`: benefit against gap by arm. Imports no jax."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from eval.recall.results import CheckpointRecall, Curve, RecallResults
from eval.results.figures import COLOURS, DASHES, KINDS, legend, pyplot, save
from ttt_jax.config import FRAME_RATE

NAME = "recall"
FILES = tuple(f"{NAME}.{kind}" for kind in KINDS)
APART = 1.025
"""Factor between the arms of a gap, so that their intervals do not cover each other."""
TICKS = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


def write_figures(results: RecallResults, folder: Path) -> list[Path]:
    """Draws the curves as recall.png and recall.pdf; returns the paths."""
    return save(draw(results), folder, NAME)


def draw(results: RecallResults) -> Any:
    """Returns a figure with a row of panels for each checkpoint, one panel for each kind."""
    kinds = [kind for kind in results.setting.kinds if any(kind in one.curves for one in results.checkpoints)]
    count = len(results.checkpoints)
    size = (1.5 + 5.5 * len(kinds), 1.5 + 3.1 * count)
    figure, axes = pyplot().subplots(
        count, len(kinds), figsize=size, squeeze=False, sharex=True, sharey="col", layout="constrained"
    )
    data = results.setting.about.get("data")
    of = f" of {Path(data).name}" if data else ""
    figure.suptitle(
        f"Benefit of having heard it before\nexcerpts of {results.setting.excerpt / FRAME_RATE:g} s{of}, codebooks"
        f" weighted {results.setting.weighting}\nbars: 95 % over units; grey: within attention's reach, so not memory's"
        " alone",
        fontsize=10,
    )
    seconds = [point.seconds for one in results.checkpoints for curve in one.curves.values() for point in curve.gaps]
    limits = min(seconds) / 1.4, max(seconds) * 1.4
    for row, checkpoint in zip(axes, results.checkpoints, strict=True):
        for axis, kind in zip(row, kinds, strict=True):
            axis.set_xscale("log")
            axis.set_xlim(limits)
            axis.set_title(f"{checkpoint.info.name}, {kind}", fontsize=10, loc="left")
            axis.grid(alpha=0.25)
            axis.axhline(0, color="black", lw=0.8)
            if kind in checkpoint.curves:
                _curve(axis, checkpoint.curves[kind])
            _mark_attention(axis, checkpoint, limits)
            _ticks(axis, limits)
        row[0].set_ylabel("nats per token")
    for axis in axes[-1]:
        axis.set_xlabel("gap")
    legend(figure, axes.flat, 3 if len(kinds) == 1 else 7)
    return figure


def _curve(axis: Any, curve: Curve) -> None:
    arms = list(curve.gaps[0].arms)
    for i, arm in enumerate(arms):
        points = [(point.seconds, point.arms[arm].benefit) for point in curve.gaps]
        x = np.array([seconds for seconds, _ in points]) * APART ** (i - (len(arms) - 1) / 2)
        mean = np.array([benefit.mean for _, benefit in points])
        bounds = np.array([[benefit.low, benefit.high] for _, benefit in points]).T
        style = {"color": COLOURS[arm], "lw": 1.4, "zorder": 3 - i / 10}  # persist lies on top
        axis.plot(x, mean, marker="o", markersize=4, dashes=DASHES.get(arm, ()), label=arm, **style)
        lines = axis.dataLim.get_points().copy()
        axis.vlines(x, *bounds, alpha=0.6, **style)
        # Over two units an interval is so wide that it would flatten every curve: it does not set the scale.
        firm = np.array([benefit.n > 2 for _, benefit in points])
        axis.dataLim.set_points(lines)
        axis.update_datalim(np.concatenate([np.stack([x, edge], -1)[firm] for edge in bounds]))
    axis.autoscale_view(scalex=False)
    if curve.half is not None and curve.half.seconds is not None:
        axis.axvline(curve.half.seconds, color="#009E73", lw=1.2, ls="-.", label="half of the benefit is left")


def _mark_attention(axis: Any, checkpoint: CheckpointRecall, limits: tuple[float, float]) -> None:
    """Marks the longest window of one layer and the reach of all together, which words name where they are outside."""
    window, reach = checkpoint.info.context / FRAME_RATE, checkpoint.info.reach / FRAME_RATE
    axis.axvspan(limits[0], min(reach, limits[1]), color="black", alpha=0.07, lw=0)
    if limits[0] < window < limits[1]:
        axis.axvline(window, color="black", lw=0.9, ls=":", label="one layer's attention window")
    if limits[0] < reach < limits[1]:
        axis.axvline(reach, color="black", lw=0.9, ls="--", label="attention's reach")
    words = f"{reach:.1f} s" if math.isfinite(reach) else "everything (attention sink)"
    axis.set_title(f"window {window:.1f} s, reach {words}", fontsize=8, loc="right")


def _ticks(axis: Any, limits: tuple[float, float]) -> None:
    ticks = [tick for tick in TICKS if limits[0] <= tick <= limits[1]]
    if len(ticks) > 1:
        axis.set_xticks(ticks, [f"{tick} s" if tick < 60 else f"{tick // 60} min" for tick in ticks])
        axis.minorticks_off()
