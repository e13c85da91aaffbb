"""What `python -m eval compare` measures: losses by file and piece of a chunk, under every condition. Nothing here imports jax."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from eval.streaming.summary import UNIT
from ttt_jax.errors import InputError

MARGIN, THRESHOLD = 0.02, 10.0
"""Margin of equivalence in nats, and the effect worth having in percent of the loss, where no others are asked for."""

LATER, WINDOW, BEYOND = "after the first chunk", "beyond one layer's window", "beyond the attention window"
REGIONS = (LATER, WINDOW, BEYOND)
"""Parts of a file that conditions are compared in; the first is the primary one."""

BOUND_NAMES = {"ideal": "best with all memory", "memoryless": "best with attention's reach alone"}
"""Of the fields of `Bounds` that are losses, as tables and figures call them."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What was asked for and what the models are."""

    chunk: int
    """Frames of a chunk, after which the arm reset clears memory."""
    weighting: str
    """Of the codebooks, one of `WEIGHTINGS`."""
    window: int
    """Frames of the longest attention window."""
    reach: int
    """Frames that attention of all layers together can look back at most."""
    margin: float = MARGIN
    """Of equivalence, nats."""
    threshold: float = THRESHOLD
    """Effect worth having, percent of the loss."""
    dtype: str = "float32"
    """Of the models; bfloat16 if one is."""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What else results.json should say: data, codec."""

    def __post_init__(self) -> None:
        if not self.margin > 0 or not math.isfinite(self.margin):
            raise InputError(f"--margin {self.margin} is out of range: give nats above 0.")
        if not self.threshold >= 0 or not math.isfinite(self.threshold):
            raise InputError(f"--threshold {self.threshold} is out of range: give 0 or more percent.")

    @property
    def starts(self) -> dict[str, int]:
        """First frame of each region."""
        return {LATER: self.chunk, WINDOW: max(self.chunk, self.window), BEYOND: max(self.chunk, self.reach)}

    def pieces(self, frames: int) -> np.ndarray:
        """First frames of the pieces that files of at most `frames` frames are cut into, int [K]."""
        edges = {*range(0, frames, self.chunk), *self.starts.values()}
        return np.array(sorted(edge for edge in edges if edge < frames))


@dataclasses.dataclass(frozen=True)
class Condition:
    """One of the things that are compared."""

    name: str
    arm: str
    checkpoints: tuple[str, ...]
    """Names of its checkpoints, the seeds of one setting."""


@dataclasses.dataclass(frozen=True)
class File:
    """A file that was streamed."""

    name: str
    group: str
    """Speaker; its own name if it shares none with another."""
    frames: int
    digest: str = ""
    """Of what was streamed."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Of a controlled task: the best that can be done, nats by file and piece, [F, K]; NaN where nothing is scored."""

    ideal: np.ndarray
    """With memory of everything before."""
    memoryless: np.ndarray
    """With what attention reaches."""
    weight: np.ndarray
    """Scored tokens, 0 where there are none."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What streaming gave: F files in K pieces under every condition, of S checkpoints each."""

    setting: Setting
    conditions: list[Condition]
    """The first is under test."""
    files: list[File]
    weight: np.ndarray
    """Weight of the scored tokens, float64 [F, K]; the same under all conditions."""
    losses: dict[str, np.ndarray]
    """Nats per token by condition, float64 [S, F, K]; NaN where nothing is scored."""
    bounds: Bounds | None = None
    checkpoints: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Name, path, step and whatever results.json should say of each."""
    skipped: list[dict[str, str]] = dataclasses.field(default_factory=list)
    """Name and reason of files that were not streamed, or whose predictions were no finite numbers."""

    @property
    def groups(self) -> list[str]:
        """Of every file."""
        return [file.group for file in self.files]

    @property
    def unit(self) -> str:
        """What the units are, in the plural."""
        return "files" if len(set(self.groups)) == len(self.files) else f"{UNIT}s"

    @property
    def pieces(self) -> np.ndarray:
        """First frames of the pieces, int [K]."""
        return self.setting.pieces(max(file.frames for file in self.files))

    def loss(self, name: str, start: int = 0, end: int | None = None) -> np.ndarray:
        """Nats per token of a condition over frames [start, end), edges of pieces: [S, F]; NaN where nothing is scored."""
        return pooled(self.losses[name], self.weight, self.within(start, end))

    def by_chunk(self, name: str) -> np.ndarray:
        """Nats per token of a condition by chunk, [S, F, C]; NaN where nothing is scored or a file fills less than half of it."""
        return np.stack([np.where(self.filled(*one), self.loss(name, *one), np.nan) for one in self.chunks], -1)

    def filled(self, start: int, end: int | None) -> np.ndarray:
        """Which files fill at least half of a chunk, bool [F]: the few tokens of a file's end are no measure of one."""
        if end is None:
            return np.ones(len(self.files), bool)
        return np.array([2 * (min(file.frames, end) - start) >= end - start for file in self.files])

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """First frame and end of every chunk."""
        size = self.setting.chunk
        return [(at, at + size) for at in range(0, int(self.pieces[-1]) + 1, size)]

    def within(self, start: int, end: int | None) -> np.ndarray:
        """Which pieces lie in frames [start, end), bool [K]."""
        return (self.pieces >= start) & (self.pieces < (math.inf if end is None else end))


def pooled(values: np.ndarray, weight: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Means over the pieces `used` (bool [K]) weighted by tokens, [..., F, K] and [F, K] -> [..., F]; NaN where nothing is scored."""
    weight = np.where(used, weight, 0.0)
    total = weight.sum(-1)
    sums = (weight * np.where(weight > 0, values, 0.0)).sum(-1)
    return np.where(total > 0, sums / np.where(total > 0, total, 1), np.nan)


def differences(experiment: Experiment, name: str, start: int) -> np.ndarray:
    """Loss of condition `name` minus that of the first from frame `start` on, [S, F]; NaN of files that end before."""
    return experiment.loss(name, start) - experiment.loss(experiment.conditions[0].name, start)
