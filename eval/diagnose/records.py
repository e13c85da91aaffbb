"""Records of `python -m eval diagnose` as text, as a file and as figures. Imports no jax."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.streaming.plots import KINDS, save
from ttt_jax.errors import InputError
from ttt_jax.utils.files import write_atomically
from ttt_jax.utils.jsonl import read_lines

RECORDS, FIGURE = "records.jsonl", "diagnose"
DRAWN = tuple(f"{FIGURE}.{kind}" for kind in KINDS)
"""All that is drawn."""

FIGURES = {
    "stream_norm": "norm of the stream after attention, which the TTT layer reads",
    "ttt_norm": "norm of the TTT output before the gate",
    "gated_norm": "norm of the gated TTT output, tanh(alpha) * TTT, which is added",
    "combined_norm": "norm of stream + gated TTT",
    "ttt_to_stream": "TTT norm / stream norm",
    "gated_to_stream": "gated norm / stream norm",
    "gated_share_percent": "100 * gated norm / (gated norm + stream norm)",
    "gate_mean": "tanh(alpha), mean over channels",
    "gate_mean_abs": "its mean size",
    "gate_std": "its spread (standard deviation)",
    "gate_min": "its lowest",
    "gate_max": "its highest",
    "gate_open_percent": "channels whose |tanh(alpha)| exceeds 0.01",
    "cosine_stream_ttt": "cosine of stream and TTT output",
    "cosine_stream_combined": "cosine of stream and combined",
    "cosine_ttt_combined": "cosine of TTT output and combined",
    "stream_mean": "stream after attention, mean over channels",
    "stream_std": "its standard deviation",
    "stream_near_zero_percent": "channels of it below 0.01 in size",
    "ttt_mean": "TTT output, mean over channels",
    "ttt_std": "its standard deviation",
    "ttt_near_zero_percent": "channels of it below 0.01 in size",
    "combined_mean": "combined, mean over channels",
    "combined_std": "its standard deviation",
    "combined_near_zero_percent": "channels of it below 0.01 in size",
    "stream_change": "norm of the difference from the record before",
    "stream_change_relative": "the same, over the norm now",
    "ttt_change": "norm of the difference from the record before",
    "ttt_change_relative": "the same, over the norm now",
    "displacement": "norm of fast weights minus base, mean over heads",
    "displacement_largest_head": "of the head with the largest",
    "base": "norm of the base, mean over heads",
    "base_largest_head": "of the head with the largest",
    "displacement_to_base": "displacement / base, mean over heads",
    "displacement_to_base_largest_head": "of the head with the largest",
    "loss_base": "inner loss at the base W0, mean over heads",
    "loss_before": "inner loss before the frame's own step",
    "loss_after": "inner loss after it",
    "inner_rate": "inner rate, mean over heads",
}
"""What every record holds, in the order of tables."""

Record = dict[str, Any]


def block(record: Record) -> str:
    """A record for a terminal."""

    def n(name: str, form: str = ".4g") -> str:
        return _number(record[name], form)

    lines = [
        f"layer {record['layer']}, frame {record['frame']} ({record['seconds']:.1f} s)",
        f"  magnitude      stream {n('stream_norm')}, TTT {n('ttt_norm')}, gated TTT {n('gated_norm')},"
        f" combined {n('combined_norm')}",
        f"                 TTT / stream {n('ttt_to_stream')}, gated / stream {n('gated_to_stream')}",
        f"  gate           mean {n('gate_mean', '+.4f')}, mean size {n('gate_mean_abs', '.4f')}, spread {n('gate_std', '.4f')},"
        f" range [{n('gate_min', '+.4f')}, {n('gate_max', '+.4f')}]",
        f"                 open channels {n('gate_open_percent', '.1f')} %, gated share {n('gated_share_percent', '.1f')} %",
        f"  cosine         stream-TTT {n('cosine_stream_ttt', '+.4f')}, stream-combined"
        f" {n('cosine_stream_combined', '+.4f')}, TTT-combined {n('cosine_ttt_combined', '+.4f')}",
    ]
    title = "  distribution   "
    for name, label in (("stream", "stream"), ("ttt", "TTT"), ("combined", "combined")):
        lines.append(
            f"{title}{label + ':':<11}mean {n(f'{name}_mean', '+.4f')}, std {n(f'{name}_std', '.4f')}, near zero"
            f" {n(f'{name}_near_zero_percent', '.1f')} %"
        )
        title = " " * len(title)
    return "\n".join(
        [
            *lines,
            f"  change         stream {n('stream_change')} (relative {n('stream_change_relative', '.4f')}),"
            f" TTT {n('ttt_change')} (relative {n('ttt_change_relative', '.4f')})",
            f"  fast weights   displacement {n('displacement')}, base {n('base')}, ratio {n('displacement_to_base', '.4f')}"
            f" (largest head {n('displacement_to_base_largest_head', '.4f')})",
            f"  inner loss     at the base {n('loss_base')}, before the frame {n('loss_before')}, after it {n('loss_after')};"
            f" rate {n('inner_rate')}",
        ]
    )


def explanation() -> str:
    """How to read the records, in a few lines."""
    return (
        "stream: the residual stream after attention (x + attention's update, not the update alone), which the TTT layer reads; it\n"
        "grows with depth, and ratios and cosines are against it. combined: the stream with the gated TTT output added.\n"
        "gate: tanh(alpha) by channel, open above 0.01. gated share: of the norms of what is added and what it is added to.\n"
        "change: from the record before. inner loss: at the base minus before the frame is what memory brought."
    )


def comparison(records: Sequence[Record]) -> str:
    """Means over records by checkpoint and layer, side by side with their difference."""
    first, second = names(records)
    width = max(map(len, FIGURES))
    rows = [f"means over records: A is {first}, B is {second}"]
    for layer in sorted({record["layer"] for record in records}):
        count = [sum(r["layer"] == layer and r["checkpoint"] == name for r in records) for name in (first, second)]
        rows += ["", f"{f'layer {layer}':{width}}{'A':>12}{'B':>12}{'B - A':>12}"]
        if not all(count):
            rows[-1] += f"   (a TTT layer in {'A' if count[0] else 'B'} only)"
        for figure in FIGURES:
            a, b = (mean(records, name, layer, figure) for name in (first, second))
            difference = None if a is None or b is None else b - a
            cells = f"{_number(a):>12}{_number(b):>12}{_number(difference, '+.4g'):>12}"
            rows.append(f"{figure:{width}}{cells}")
    return "\n".join(rows)


def mean(records: Sequence[Record], checkpoint: str, layer: int, figure: str) -> float | None:
    """Over the records of a checkpoint and layer where the figure is defined; None if it is in none."""
    found = [r[figure] for r in records if (r["checkpoint"], r["layer"]) == (checkpoint, layer)]
    found = [value for value in found if value is not None]
    return float(np.mean(found)) if found else None


def names(records: Sequence[Record]) -> list[str]:
    """Checkpoints in the order of their records."""
    return list(dict.fromkeys(record["checkpoint"] for record in records))


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


# Files


def write_records(records: Sequence[Record], folder: Path) -> Path:
    """Write one JSON object a line, the checksum of these lines in the last; the path."""
    path = folder / RECORDS
    lines = [json.dumps(record, allow_nan=False) for record in records]
    write_atomically(path, "".join(line + "\n" for line in (*lines, _checksum(lines))).encode())
    return path


def _checksum(lines: Sequence[str]) -> str:
    """The last line of a file that begins with `lines`."""
    return json.dumps({"checksum": hashlib.sha256("\n".join(lines).encode()).hexdigest()})


def read(folder: Path) -> list[Record]:
    """The records in `folder`. Raises `InputError` if there are none or they are not as `write_records` wrote them."""
    path = folder / RECORDS
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): give a folder that python -m eval diagnose made.") from None
    lines = lines[:-1] if not lines[-1] else lines  # the last ends in a line feed
    if not lines or lines[-1] != _checksum(lines[:-1]):
        raise InputError(
            f"{path} is not as it was written (its checksum does not match its records): run python -m eval diagnose again."
        )
    wanted = {"checkpoint", "frame", "seconds", "layer", *FIGURES}
    try:
        records = [json.loads(line) for line in lines[:-1]]
    except (ValueError, RecursionError):
        records = []
    if not records or not all(isinstance(record, dict) and wanted <= record.keys() for record in records):
        raise InputError(f"{path} holds no records of python -m eval diagnose as it is now: run it again.")
    return records


# Figures

PANELS = {
    "stream_norm": "norm of stream after attention",
    "ttt_norm": "norm of TTT output, before the gate",
    "combined_norm": "norm of stream + gated TTT",
    "ttt_to_stream": "TTT / stream",
    "gated_to_stream": "gated TTT / stream",
    "gate_mean_abs": "mean |tanh(alpha)|",
    "cosine_stream_ttt": "cosine stream, TTT",
    "cosine_stream_combined": "cosine stream, combined",
    "cosine_ttt_combined": "cosine TTT, combined",
    "stream_change_relative": "change of stream, relative",
    "ttt_change_relative": "change of TTT, relative",
    "ttt_near_zero_percent": "TTT channels near zero, %",
    "displacement_to_base": "displacement / base",
    "loss_before": "inner loss before the frame",
    "memory": "inner loss: base minus before",
}
COLUMNS = 3
STYLES = ("-", "--")
COLOURS = ("#1b6ca8", "#d1495b", "#edae49", "#4c956c", "#7d5ba6", "#7d8597")


def write_figures(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw the records over time as diagnose.png and diagnose.pdf; the paths."""
    import matplotlib

    matplotlib.use("Agg")
    return save(draw(records), folder, FIGURE)


