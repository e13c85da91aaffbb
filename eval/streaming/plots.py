"""Figures of a result folder, from its results.json and scores alone: PNG to look at, PDF for papers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.results.schema import CheckpointInfo
from eval.stats.estimates import Band, Estimate, band, group_means, smooth
from eval.streaming import table
from eval.streaming.measure import inner_losses, load_scores
from eval.streaming.results import RESETTING, CheckpointResults, Results, read
from ttt_jax.utils.files import write_atomically
from ttt_jax.utils.paths import file_name

# Colours of Okabe and Ito, which people with any kind of colour vision tell apart.
COLOURS = {"persist": "#0072B2", "reset": "#D55E00", "frozen": "#6B6B6B", "off": "#E69F00", "permuted": "#009E73"}
DASHES = {"reset": (4, 2), "permuted": (1, 1)}
"""Arms that may lie on persist: what is under them still shows."""
INNER = {
    "loss_base": ("#6B6B6B", "l(W0)"),
    "loss_before": ("#000000", "l(W before)"),
    "loss_after": ("#CC79A7", "l(W after)"),
}
"""Not the colours of `WITH_MEMORY`: they share a legend."""
CHECKPOINTS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

SMOOTHED = 10
"""Frames of the moving average in Figure 5."""

POINTS = 1500
"""Frames that a curve by frame is drawn at, at most; they are chosen after smoothing."""

TEETH = 30
"""Resets in a figure by frame up to which each is drawn; of more, the moving average goes over the frames between
two."""

BOUNDARIES = 60
"""Boundaries of recordings in a figure by frame up to which they are marked; more would be a block."""

FIGURES, TOGETHER, KINDS = ("memory", "figure5", "state"), "checkpoints", ("png", "pdf")
"""Figures of each checkpoint, the one of several, and the kinds of file."""

WITH_MEMORY = ("persist", "reset", "permuted")
"""Arms whose gain is drawn: under the others the fast weights do nothing."""


def draw_all(folder: Path, results: Results | None = None) -> list[Path]:
    """Draw every figure of a result folder, as PNG and PDF; their paths.

    Args:
      folder: the result folder; results: what to draw; None: its results.json.

    Raises:
      InputError: the folder holds no results of this version, or scores are missing or damaged.
    """
    import matplotlib

    matplotlib.use("Agg")
    results = read(folder) if results is None else results
    several = len(results.checkpoints) > 1
    paths = []
    for own in results.checkpoints:
        end = _end(own.info.name, several)
        paths += save(_losses(results, own), folder, f"memory{end}")
        if own.main in own.inner and own.info.ttt_layers:
            paths += save(_figure5(results, own, folder), folder, f"figure5{end}")
            paths += save(_state(results, own), folder, f"state{end}")
    if several:
        paths += save(_checkpoints(results), folder, TOGETHER)
    return paths


def figures(checkpoints: Sequence[str]) -> list[str]:
    """Names of all files that `draw_all` may write for results of checkpoints of these names."""
    several = len(checkpoints) > 1
    names = [f"{name}{_end(own, several)}" for own in checkpoints for name in FIGURES]
    return [f"{name}.{kind}" for name in [*names, *([TOGETHER] if several else [])] for kind in KINDS]


def _end(name: str, several: bool) -> str:
    """Of the names of a checkpoint's figures."""
    return f"-{file_name(name)}" if several else ""


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write a figure to `folder` in all of `KINDS`, and close it; the paths."""
    from matplotlib import pyplot as plt
    from matplotlib.text import Text

    paths = []
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a $ in a name is a $
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # where things lie is settled once, not for each kind
    for kind in KINDS:
        content = io.BytesIO()
        # Without a date the same results give the same file.
        figure.savefig(content, dpi=120, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
        paths.append(folder / f"{name}.{kind}")
        write_atomically(paths[-1], content.getvalue())
    plt.close(figure)
    return paths


def _losses(results: Results, own: CheckpointResults) -> Any:
    """Loss by position, differences to persist, distance of the predictions to those of off."""
    found = own.by_position
    panels = [
        ("losses", "nats per token", "Loss of the codebooks" + (f" (band: {own.main})" if results.units > 1 else ""))
    ]
    if found["against_persist"]:
        panels.append(("against_persist", "nats per token", "Arm minus persist, paired by file: above 0 memory helps"))
    if found["kl"]:
        panels.append(("kl", "nats per token", "How far predictions lie from those without TTT layers: KL(arm || off)"))
    figure, axes = _panels(results, own.info, len(panels), f"{own.info.name}\n{_weighted(results)}")
    for axis, (name, unit, title) in zip(axes, panels, strict=True):
        for arm, values in found[name].items():
            # Files differ more than arms do: one band shows that, the differences below have their own.
            bare = name == "losses" and arm != own.main
            _curve(axis, results, values, COLOURS.get(arm, "black"), arm, bare, dashes=DASHES.get(arm, ()))
        axis.set_ylabel(unit)
        axis.set_title(title, fontsize=10, loc="left")
    if found["against_persist"]:
        axes[1].axhline(0, color="black", lw=0.8)
    if found["kl"]:
        axes[-1].set_ylim(bottom=0)
    _legend(figure, axes)
    return figure


def _state(results: Results, own: CheckpointResults) -> Any:
    """Displacement and inner rate of each TTT layer by position."""
    found = own.by_position
    title = f"{own.info.name}, fast weights under {own.main}\n{_about(results)}"
    figure, axes = _panels(results, own.info, 2, title)
    from matplotlib import colormaps

    layers = list(found["displacement"][own.main])
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, len(layers)))
    for axis, name in zip(axes, ("displacement", "rate"), strict=True):
        for layer, shade in zip(layers, shades, strict=True):
            _curve(axis, results, found[name][own.main][layer], shade, f"layer {layer}")
        axis.set_ylim(bottom=0)
    axes[0].set_title("How far they have moved from W0", fontsize=10, loc="left")
    axes[0].set_ylabel("norm of W - W0 / norm of W0")
    axes[1].set_title("Inner rate", fontsize=10, loc="left")
    axes[1].set_ylabel("eta")
    _legend(figure, axes)
    return figure


def _checkpoints(results: Results) -> Any:
    """Loss by position of every checkpoint, and the paired difference to the first."""
    first = results.checkpoints[0]
    figure, axes = _panels(results, None, 2, f"{len(results.checkpoints)} checkpoints\n{_weighted(results)}")
    for i, own in enumerate(results.checkpoints):
        colour = CHECKPOINTS[i % len(CHECKPOINTS)]
        label = f"{own.info.name} ({own.main})"
        _curve(axes[0], results, own.by_position["losses"][own.main], colour, label)
        if i:
            _curve(axes[1], results, results.between[own.info.name]["by_position"], colour, label)
    axes[0].set_title("Loss of the codebooks", fontsize=10, loc="left")
    axes[1].set_title(f"Loss minus that of {first.info.name}, paired by file: below 0 better", fontsize=10, loc="left")
    axes[1].axhline(0, color="black", lw=0.8)
    for axis in axes:
        axis.set_ylabel("nats per token")
    _legend(figure, axes)
    return figure


def _about(results: Results, what: str = "") -> str:
    """What one point is a mean of, and what the bands are."""
    first = results.checkpoints[0]
    losses = first.by_position["losses"][first.main]
    count = table.shown(losses, results.units)
    last = losses[count - 1].n if count else results.units
    return f"windows of {results.setting.window} frames{what}; {_over(results, last)}"


def _weighted(results: Results) -> str:
    return _about(results, f", codebooks weighted {results.setting.weighting}")


def _over(results: Results, last: int) -> str:
    """What bands are; `last` units reach the end of the figure."""
    if results.units == 1:
        return f"one {results.unit.removesuffix('s')}, so no band"
    return f"band: 95 % over {results.units} {results.unit}" + (f" ({last} at the end)" if last < results.units else "")


def _panels(results: Results, info: CheckpointInfo | None, count: int, title: str) -> tuple[Any, Sequence[Any]]:
    """A figure of `count` panels over position in frames, with time under the last, and its panels."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        count, 1, figsize=(8, 1.2 + 2.7 * count), sharex=True, squeeze=False, layout="constrained"
    )
    axes = axes[:, 0]
    figure.suptitle(title, fontsize=10)
    end = (
        max(table.shown(own.by_position["losses"][own.main], results.units) for own in results.checkpoints)
        * results.setting.window
    )
    longest = max(file.frames for file in results.files)
    for axis in axes:
        axis.set_xlim(0, max(1, min(end, longest)))
        axis.grid(alpha=0.25)
    _time_below(axes[-1], results)
    _mark_units(axes[0], results)
    _mark_windows(axes, [info.context] if info else sorted({own.info.context for own in results.checkpoints}))
    return figure, axes


