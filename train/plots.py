"""metrics.jsonl as pictures: the figure of a run, and runs side by side. Imports no jax."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.config import FRAME_RATE
from ttt_jax.utils.files import write_atomically

Line = dict[str, Any]

SMOOTHED = 10
"""Lines that a moving average covers, or a hundredth of all lines if that is more."""
NAMED = 8
"""TTT layers that a legend names at most."""

# Colours of Okabe and Ito, which people with any kind of colour vision tell apart.
RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GROUPS = {"base": "#0072B2", "attention": "#56B4E9", "lora": "#009E73", "ttt": "#D55E00", "gate": "#E69F00"}
TEXT, TOTAL, OTHER = "#D55E00", "#000000", "#6B6B6B"
INNER = {
    "loss_base": (OTHER, "l(W0)"),
    "loss_before": ("#000000", "l(W before)"),
    "loss_after": ("#CC79A7", "l(W after)"),
}
"""As in the figures of `eval.streaming.plots`."""


class Run(NamedTuple):
    """A run to be compared."""

    name: str
    lines: Sequence[Line]
    """Of metrics.jsonl, in order; at least one of a training step."""
    hours: float | None
    """Hours of speech that a step reads, all rows together; None: not known."""


def draw_run(
    lines: Sequence[Line], baseline: dict[str, float] | None, folder: Path, out: Path | None = None
) -> list[Path]:
    """Draws a run over its steps and returns the paths of a PNG and a PDF; none before the first training step.

    Args:
        lines: lines of metrics.jsonl, in order.
        baseline: nats of the unigram model by stream, drawn dashed in the stream's colour; None: not known.
        folder: folder of the run, which gives the figure its name.
        out: path of the PNG; None: loss.png in `folder`.
    """
    training, validation = _split(lines)
    if not training:
        return []
    plt = _pyplot()
    layers, measured = _names(training, "ttt"), _names(validation, "validation", "ttt")
    figure = plt.figure(figsize=(15, 11 if layers else 7.6), layout="constrained")
    figure.suptitle(_summary(folder.resolve().name, training, validation), fontsize=11)
    rows = list(figure.subfigures(3 if layers else 2, 1, height_ratios=(1.25, 1, 1) if layers else (1.25, 1)))
    streams, minimised = rows[0].subplots(1, 2, width_ratios=(1.6, 1))
    _draw_streams(streams, training, validation, baseline or {})
    _draw_minimised(minimised, training, validation)
    if layers:
        gates, displacements, *inner = rows[1].subplots(1, 3 if measured else 2)
        _draw_layers(gates, training, layers, "gate_abs", "Gates: mean |tanh alpha|")
        _draw_layers(displacements, training, layers, "displacement_ratio", "Norm of displacement / norm of W0")
        for axis in inner:
            _draw_inner(axis, validation, measured)
    norms, rates, speed = rows[-1].subplots(1, 3)
    _draw_norms(norms, training)
    _draw_rates(rates, training)
    _draw_speed(speed, training)
    for axis in figure.axes:
        _steps_below(axis, training[-1]["step"])
        axis.grid(alpha=0.25)
    return _save(figure, folder / "loss.png" if out is None else out)


def draw_runs(runs: Sequence[Run], out: Path) -> list[Path]:
    """Draws minimised and validation losses of runs over steps and hours of speech; returns paths as `draw_run`."""
    plt = _pyplot()
    parts = [(run, *_split(run.lines)) for run in runs]
    validated = any(validation for _, _, validation in parts)
    timed = any(run.hours is not None for run in runs)
    rows, columns = 1 + validated, 1 + timed
    size = (6.5 * columns, 3.6 * rows + 0.8)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, sharex="col", sharey="row", layout="constrained"
    )
    for i, (run, training, validation) in enumerate(parts):
        style = {"color": RUNS[i % len(RUNS)], "ls": ("-", "--", ":")[i // len(RUNS) % 3]}
        for column, scale in enumerate([1, run.hours][:columns]):
            if scale is None:
                continue
            steps, losses = _series(training, "step") * scale, _series(training, "loss")
            _draw_smooth(axes[0, column], steps, losses, lw=1.6, label=run.name, **style)
            if validation:
                x, y = _series(validation, "step") * scale, _series(validation, "validation", "loss")
                axes[1, column].plot(x, y, lw=1.4, marker="o", markersize=3.5, **style)
    axes[0, 0].set_title("Minimised loss (moving average)", fontsize=10, loc="left")
    axes[-1, 0].set_xlabel("step")
    if validated:
        axes[1, 0].set_title("Loss on the validation files", fontsize=10, loc="left")
    if timed:
        axes[-1, 1].set_xlabel("hours of speech: steps x rows x frames")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    for axis in axes[:, 0]:
        axis.set_ylabel("nats per token")
    names = axes[0, 0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=min(len(runs), 3), frameon=False, fontsize=9)
    return _save(figure, out)


def _draw_streams(axis: Any, training: Sequence[Line], validation: Sequence[Line], baseline: dict[str, float]) -> None:
    steps, at = _series(training, "step"), _series(validation, "step")
    names = _names(training, "streams")
    for name, colour in zip(names, _stream_colours(names), strict=True):
        values = _series(training, "streams", name)
        if not np.isfinite(values).any():
            continue  # speech without transcripts
        _draw_smooth(axis, steps, values, color=colour, lw=1.3, label=name)
        axis.plot(at, _series(validation, "validation", "streams", name), "o:", color=colour, markersize=3.5, lw=0.7)
        if np.isfinite(level := _number(baseline.get(name))):
            axis.axhline(level, color=colour, ls="--", lw=0.8)
    notes = [f"mean of {_span(steps)} lines" if len(training) > 1 else "one line"]
    notes += ["dots: validation"] * bool(validation) + ["dashed: unigram model of the training data"] * bool(baseline)
    axis.set_title(f"Loss by stream ({'; '.join(notes)})", fontsize=10, loc="left")
    axis.set_ylabel("nats per token")
    _legend_beside(axis)


def _draw_minimised(axis: Any, training: Sequence[Line], validation: Sequence[Line]) -> None:
    steps, values = _series(training, "step"), _series(training, "loss")
    axis.plot(steps, values, color=TOTAL, lw=0.6, alpha=0.3)
    _draw_smooth(axis, steps, values, color=TOTAL, lw=1.6)
    at, losses = _series(validation, "step"), _series(validation, "validation", "loss")
    axis.plot(at, losses, "o-", color=RUNS[0], markersize=4, lw=1.2)
    note = "; blue: validation" if validation else ""
    axis.set_title(f"Minimised loss (light: line by line{note})", fontsize=10, loc="left")


def _draw_layers(axis: Any, training: Sequence[Line], layers: Sequence[str], name: str, title: str) -> None:
    steps, named = _series(training, "step"), layers[:: -(-len(layers) // NAMED)]
    for layer, colour in zip(layers, _shades(len(layers)), strict=True):
        label = f"layer {layer}" if layer in named else None
        _draw_smooth(axis, steps, _series(training, "ttt", layer, name), color=colour, lw=1.2, label=label)
    axis.set_title(title, fontsize=10, loc="left")
    _legend_beside(axis)


def _draw_inner(axis: Any, validation: Sequence[Line], layers: Sequence[str]) -> None:
    steps = _series(validation, "step")
    for name, (colour, label) in INNER.items():
        values = [_series(validation, "validation", "ttt", layer, name) for layer in layers]
        axis.plot(steps, np.mean(values, 0), "o-", color=colour, markersize=3.5, lw=1.2, label=label)
    _log_above(axis)
    over = f"mean of {len(layers)} layers" if len(layers) > 1 else f"layer {layers[0]}"
    axis.set_title(f"Inner losses in validation ({over})", fontsize=10, loc="left")
    _legend_beside(axis)


def _draw_norms(axis: Any, training: Sequence[Line]) -> None:
    steps, total = _series(training, "step"), _series(training, "grad_norm")
    axis.plot(steps, total, color=TOTAL, lw=0.6, alpha=0.3)
    curves = {name: _series(training, "grad_norms", name) for name in _names(training, "grad_norms")}
    for name, values in {"all": total, **curves}.items():
        colour = TOTAL if name == "all" else GROUPS.get(name, OTHER)
        with np.errstate(divide="ignore"):
            _draw_smooth(axis, steps, np.log(values), np.exp, color=colour, lw=1.3, label=name)
    _log_above(axis)
    axis.set_title("Norm of the gradient before clipping, by group", fontsize=10, loc="left")
    _legend_beside(axis)


def _draw_rates(axis: Any, training: Sequence[Line]) -> None:
    for i, name in enumerate(_names(training, "lr")):
        x, y = _series(training, "step"), _series(training, "lr", name)
        dashes = ("-", (0, (5, 4)), (0, (2, 3)))[i % 3]  # groups often share a rate: the one beneath shows
        axis.plot(x, y, color=GROUPS.get(name, OTHER), lw=1.5, ls=dashes, label=name, marker=_marker(x))
    _log_above(axis)
    axis.set_title("Learning rate by group", fontsize=10, loc="left")
    _legend_beside(axis)


def _draw_speed(axis: Any, training: Sequence[Line]) -> None:
    values = _series(training, "frames_per_second")
    axis.plot(_series(training, "step"), values, color=RUNS[0], lw=1, marker=_marker(values), markersize=4)
    axis.set_ylim(0, 1.1 * max(np.nanmax(values, initial=0), 1e-9))
    axis.set_title(f"Frames per second (median {np.nanmedian(values):,.0f})", fontsize=10, loc="left")
    real_time = axis.secondary_yaxis("right", functions=(lambda y: y / FRAME_RATE, lambda y: y * FRAME_RATE))
    real_time.set_ylabel("times real time")


def _summary(name: str, training: Sequence[Line], validation: Sequence[Line]) -> str:
    last = training[-1]
    minutes = last["seconds"] / 60
    notes = [f"step {last['step']:,}", f"{minutes / 60:.1f} hours" if minutes >= 100 else f"{minutes:.1f} minutes"]
    values = _series(training, "loss")
    notes.append(f"loss {_smooth(values, _span(values))[-1]:.3f}")
    losses = _series(validation, "validation", "loss")
    if np.isfinite(losses).any():
        best = int(np.nanargmin(losses))
        notes.append(f"validation {losses[-1]:.3f} (best {losses[best]:.3f} at step {validation[best]['step']:,})")
    if last.get("skipped"):
        notes.append(f"{last['skipped']} steps skipped as not finite")
    return f"{name}: {', '.join(notes)}"


def _split(lines: Sequence[Line]) -> tuple[list[Line], list[Line]]:
    """Returns (lines of training steps, lines of validations)."""
    return [line for line in lines if "validation" not in line], [line for line in lines if "validation" in line]


def _series(lines: Sequence[Line], *keys: str) -> np.ndarray:
    """The number at the path `keys` in every line, float [lines]; NaN where there is none."""
    values = []
    for line in lines:
        value: Any = line
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        values.append(_number(value))
    return np.array(values, float)


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _names(lines: Sequence[Line], *keys: str) -> list[str]:
    """The keys at the path `keys` in the last line; all lines of a run have the same."""
    value: Any = lines[-1] if lines else {}
    for key in keys:
        value = value.get(key, {})
    return list(value)


def _draw_smooth(axis: Any, x: np.ndarray, y: np.ndarray, scale: Any = lambda y: y, **style: Any) -> None:
    """Draws the moving average of `y`, through `scale`."""
    axis.plot(x, scale(_smooth(y, _span(y))), marker=_marker(x), markersize=4, **style)


def _span(values: np.ndarray) -> int:
    return max(SMOOTHED, len(values) // 100)


def _smooth(values: np.ndarray, span: int) -> np.ndarray:
    """The mean of each value and its neighbours, `span` in all, without those that are not finite; NaN where none is.

    At the steep start a value has as many neighbours before it as after it; at the end it has those that there are.
    """
    known, at = np.isfinite(values), np.arange(len(values))
    reach = np.minimum(at, span // 2)

    def sums(x: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0], np.cumsum(x)])
        return total[np.minimum(at + reach + 1, len(x))] - total[at - reach]

    counts = sums(known)
    return np.where(counts > 0, sums(np.where(known, values, 0.0)) / np.maximum(counts, 1), np.nan)


def _marker(x: np.ndarray) -> str | None:
    """A marker for curves of few points: a line needs two to show."""
    return "o" if len(x) < 5 else None


def _shades(count: int) -> list[Any]:
    """`count` colours from dark to light, all visible on white."""
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, 0.88, count)))


def _stream_colours(names: Sequence[str]) -> list[Any]:
    """A colour for each stream: the text stands out, codebooks go from dark to light."""
    shades = iter(_shades(sum(name != "text" for name in names)))
    return [TEXT if name == "text" else next(shades) for name in names]


def _log_above(axis: Any) -> None:
    """Sets a logarithmic scale with plain numbers, with ticks at 1, 2 and 5 if it spans less than two powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axis.get_lines()] or [np.empty(0)])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 100 * values.min() else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _steps_below(axis: Any, last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlim(0, last * 1.02)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_xlabel("step")


def _legend_beside(axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        axis.legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> list[Path]:
    from matplotlib import pyplot as plt

    for text in (*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())):
        text.set_parse_math(False)  # a $ in the name of a run is a $
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # where things lie is settled once, not for each kind
    paths = [path, path.with_suffix(".pdf")]
    for kind, written in zip(("png", "pdf"), paths, strict=True):
        content = io.BytesIO()
        # Without a date the same metrics give the same file.
        figure.savefig(content, dpi=110, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
        write_atomically(written, content.getvalue())
    plt.close(figure)
    return paths
