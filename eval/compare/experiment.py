"""The data of `python -m eval compare`: losses by file and piece of a chunk, under every condition. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.results import schema
from eval.results.schema import CheckpointInfo, FileInfo, Skipped
from eval.stats.verdict import MARGIN, THRESHOLD
from ttt_jax.errors import InputError

LATER, WINDOW, BEYOND = "after the first chunk", "beyond one layer's window", "beyond the attention window"
REGIONS = (LATER, WINDOW, BEYOND)
"""Parts of a file in which conditions are compared; the first is the primary one."""

BOUND_NAMES = {"ideal": "best with all memory", "memoryless": "best with attention's reach alone"}
"""Names of the fields of `Bounds` in tables and figures."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """The question, and what the numbers depend on."""

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
    """Data and codec."""

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
        """Returns the first frames of the pieces of files of at most `frames` frames, int [K]."""
        edges = {*range(0, frames, self.chunk), *self.starts.values()}
        return np.array(sorted(edge for edge in edges if edge < frames))


def setting_of(
    checkpoints: Sequence[CheckpointInfo], files: Sequence[FileInfo], *, chunk: int, **fields: Any
) -> Setting:
    """Returns the setting for these checkpoints; `fields` are further ones of `Setting`.

    Raises `InputError` if no file is longer than a chunk.
    """
    if all(file.frames <= chunk for file in files):
        raise InputError(
            f"no file is longer than a chunk of {chunk} frames, so nothing is left to compare: give longer files or a"
            " smaller --reset-every."
        )
    return Setting(
        chunk=chunk,
        window=max(info.context for info in checkpoints),
        reach=max(info.reach for info in checkpoints),
        dtype="bfloat16" if any(info.dtype == "bfloat16" for info in checkpoints) else "float32",
        **fields,
    )


@dataclasses.dataclass(frozen=True)
class Condition:
    """One or several checkpoints under one arm."""

    name: str
    arm: str
    checkpoints: tuple[str, ...]
    """Names of its checkpoints, the seeds of one setting."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Best possible losses on a controlled task, nats by file and piece, float64 [F, K]; NaN where nothing is
    scored."""

    ideal: np.ndarray
    """With memory of all frames before."""
    memoryless: np.ndarray
    """With the frames that attention reaches."""
    weight: np.ndarray
    """Number of scored tokens."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Losses of F files in K pieces under every condition, of S checkpoints each."""

    setting: Setting
    conditions: list[Condition]
    """The first is under test."""
    files: list[FileInfo]
    weight: np.ndarray
    """Weight of the scored tokens, float64 [F, K]; the same under all conditions."""
    losses: dict[str, np.ndarray]
    """Nats per token by condition, float64 [S, F, K]; NaN where nothing is scored."""
    bounds: Bounds | None = None
    checkpoints: list[CheckpointInfo] = dataclasses.field(default_factory=list)
    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    """Files that could not be read, or whose predictions were not finite."""

    @property
    def groups(self) -> list[str]:
        """Group of every file."""
        return [file.group for file in self.files]

    @property
    def unit(self) -> str:
        """What the units are, in the plural."""
        return schema.units(self.files)[1]

    @property
    def pieces(self) -> np.ndarray:
        """First frames of the pieces, int [K]."""
        return self.setting.pieces(max(file.frames for file in self.files))

    def loss(self, name: str, start: int = 0, end: int | None = None) -> np.ndarray:
        """Returns nats per token of a condition over frames [start, end), edges of pieces: [S, F]; NaN where nothing is
        scored."""
        return pooled(self.losses[name], self.weight, self.within(start, end))

    def by_chunk(self, name: str) -> np.ndarray:
        """Returns nats per token of a condition by chunk, [S, F, C]; NaN where nothing is scored or a file fills less
        than half of it."""
        return np.stack([np.where(self.filled(*one), self.loss(name, *one), np.nan) for one in self.chunks], -1)

    def filled(self, start: int, end: int | None) -> np.ndarray:
        """Returns which files fill at least half of a chunk, bool [F]: a few tokens at a file's end do not measure a
        chunk."""
        if end is None:
            return np.ones(len(self.files), bool)
        return np.array([2 * (min(file.frames, end) - start) >= end - start for file in self.files])

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """First frame and end of every chunk."""
        size = self.setting.chunk
        return [(at, at + size) for at in range(0, int(self.pieces[-1]) + 1, size)]

    def within(self, start: int, end: int | None) -> np.ndarray:
        """Returns which pieces lie in frames [start, end), bool [K]."""
        return (self.pieces >= start) & (self.pieces < (math.inf if end is None else end))


def pooled(values: np.ndarray, weight: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Returns means over the pieces `used` (bool [K]) weighted by tokens, [..., F, K] and [F, K] -> [..., F]; NaN where
    nothing is scored."""
    weight = np.where(used, weight, 0.0)
    total = weight.sum(-1)
    sums = (weight * np.where(weight > 0, values, 0.0)).sum(-1)
    return np.where(total > 0, sums / np.where(total > 0, total, 1), np.nan)


def differences(experiment: Experiment, name: str, start: int) -> np.ndarray:
    """Returns the loss of condition `name` minus that of the first from frame `start` on, [S, F]; NaN of files that end
    before."""
    return experiment.loss(name, start) - experiment.loss(experiment.conditions[0].name, start)