def _mark_units(axis: Any, results: Results) -> None:
    """Short ticks where the number of units changes; the number in words where there is room."""
    first = results.checkpoints[0]
    values = first.by_position["losses"][first.main]
    numbers = [value.n for value in values[: table.shown(values, results.units)]]
    free = 0.0
    for i in range(1, len(numbers)):
        if numbers[i] == numbers[i - 1]:
            continue
        x = i * results.setting.window
        axis.axvline(x, 0, 0.04, color="0.5", lw=0.8)
        if x >= free:
            place = {"xytext": (2, 1), "textcoords": "offset points"}
            axis.annotate(
                f"n={numbers[i]}", (x, 0), xycoords=("data", "axes fraction"), color="0.5", fontsize=7, **place
            )
            free = x + 0.05 * axis.get_xlim()[1]


def _time_below(axis: Any, results: Results) -> None:
    """Names the axis of frames and puts one of time under it: seconds, or minutes of a long stream."""
    end = axis.get_xlim()[1] / results.setting.frame_rate
    name, seconds = ("minutes", 60) if end > 300 else ("seconds", 1)
    rate = results.setting.frame_rate * seconds
    axis.set_xlabel("frames")
    axis.secondary_xaxis(-0.26, functions=(lambda x: x / rate, lambda x: x * rate)).set_xlabel(name)


