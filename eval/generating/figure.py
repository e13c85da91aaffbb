"""The picture of a talk: both voices, Moshi's words where they are said, and the memory of the TTT layers below.

Imports no jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.generating.text import Spoken
from eval.results.figures import pyplot, save

MOSHI, USER, BASE, BEFORE, DISPLACEMENT = "#0072B2", "#6B6B6B", "#E69F00", "#0072B2", "#009E73"
"""Colours, of those of `eval.results.figures`."""
INCHES_A_SECOND, NARROWEST, WIDEST = 0.35, 11, 36
LETTER, LINES = 0.078, 14
"""Width of a letter of the words in inches, and most lines of words."""
LAYERS = 8
"""Most TTT layers that are drawn; of more, evenly spaced ones."""


def write(
    folder: Path,
    name: str,
    title: str,
    rate: int,
    moshi: np.ndarray,
    user: np.ndarray,
    words: Sequence[Spoken],
    diagnostics: dict[str, np.ndarray] | None,
    gates: Sequence[float],
) -> Path:
    """Draws a talk as NAME.png; returns the path.

    Args:
      rate: samples a second of the voices `moshi` and `user`, [samples] each.
      diagnostics: "seconds" [N], "layers" [L], and "loss_base", "loss_before", "displacement", [N, L] each; None if
        there are none.
      gates: mean size of each TTT layer's gate.
    """
    seconds = len(user) / rate
    width = min(max(seconds * INCHES_A_SECOND, NARROWEST), WIDEST)
    lines, left_out = _lines(words, (width - 1.5) / seconds, seconds)
    shown = _shown(0 if diagnostics is None else len(diagnostics["layers"]))
    heights = [0.25 + 0.22 * max(map(lambda placed: placed[0] + 1, lines), default=1), 1.2, 1.2, *[1.6] * len(shown)]
    plt = pyplot()
    figure, axes = plt.subplots(
        len(heights),
        1,
        figsize=(width, sum(heights) + 1.2),
        height_ratios=heights,
        sharex=True,
        layout="constrained",
    )
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    _words(axes[0], lines, left_out)
    _voice(axes[1], moshi, rate, "Moshi", MOSHI)
    _voice(axes[2], user, rate, "user", USER)
    for axis, i in zip(axes[3:], shown, strict=True):
        _memory(axis, diagnostics, i, gates[i])
    axes[-1].set_xlabel("seconds")
    axes[-1].set_xlim(0, seconds)
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return save(figure, folder, name, ("png",))[0]


def _shown(layers: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, layers - 1, min(layers, LAYERS))})


def _lines(words: Sequence[Spoken], inches: float, seconds: float) -> tuple[list[tuple[int, float, Spoken]], int]:
    """Returns line, place in seconds and word, such that no words touch, and the number of words that fit nowhere."""
    ends, placed, left_out = [0.0] * LINES, [], 0
    for word in words:
        size = (len(word.text) + 1) * LETTER / inches
        start = max(min(word.start, seconds - size), 0)
        line = next((i for i, end in enumerate(ends) if end <= start), None)
        if line is None:
            left_out += 1
            continue
        ends[line] = start + size
        placed.append((line, start, word))
    return placed, left_out


def _words(axis: Any, lines: Sequence[tuple[int, float, Spoken]], left_out: int) -> None:
    height = max((line + 1 for line, _, _ in lines), default=1)
    axis.set_ylim(height, -0.2)
    for line, start, word in lines:
        axis.text(start, line + 0.5, word.text, fontsize=8, va="center", family="DejaVu Sans")
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(bottom=False)
    if not lines:
        axis.text(0, 0.5, "no text", fontsize=8, va="center", color=USER)
    note = f"; {left_out} words do not fit, see the text file" if left_out else ""
    axis.set_title(f"what Moshi says{note}", fontsize=9, loc="left")


def _voice(axis: Any, samples: np.ndarray, rate: int, name: str, colour: str) -> None:
    """Draws the range of the samples in each of at most 4,000 pieces."""
    size = max(1, len(samples) // 4000)
    pieces = samples[: len(samples) // size * size].reshape(-1, size)
    at = (np.arange(len(pieces)) + 0.5) * size / rate
    axis.fill_between(at, pieces.min(1), pieces.max(1), color=colour, lw=0.3)
    peak = min(max(float(np.abs(samples).max(initial=0)), 0.01), 1)  # full scale: a wav file holds no more
    axis.set_ylim(-1.05 * peak, 1.05 * peak)
    axis.set_ylabel(name, fontsize=9)
    axis.axhline(0, color=colour, lw=0.5)


def _memory(axis: Any, diagnostics: dict[str, np.ndarray], i: int, gate: float) -> None:
    at = diagnostics["seconds"]
    axis.plot(at, diagnostics["loss_base"][:, i], color=BASE, lw=1, label="inner loss l(W0)")
    axis.plot(at, diagnostics["loss_before"][:, i], color=BEFORE, lw=1, label="inner loss l(W before)")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("inner loss", fontsize=9)
    axis.grid(alpha=0.25)
    other = axis.twinx()
    other.plot(at, diagnostics["displacement"][:, i], color=DISPLACEMENT, lw=1.2, ls="--", label="displacement")
    other.set_ylim(bottom=0, top=None if diagnostics["displacement"][:, i].max(initial=0) > 0 else 1)
    other.set_ylabel("displacement", fontsize=9, color=DISPLACEMENT)
    other.tick_params(labelsize=8, colors=DISPLACEMENT)
    other.spines[["top", "left"]].set_visible(False)
    axis.set_title(f"TTT layer {diagnostics['layers'][i]}, mean gate {gate:.3g}", fontsize=9, loc="left")
    handles = axis.get_lines()[:2] + other.get_lines()[:1]
    axis.legend(
        handles,
        [line.get_label() for line in handles],
        fontsize=8,
        frameon=False,
        ncols=3,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0,
    )
