"""The figure of `python -m eval diagnose`. Imports no jax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eval.diagnose.records import FIGURES, Record, Results
from eval.results.figures import KINDS, pyplot, save

NAME = "diagnose"
FILES = tuple(f"{NAME}.{kind}" for kind in KINDS)
NOT_DRAWN = ("ttt_mean", "ttt_std", "displacement", "base", "loss_base", "loss_after")
PANELS = {name: title for name, title in FIGURES.items() if name not in NOT_DRAWN}
PANELS["memory"] = "inner loss: base minus before"
COLUMNS = 3
STYLES = ("-", "--")
COLOURS = ("#1b6ca8", "#d1495b", "#edae49", "#4c956c", "#7d5ba6", "#7d8597")


def write_figures(results: Results, folder: Path) -> list[Path]:
    """Draws the records over time as diagnose.png and diagnose.pdf; returns the paths."""
    return save(draw(results), folder, NAME)


def draw(results: Results) -> Any:
    """Returns a figure with a panel for each of `PANELS`, a colour for each layer, a line style for each checkpoint."""
    plt = pyplot()
    rows, records = -(-len(PANELS) // COLUMNS), results.records
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(12, 2.3 * rows + 0.9), sharex=True, layout="constrained")
    layers, checkpoints = sorted({record["layer"] for record in records}), [info.name for info in results.checkpoints]
    colours = COLOURS if len(layers) <= len(COLOURS) else plt.get_cmap("viridis")(np.linspace(0, 0.95, len(layers)))
    curves = {
        (layer, checkpoint): [r for r in records if (r["layer"], r["checkpoint"]) == (layer, checkpoint)]
        for layer in layers
        for checkpoint in checkpoints
    }
    lines = {}
    for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
        for (layer, checkpoint), curve in curves.items():
            if curve:
                label = f"{checkpoint}, layer {layer}"
                (lines[label],) = axis.plot(
                    [record["seconds"] for record in curve],
                    [_value(record, name) for record in curve],
                    color=colours[layers.index(layer)],
                    ls=STYLES[checkpoints.index(checkpoint)],
                    marker="o" if len(curve) < 40 else None,
                    markersize=3,
                    lw=1.4,
                )
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.margins(y=0.12)
        bottom, top = axis.get_ylim()
        if not name.startswith("cosine") and bottom > 0:  # sizes start at 0, so that small changes look small
            axis.set_ylim(0, max(top, 1.05 * axis.dataLim.ymax))
    for axis in axes[-1]:
        axis.set_xlabel("seconds of speech", fontsize=9)
    columns = max(1, min(len(layers), 4, 160 // (8 + max(map(len, lines)))))  # a column a layer where they fit
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    return figure


def _value(record: Record, name: str) -> float:
    """Returns the value to draw; NaN, a gap, where it is undefined."""
    if name == "memory":
        parts = record["loss_base"], record["loss_before"]
        return np.nan if None in parts else parts[0] - parts[1]
    return np.nan if record[name] is None else record[name]