def _mark_windows(axes: Sequence[Any], contexts: Sequence[int]) -> None:
    """Dotted lines where attention begins to forget; their places in words, which also tell of those beyond the
    figure."""
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
    bare: bool = False,
    dashes: tuple[float, ...] = (),
) -> None:
    """Estimates in windows, drawn at the middle of each, with their intervals as a band unless `bare`."""
    count = table.shown(values, results.units)
    ends = np.minimum(np.arange(1, count + 1) * results.setting.window, max(file.frames for file in results.files))
    middles = (np.arange(count) * results.setting.window + ends) / 2
    columns = np.array(values[:count]).T if count else np.zeros((4, 0))
    _band(axis, middles, Band(*columns), colour, label, bare, dashes=dashes, marker="o" if count <= 40 else None)


def _band(axis: Any, x: np.ndarray, found: Band, colour: Any, label: str, bare: bool = False, **style: Any) -> None:
    axis.plot(x, found.mean, color=colour, lw=1.4 if len(x) < 500 else 0.8, markersize=3, label=label, **style)
    if bare:
        return
    lines = axis.dataLim.get_points().copy()
    axis.fill_between(x, found.low, found.high, color=colour, alpha=0.15, lw=0)
    # Over two units an interval is so wide that it would flatten every curve: it does not set the scale.
    firm = found.n > 2
    axis.dataLim.set_points(lines)
    axis.update_datalim(np.concatenate([np.stack([x, edge], -1)[firm] for edge in (found.low, found.high)]))


def _legend(figure: Any, axes: Sequence[Any], columns: int = 5) -> None:
    """One legend below all panels."""
    named = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    handles, labels = list(named.values()), list(named)
    figure.get_layout_engine().set(w_pad=0.15)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False, fontsize=9
    )


