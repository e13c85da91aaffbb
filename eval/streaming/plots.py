"""Figures of a result folder, from its results.json and scores alone: PNG to look at, PDF for papers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.results.figures import CHECKPOINTS, COLOURS, DASHES, KINDS, legend, pyplot, save, time_axis
from eval.stats.estimates import Band, Estimate, band, group_means, smooth
from eval.streaming import table
from eval.streaming.measure import inner_losses, load_scores
from eval.streaming.results import RESETTING, CheckpointResults, Results, read
from ttt_jax.utils.paths import file_name

FIGURES, TOGETHER = ("memory", "figure5", "state"), "checkpoints"
"""Figures of each checkpoint, and the one of several."""

# Figure 5

INNER = {
    "loss_base": ("#6B6B6B", "l(W0)"),
    "loss_before": ("#000000", "l(W before)"),
    "loss_after": ("#CC79A7", "l(W after)"),
}
"""Not the colours of `WITH_MEMORY`: they share a legend."""
WITH_MEMORY = ("persist", "reset", "permuted")
"""Arms whose gain is drawn: under the others the fast weights do nothing."""
SMOOTHED, POINTS = 10, 1500
"""Frames of the moving average; frames at which a curve is drawn at most, chosen after smoothing."""
TEETH, BOUNDARIES = 30, 60
"""Resets, and boundaries of recordings, up to which each is drawn: more would be a block of colour."""


def draw_all(folder: Path, results: Results | None = None) -> list[Path]:
    """Draws every figure of a result folder, by default from its results.json; returns the paths.

    Raises `InputError` if the folder holds no results of this version, or scores are missing or damaged.
    """
    results = read(folder) if results is None else results
    several, paths = len(results.checkpoints) > 1, []
    for checkpoint in results.checkpoints:
        end = _end(checkpoint.info.name, several)
        paths += save(_losses(results, checkpoint), folder, f"memory{end}")
        if checkpoint.inner:
            paths += save(_figure5(results, checkpoint, folder), folder, f"figure5{end}")
            paths += save(_state(results, checkpoint), folder, f"state{end}")
    return paths + (save(_checkpoints(results), folder, TOGETHER) if several else [])


def figures(checkpoints: Sequence[str]) -> list[str]:
    """Returns names of all files that `draw_all` may write for results of checkpoints of these names."""
    several = len(checkpoints) > 1
    names = [f"{name}{_end(checkpoint, several)}" for checkpoint in checkpoints for name in FIGURES]
    return [f"{name}.{kind}" for name in [*names, *([TOGETHER] if several else [])] for kind in KINDS]


def _end(checkpoint: str, several: bool) -> str:
    return f"-{file_name(checkpoint)}" if several else ""


# By position


def _losses(results: Results, checkpoint: CheckpointResults) -> Any:
    """Loss by position, differences to persist, distance of the predictions to those of off."""
    by_position = checkpoint.by_position
    titles = {
        "losses": "Loss of the codebooks" + (f" (band: {checkpoint.main})" if results.units > 1 else ""),
        "against_persist": "Arm minus persist, paired by file: above 0 memory helps",
        "kl": "How far predictions lie from those without TTT layers: KL(arm || off)",
    }
    titles = {name: title for name, title in titles.items() if by_position[name]}
    panels = dict.fromkeys(titles.values(), "nats per token")
    figure, axes = _panels(results, [checkpoint], panels, f"{checkpoint.info.name}\n{_weighted(results)}")
    for axis, name in zip(axes, titles, strict=True):
        for arm, values in by_position[name].items():
            # Files differ more than arms do: one band shows that, the differences below have their own.
            banded = name != "losses" or arm == checkpoint.main
            _curve(axis, results, values, COLOURS[arm], arm, banded, dashes=DASHES.get(arm, ()))
        if name == "against_persist":
            axis.axhline(0, color="black", lw=0.8)
        if name == "kl":
            axis.set_ylim(bottom=0)
    legend(figure, axes, 5)
    return figure


def _state(results: Results, checkpoint: CheckpointResults) -> Any:
    """Displacement and inner rate of each TTT layer by position."""
    title = f"{checkpoint.info.name}, fast weights under {checkpoint.main}\n{_windows(results)}"
    panels = {"How far they have moved from W0": "norm of W - W0 / norm of W0", "Inner rate": "eta"}
    figure, axes = _panels(results, [checkpoint], panels, title)
    for axis, name in zip(axes, ("displacement", "rate"), strict=True):
        by_layer = checkpoint.by_position[name][checkpoint.main]
        shades = pyplot().get_cmap("viridis")(np.linspace(0.0, 0.85, len(by_layer)))
        for (layer, values), shade in zip(by_layer.items(), shades, strict=True):
            _curve(axis, results, values, shade, f"layer {layer}")
        axis.set_ylim(bottom=0)
    legend(figure, axes, 5)
    return figure


def _checkpoints(results: Results) -> Any:
    """Loss by position of every checkpoint, and the paired difference to the first."""
    first, *_ = checkpoints = results.checkpoints
    difference = f"Loss minus that of {first.info.name}, paired by file: below 0 better"
    panels = dict.fromkeys(("Loss of the codebooks", difference), "nats per token")
    figure, axes = _panels(results, checkpoints, panels, f"{len(checkpoints)} checkpoints\n{_weighted(results)}")
    for i, checkpoint in enumerate(checkpoints):
        style = CHECKPOINTS[i % len(CHECKPOINTS)], f"{checkpoint.info.name} ({checkpoint.main})"
        _curve(axes[0], results, _main_losses(checkpoint), *style)
        if i:
            _curve(axes[1], results, results.between[checkpoint.info.name]["by_position"], *style)
    axes[1].axhline(0, color="black", lw=0.8)
    legend(figure, axes, 5)
    return figure


def _main_losses(checkpoint: CheckpointResults) -> list[Estimate]:
    return checkpoint.by_position["losses"][checkpoint.main]


def _weighted(results: Results) -> str:
    return _windows(results, f", codebooks weighted {results.setting.weighting}")


def _windows(results: Results, note: str = "") -> str:
    """Returns in words what a point is a mean of, and what the bands are."""
    losses = _main_losses(results.checkpoints[0])
    count = table.shown(losses, results.units)
    return (
        f"windows of {results.setting.window} frames{note};"
        f" {_bands(results, losses[count - 1].n if count else results.units)}"
    )


def _bands(results: Results, last: int) -> str:
    """Returns in words what bands are; `last` units reach the end of the figure."""
    if results.units == 1:
        return f"one {results.unit.removesuffix('s')}, so no band"
    return f"band: 95 % over {results.units} {results.unit}" + (f" ({last} at the end)" if last < results.units else "")


def _panels(
    results: Results, checkpoints: Sequence[CheckpointResults], panels: dict[str, str], title: str
) -> tuple[Any, Sequence[Any]]:
    """Returns a figure over position in frames, with time under the last panel, and its panels.

    Args:
      checkpoints: those whose attention windows are marked; panels: label of the vertical axis by title.
    """
    count, window = len(panels), results.setting.window
    size = (8, 1.2 + 2.7 * count)
    figure, axes = pyplot().subplots(count, 1, figsize=size, sharex=True, squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=10)
    figure.get_layout_engine().set(w_pad=0.15)
    axes = axes[:, 0]
    shown = max(table.shown(_main_losses(checkpoint), results.units) for checkpoint in results.checkpoints)
    longest = max(file.frames for file in results.files)
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_ylabel(label)
        axis.set_xlim(0, max(1, min(shown * window, longest)))
        axis.grid(alpha=0.25)
    time_axis(axes[-1], 0.26)
    _mark_attention(axes, sorted({checkpoint.info.context for checkpoint in checkpoints}))
    return figure, axes


def _mark_attention(axes: Sequence[Any], contexts: Sequence[int]) -> None:
    """Draws dotted lines where attention begins to forget; words name all, also those beyond the figure."""
    end = axes[0].get_xlim()[1]
    for axis in axes:
        for context in contexts:
            if context < end:
                axis.axvline(context, color="black", lw=0.9, ls=":")
    words = " and ".join(f"{context:,} frames" + ("" if context < end else " (not reached)") for context in contexts)
    axes[0].set_title(f"attention window (dotted): {words}", fontsize=8, loc="right")


def _curve(
    axis: Any,
    results: Results,
    values: list[Estimate],
    colour: Any,
    label: str,
    banded: bool = True,
    dashes: tuple[float, ...] = (),
) -> None:
    """Draws estimates at the middle of each window, with their intervals as a band."""
    count, window = table.shown(values, results.units), results.setting.window
    starts = np.arange(count) * window
    middles = (starts + np.minimum(starts + window, max(file.frames for file in results.files))) / 2
    estimates = Band(*(np.array(values[:count]).T if count else np.zeros((4, 0))))
    marker = "o" if count <= 40 else None
    _band(axis, middles, estimates, colour, label, banded, dashes=dashes, marker=marker)


def _band(axis: Any, x: np.ndarray, values: Band, colour: Any, label: str, banded: bool = True, **style: Any) -> None:
    axis.plot(x, values.mean, color=colour, lw=1.4 if len(x) < 500 else 0.8, markersize=3, label=label, **style)
    if banded:
        lines = axis.dataLim.get_points().copy()
        axis.fill_between(x, values.low, values.high, color=colour, alpha=0.15, lw=0)
        # Over two units an interval is so wide that it would flatten every curve: it does not set the scale.
        firm = values.n > 2
        axis.dataLim.set_points(lines)
        axis.update_datalim(np.concatenate([np.stack([x, edge], -1)[firm] for edge in (values.low, values.high)]))


# By frame


def _figure5(results: Results, checkpoint: CheckpointResults, folder: Path) -> Any:
    """Inner losses by frame, a panel for each TTT layer, and below it what memory brought."""
    frames, curves = by_frame(results, checkpoint, folder)
    layers, main = checkpoint.info.ttt_layers, checkpoint.main
    columns = min(4, len(layers))
    blocks = -(-len(layers) // columns)
    size = (max(8, 3.6 * columns), 1.2 + 4.8 * blocks)
    figure, axes = pyplot().subplots(
        2 * blocks, columns, figsize=size, squeeze=False, sharex=True, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.15)
    within = any((arm, "gain") in curves and smoothing(results, arm, frames)[1] for arm in RESETTING)
    bands = _bands(results, int(curves[main, "gain"].n[0, -1]))
    average = f"moving average over {SMOOTHED} frames{', not across resets' if within else ''}"
    figure.suptitle(f"{checkpoint.info.name}: inner losses under {main}\n{average}; {bands}", fontsize=10)
    pairs = axes.reshape(blocks, 2, columns).swapaxes(1, 2).reshape(-1, 2)
    for losses, gains in pairs[len(layers) :]:
        losses.set_visible(False)
        gains.set_visible(False)
    for i, (losses, gains) in enumerate(pairs[: len(layers)]):
        of_layer = {key: Band(*(field[i] for field in values)) for key, values in curves.items()}
        for name, (colour, label) in INNER.items():
            _band(losses, frames, of_layer[main, name], colour, label)
        for arm in WITH_MEMORY:
            if (arm, "gain") in of_layer:
                average = smoothing(results, arm, frames)[0]
                note = f" (average over {average})" if average != SMOOTHED else ""
                _band(gains, frames, of_layer[arm, "gain"], COLOURS[arm], f"gain under {arm}{note}")
        gains.axhline(0, color="black", lw=0.8)
        losses.set_title(f"TTT layer {layers[i]}", fontsize=10, loc="left")
        gains.set_title("What memory brought: l(W0) - l(W before)", fontsize=9, loc="left")
    axes[0, 0].set_xlim(0, max(1, frames[-1]))
    for i, axis in enumerate(axes[:, 0]):
        axis.set_ylabel("gain" if i % 2 else "inner loss")
    for axis in axes[-1]:
        time_axis(axis, 0.26)
    boundaries = results.files[0].boundaries if len(results.files) == 1 else ()
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        for boundary in boundaries if len(boundaries) <= BOUNDARIES else ():
            axis.axvline(boundary, color="#8C6D46", lw=0.7, alpha=0.4, label="another recording begins")
        if checkpoint.info.context < frames[-1]:
            axis.axvline(checkpoint.info.context, color="black", lw=0.9, ls=":", label="attention window")
    legend(figure, axes[:2, 0], 4)
    return figure


def smoothing(results: Results, arm: str, frames: np.ndarray) -> tuple[int, int | None]:
    """Returns frames of the moving average, and those of the periods that it stays within.

    With more than `TEETH` resets, it goes over the frames between two.
    """
    resets = results.setting.reset_every
    if arm not in RESETTING:
        return SMOOTHED, None
    return (resets, None) if frames[-1] > TEETH * resets else (SMOOTHED, resets)


def by_frame(
    results: Results, checkpoint: CheckpointResults, folder: Path, points: int = POINTS
) -> tuple[np.ndarray, dict[tuple[str, str], Band]]:
    """Smooths inner losses over P frames, at most `points`, that more than half of the units reach.

    Returns:
      The frames, int [P], and bands [L, P] by arm and quantity: the three losses of the main arm, the gain of each.
    """
    groups = [file.group for file in results.files]
    reach = sorted((max(f.frames for f in results.files if f.group == group) for group in set(groups)), reverse=True)
    frames = np.unique(np.linspace(0, reach[len(reach) // 2] - 1, points).round().astype(int))
    curves: dict[tuple[str, str], list[np.ndarray]] = {}
    for file in results.files:  # one at a time; what stays of each is what is drawn
        arms = load_scores(folder, checkpoint.info, file, results.setting).arms
        for arm in dict.fromkeys([checkpoint.main, *WITH_MEMORY]):
            if arm not in arms or arms[arm].inner is None:
                continue
            for name, values in inner_losses(arms[arm].inner).items():
                if name == "gain" or arm == checkpoint.main:
                    drawn = np.full((len(values), len(frames)), np.nan)
                    inside = frames < file.frames
                    drawn[:, inside] = smooth(values, *smoothing(results, arm, frames))[:, frames[inside]]
                    curves.setdefault((arm, name), []).append(drawn)
    return frames, {key: band(group_means(np.stack(values), groups)) for key, values in curves.items()}
