"""Records of `python -m eval diagnose`: their figures, what is stored, and text for a terminal. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from eval.results.schema import CheckpointInfo, FileInfo

SMALL = 0.01
"""Channels below this size count as near zero."""

FIGURES = {
    "stream_norm": "norm of stream after attention",
    "ttt_norm": "norm of TTT output, before the gate",
    "combined_norm": "norm of stream + gated TTT",
    "ttt_to_stream": "norms: TTT / stream",
    "gated_to_stream": "norms: gated TTT / stream",
    "gate_mean_abs": "|tanh(alpha)|, mean over channels",
    "cosine_stream_ttt": "cosine of stream and TTT",
    "cosine_stream_combined": "cosine of stream and combined",
    "cosine_ttt_combined": "cosine of TTT and combined",
    "ttt_mean": "TTT output, mean over channels",
    "ttt_std": "TTT output, standard deviation over channels",
    "ttt_near_zero_percent": f"% of TTT channels below {SMALL} in size",
    "stream_change_relative": "relative change of stream since last record",
    "ttt_change_relative": "relative change of TTT since last record",
    "displacement": "norm of fast weights minus base, mean over heads",
    "base": "norm of the base W0, mean over heads",
    "displacement_to_base": "displacement / base, mean over heads",
    "loss_base": "inner loss at the base W0, mean over heads",
    "loss_before": "inner loss before the frame's step",
    "loss_after": "inner loss after the frame's step, mean over heads",
}
"""Figures of every record, in the order of tables."""

EXPLANATION = (
    "stream: the residual stream after attention (x + attention's update, not the update alone), which the TTT\n"
    "layer reads; it grows with depth, and ratios and cosines are against it.\n"
    "combined: the stream with the gated TTT output added. change: since the record before.\n"
    "inner loss: at the base minus before the frame is the gain from memory."
)
"""How to read the records."""

Record = dict[str, Any]
"""`FIGURES` of one frame and layer by name, None where undefined; with "checkpoint", "frame", "seconds" and "layer"."""


@dataclasses.dataclass(frozen=True)
class Results:
    """Records of one file under one checkpoint or two."""

    COMMAND: ClassVar[str] = "python -m eval diagnose"
    FORMAT: ClassVar[int] = 1

    data: str | None
    """As the command line gave it."""
    every: int
    """Frames from one record to the next."""
    file: FileInfo
    checkpoints: list[CheckpointInfo]
    records: list[Record]


def block(record: Record) -> str:
    """Returns a record as lines for a terminal."""

    def n(name: str, form: str = ".4g") -> str:
        return _number(record[name], form)

    return "\n".join(
        [
            f"layer {record['layer']}, frame {record['frame']} ({record['seconds']:.1f} s)",
            f"  norm          stream {n('stream_norm')}, TTT {n('ttt_norm')}, combined {n('combined_norm')}",
            f"  ratio         TTT / stream {n('ttt_to_stream')}, gated TTT / stream {n('gated_to_stream')}",
            f"  gate          mean |tanh(alpha)| {n('gate_mean_abs', '.4f')}",
            f"  cosine        stream-TTT {n('cosine_stream_ttt', '+.4f')}, stream-combined"
            f" {n('cosine_stream_combined', '+.4f')}, TTT-combined {n('cosine_ttt_combined', '+.4f')}",
            f"  TTT output    mean {n('ttt_mean', '+.4f')}, std {n('ttt_std', '.4f')},"
            f" near zero {n('ttt_near_zero_percent', '.1f')} %",
            f"  change        stream {n('stream_change_relative', '.4f')},"
            f" TTT {n('ttt_change_relative', '.4f')} (relative)",
            f"  fast weights  displacement {n('displacement')}, base {n('base')},"
            f" ratio {n('displacement_to_base', '.4f')}",
            f"  inner loss    at the base {n('loss_base')}, before the frame {n('loss_before')},"
            f" after {n('loss_after')}",
        ]
    )


def comparison(results: Results) -> str:
    """Returns means over the records of two checkpoints by layer, side by side, with their difference."""
    first, second = (info.name for info in results.checkpoints)
    width = max(map(len, FIGURES))
    rows = [f"means over records: A is {first}, B is {second}"]
    for layer in sorted({record["layer"] for record in results.records}):
        a, b = (
            [record for record in results.records if (record["layer"], record["checkpoint"]) == (layer, name)]
            for name in (first, second)
        )
        only = "" if a and b else f"   (a TTT layer in {'A' if a else 'B'} only)"
        rows += ["", f"{f'layer {layer}':{width}}{'A':>12}{'B':>12}{'B - A':>12}{only}"]
        for figure in FIGURES:
            means = [_mean(side, figure) for side in (a, b)]
            difference = None if None in means else means[1] - means[0]
            cells = f"{_number(means[0]):>12}{_number(means[1]):>12}{_number(difference, '+.4g'):>12}"
            rows.append(f"{figure:{width}}{cells}")
    return "\n".join(rows)


def _mean(records: Sequence[Record], figure: str) -> float | None:
    """Returns the mean over records in which the figure is defined; None if there are none."""
    defined = [record[figure] for record in records if record[figure] is not None]
    return float(np.mean(defined)) if defined else None


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)