def _figure5(results: Results, own: CheckpointResults, folder: Path) -> Any:
    """Inner losses by frame, a panel for each TTT layer, and below it what memory brought."""
    from matplotlib import pyplot as plt

    frames, curves = _by_frame(results, own, folder)
    layers = own.info.ttt_layers
    columns = min(4, len(layers))
    blocks = -(-len(layers) // columns)
    size = (max(8, 3.6 * columns), 1.2 + 4.8 * blocks)
    figure, axes = plt.subplots(2 * blocks, columns, figsize=size, squeeze=False, sharex=True, layout="constrained")
    last = int(curves[own.main, "gain"].n[0, -1])
    title = f"{own.info.name}: inner losses under {own.main}"
    within = any((arm, "gain") in curves and _smoothing(results, arm, frames)[1] for arm in RESETTING)
    about = f"moving average over {SMOOTHED} frames{', not across resets' if within else ''}; {_over(results, last)}"
    figure.suptitle(f"{title}\n{about}", fontsize=10)
    for i in range(blocks * columns):
        pair = axes[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        if i < len(layers):
            _inner_panels(pair, frames, {key: _layer(found, i) for key, found in curves.items()}, results, own.main)
            pair[0].set_title(f"TTT layer {layers[i]}", fontsize=10, loc="left")
            pair[1].set_title("What memory brought: l(W0) - l(W before)", fontsize=9, loc="left")
        else:
            for axis in pair:
                axis.set_visible(False)
    axes[0, 0].set_xlim(0, max(1, frames[-1]))
    for i, axis in enumerate(axes[:, 0]):
        axis.set_ylabel("gain" if i % 2 else "inner loss")
    for axis in axes[-1]:
        _time_below(axis, results)
    boundaries = results.files[0].boundaries if len(results.files) == 1 else ()
    boundaries = boundaries if len(boundaries) <= BOUNDARIES else ()
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        for boundary in boundaries:
            axis.axvline(boundary, color="#8C6D46", lw=0.7, alpha=0.4, label="another recording begins")
        if own.info.context < frames[-1]:
            axis.axvline(own.info.context, color="black", lw=0.9, ls=":", label="attention window")
    _legend(figure, axes[:2, 0], columns=4)
    return figure


def _inner_panels(
    pair: Sequence[Any], frames: np.ndarray, curves: dict[tuple[str, str], Band], results: Results, main: str
) -> None:
    for name, (colour, label) in INNER.items():
        _band(pair[0], frames, curves[main, name], colour, label)
    for arm in WITH_MEMORY:
        if (arm, "gain") in curves:
            size, _ = _smoothing(results, arm, frames)
            note = f" (average over {size})" if size != SMOOTHED else ""
            _band(pair[1], frames, curves[arm, "gain"], COLOURS[arm], f"gain under {arm}{note}")
    pair[1].axhline(0, color="black", lw=0.8)


def _smoothing(results: Results, arm: str, frames: np.ndarray) -> tuple[int, int | None]:
    """Frames of the moving average, and those of the periods that it stays within.

    More teeth of a saw than `TEETH` would be drawn as a block, so their mean is.
    """
    resets = results.setting.reset_every
    if arm not in RESETTING:
        return SMOOTHED, None
    return (resets, None) if frames[-1] > TEETH * resets else (SMOOTHED, resets)


def _layer(found: Band, i: int) -> Band:
    return Band(*(field[i] for field in found))


def _by_frame(results: Results, own: CheckpointResults, folder: Path) -> tuple[np.ndarray, dict[tuple[str, str], Band]]:
    """Smoothed inner losses over P frames that more than half of the units reach.

    Returns:
      The frames, int [P], and bands [L, P] by arm and quantity: the three losses of the main arm, the gain of each.
    """
    groups = [file.group for file in results.files]
    reach = sorted((max(f.frames for f in results.files if f.group == group) for group in set(groups)), reverse=True)
    frames = np.unique(np.linspace(0, reach[len(reach) // 2] - 1, POINTS).round().astype(int))
    curves: dict[tuple[str, str], list[np.ndarray]] = {}
    for file in results.files:  # one at a time; what stays of each is what is drawn
        scores = load_scores(folder, own.info, file, results.setting)
        for arm in dict.fromkeys([own.main, *WITH_MEMORY]):
            if arm not in scores.arms or scores.arms[arm].inner is None:
                continue
            for name, values in inner_losses(scores.arms[arm].inner).items():
                if name == "gain" or (arm == own.main and name in INNER):
                    drawn = np.full((len(values), len(frames)), np.nan)
                    there = frames < file.frames
                    drawn[:, there] = smooth(values, *_smoothing(results, arm, frames))[:, frames[there]]
                    curves.setdefault((arm, name), []).append(drawn)
    return frames, {key: band(group_means(np.stack(files), groups)) for key, files in curves.items()}
