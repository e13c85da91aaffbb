"""The loss curve of a run as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ttt_jax.files import write_atomically

SMOOTHING = 10  # metric lines over which curves are averaged


def loss_curve(lines: Sequence[dict[str, Any]], baseline: dict[str, float], path: Path) -> None:
    """Draw losses by stream and what the TTT layers did over the steps of a run, as PNG.

    Args:
        lines: of metrics.jsonl, in order; at least one.
        baseline: nats of the unigram model by stream, drawn dashed in the stream's colour.
        path: written at once or not at all.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, memory) = plt.subplots(
        2, 1, figsize=(8, 8), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    steps = np.array([line["step"] for line in lines])
    for i, (name, level) in enumerate(baseline.items()):
        colour = plt.get_cmap("tab10")(i)
        losses.plot(steps, _smooth([line["streams"][name] for line in lines]), color=colour, label=name, linewidth=1.2)
        losses.axhline(level, color=colour, linestyle="--", linewidth=0.7)
    losses.plot(steps, _smooth([line["loss"] for line in lines]), color="black", label="minimised", linewidth=1.8)
    losses.set_ylabel("nats per token")
    losses.set_title(f"Training loss (mean of {SMOOTHING} lines; dashed: unigram model of the training data)")
    losses.legend(ncols=2, fontsize=8, frameon=False)
    for i, layer in enumerate(lines[-1]["ttt"]):
        for key, style, what in (
            ("gate_abs", "-", "mean |tanh alpha|"),
            ("displacement_ratio", ":", "displacement / base norm"),
        ):
            values = _smooth([line["ttt"][layer][key] for line in lines])
            memory.plot(steps, values, style, color=plt.get_cmap("tab10")(i), label=f"layer {layer}: {what}")
    memory.set_xlabel("step")
    memory.set_title("TTT layers")
    if lines[-1]["ttt"]:
        memory.legend(fontsize=8, frameon=False)
    for axis in (losses, memory):
        axis.grid(alpha=0.25)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)
    write_atomically(path, picture.getvalue())


def _smooth(values: Sequence[float | None]) -> np.ndarray:
    """Each value averaged with up to `SMOOTHING` - 1 before it, missing ones left out."""
    values = np.array(values, float)
    return np.array(
        [
            np.nanmean(part) if np.isfinite(part).any() else np.nan
            for part in map(values.__getitem__, _spans(len(values)))
        ]
    )


def _spans(count: int) -> list[slice]:
    return [slice(max(end - SMOOTHING, 0), end) for end in range(1, count + 1)]
