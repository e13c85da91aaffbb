"""Results of `python -m eval generate`: what is stored of each talk, and a table. Imports no jax."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import numpy as np

from eval.generating.text import Counts
from eval.results.schema import CheckpointInfo, Skipped

FIGURES = {
    "real_time_factor": "seconds of the steps that heard the file / its seconds; below 1 is faster than real time",
    "latency_ms": "quantiles over frames of a step's time in milliseconds, codec included; files side by side share a"
    " step",
    "perplexity": "exp of the mean of -log p of the model's own tokens, under its distribution at temperature 1",
    "loss_base": "inner loss at the base W0, mean over heads and measured frames, by TTT layer",
    "loss_before": "inner loss before a frame's step, mean over heads and measured frames, by TTT layer",
    "displacement": "norm of fast weights minus base over that of the base, mean over heads, at the last measured"
    " frame, by TTT layer",
}
"""Meaning of the figures of a talk."""


class Latency(NamedTuple):
    """Quantiles of the time of a frame, milliseconds."""

    p50: float
    p90: float
    p99: float


class Perplexity(NamedTuple):
    """Of Moshi's own stream; NaN unless measured."""

    text: float
    codebooks: float


@dataclasses.dataclass(frozen=True)
class TalkResults:
    """One recording and what was said to it; figures as in `FIGURES`."""

    name: str
    path: str
    digest: str
    """SHA-256 of the recording's file."""
    seed: int | None
    """None where a stored talk went on."""
    frames: int
    seconds: float
    """With the silence after it."""
    real_time_factor: float
    latency_ms: Latency
    perplexity: Perplexity
    tokens: Counts
    text: str
    loss_base: list[float]
    loss_before: list[float]
    displacement: list[float]
    outputs: list[str]
    """Files in the folder."""
    answer: str | None
    """File for Full-Duplex-Bench."""


@dataclasses.dataclass(frozen=True)
class Results:
    """All talks of a command."""

    COMMAND: ClassVar[str] = "python -m eval generate"
    FORMAT: ClassVar[int] = 1

    data: str
    """As the command line gave it."""
    setting: dict[str, Any]
    """Options that change what is said, by flag."""
    checkpoint: CheckpointInfo
    files: list[TalkResults]
    skipped: list[Skipped]


def quantiles(latency: np.ndarray) -> Latency:
    """Returns quantiles of seconds, [T], in milliseconds."""
    return Latency(*(float(value) for value in np.quantile(latency * 1000, (0.5, 0.9, 0.99))))


def perplexity(log_probs: np.ndarray | None) -> Perplexity:
    """Returns that of log-probabilities [1 + Q, T], NaN where there is no token."""
    if log_probs is None:
        return Perplexity(float("nan"), float("nan"))

    def of(part: np.ndarray) -> float:
        there = part[~np.isnan(part)]
        return float(np.exp(-there.mean(dtype=np.float64))) if there.size else float("nan")

    return Perplexity(of(log_probs[:1]), of(log_probs[1:]))


TEXT = 48
"""Characters of a talk's text in the table."""


def table(results: Results) -> str:
    """Returns a line for each talk."""
    rows = [("file", "seconds", "real-time factor", "ms a frame (p50, p99)", "perplexity (text, codes)", "text")]
    for file in results.files:
        latency, perplexities = file.latency_ms, file.perplexity
        text = file.text if len(file.text) <= TEXT else f"{file.text[: TEXT - 1]}…"
        rows.append(
            (
                file.name if len(file.name) <= 40 else f"…{file.name[-39:]}",
                f"{file.seconds:.1f}",
                f"{file.real_time_factor:.3f}",
                f"{latency.p50:.1f}, {latency.p99:.1f}",
                "-" if np.isnan(perplexities.codebooks) else f"{perplexities.text:.1f}, {perplexities.codebooks:.1f}",
                text or "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 0 < i < len(row) - 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