def draw(records: Sequence[Record]) -> Any:
    """One figure, a panel for each of `PANELS`; a colour for each layer, a line style for each checkpoint."""
    from matplotlib import pyplot as plt

    rows = -(-len(PANELS) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(12, 2.3 * rows + 0.9), sharex=True, layout="constrained")
    layers, checkpoints = sorted({record["layer"] for record in records}), names(records)
    colours = COLOURS if len(layers) <= len(COLOURS) else plt.get_cmap("viridis")(np.linspace(0, 0.95, len(layers)))
    lines = {}
    for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
        for i, layer in enumerate(layers):
            for style, checkpoint in zip(STYLES, checkpoints, strict=False):
                some = [r for r in records if (r["layer"], r["checkpoint"]) == (layer, checkpoint)]
                if some:
                    label = f"{checkpoint}, layer {layer}"
                    (lines[label],) = axis.plot(
                        [r["seconds"] for r in some],
                        [_value(r, name) for r in some],
                        color=colours[i],
                        ls=style,
                        marker="o" if len(some) < 40 else None,
                        markersize=3,
                        lw=1.4,
                    )
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.margins(y=0.12)
        bottom, top = axis.get_ylim()
        if not name.startswith("cosine") and bottom > 0:  # sizes, not their wiggles
            axis.set_ylim(0, max(top, 1.05 * axis.dataLim.ymax))
    for axis in axes[-1]:
        axis.set_xlabel("seconds of speech", fontsize=9)
    columns = max(1, min(len(layers), 4, 160 // (8 + max(map(len, lines)))))  # a column a layer where they fit
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    return figure


def _value(record: Record, name: str) -> float:
    """A figure to draw; a gap where it is undefined."""
    if name == "memory":
        parts = record["loss_base"], record["loss_before"]
        return np.nan if None in parts else parts[0] - parts[1]
    return np.nan if record[name] is None else record[name]
