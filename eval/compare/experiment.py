"""The data of `python -m eval compare`: losses by file and piece of a chunk, under every condition. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

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

Span = tuple[int, int | None]
"""First frame and end of a part of a file, both edges of pieces; None: to the end."""


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
    threshold: float = THRESHOLD
    dtype: str = "float32"
    """Of the models; bfloat16 if one is."""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Data and codec."""

    def __post_init__(self) -> None:
        if not 0 < self.margin < math.inf:
            raise InputError(f"--margin {self.margin} is out of range: give nats above 0.")
        if not 0 <= self.threshold < math.inf:
            raise InputError(f"--threshold {self.threshold} is out of range: give 0 or more percent.")

    @property
    def regions(self) -> dict[str, Span]:
        """Frames of each region."""
        starts = {LATER: self.chunk, WINDOW: self.window, BEYOND: self.reach}
        return {region: (max(self.chunk, start), None) for region, start in starts.items()}

    def pieces(self, frames: int) -> np.ndarray:
        """Returns the first frames of the pieces of files of at most `frames` frames, int [K]."""
        edges = {*range(0, frames, self.chunk), *(start for start, _ in self.regions.values())}
        return np.array(sorted(edge for edge in edges if edge < frames))


@dataclasses.dataclass(frozen=True)
class Condition:
    """One or several checkpoints under one arm."""

    name: str
    arm: str
    checkpoints: tuple[str, ...]
    """Names of its checkpoints, the seeds of one setting."""


class Bounds(NamedTuple):
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
    checkpoints: list[CheckpointInfo]
    files: list[FileInfo]
    skipped: list[Skipped]
    """Files that could not be read, or whose predictions were not finite."""
    weight: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    """Weight of the scored tokens, float64 [F, K]; the same under all conditions. Empty until `losses.collect`."""
    losses: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Nats per token by condition, float64 [S, F, K]; NaN where nothing is scored."""
    bounds: Bounds | None = None

    @property
    def groups(self) -> list[str]:
        """Group of every file."""
        return [file.group for file in self.files]

    @property
    def unit(self) -> str:
        """What the units are, in the plural."""
        return schema.units(self.files)[1]

    @property
    def longest(self) -> int:
        """Frames of the longest file."""
        return max(file.frames for file in self.files)

    @property
    def pieces(self) -> np.ndarray:
        """First frames of the pieces, int [K]."""
        return self.setting.pieces(self.longest)

    @property
    def chunks(self) -> list[Span]:
        """Frames of every chunk; the last may end beyond the files."""
        size = self.setting.chunk
        return [(start, start + size) for start in range(0, self.longest, size)]

    def loss(self, name: str, span: Span = (0, None)) -> np.ndarray:
        """Returns nats per token of a condition over a span, [S, F]; NaN where nothing is scored."""
        return pooled(self.losses[name], self.weight, self.within(span))

    def bound(self, name: str, span: Span) -> np.ndarray:
        """Returns the best loss, `ideal` or `memoryless`, over a span, [1, F]; NaN where nothing is scored."""
        return pooled(getattr(self.bounds, name)[None], self.bounds.weight, self.within(span))

    def differences(self, name: str, span: Span) -> np.ndarray:
        """Returns the loss of a condition minus that of the first over a span, [S, F]; NaN where nothing is scored."""
        return self.loss(name, span) - self.loss(self.conditions[0].name, span)

    def differences_by_chunk(self, name: str) -> np.ndarray:
        """Returns differences averaged over seeds, [F, C]; NaN also where a file fills less than half of a chunk."""
        columns = [np.where(self.filled(chunk), self.differences(name, chunk).mean(0), np.nan) for chunk in self.chunks]
        return np.stack(columns, -1)

    def filled(self, span: Span) -> np.ndarray:
        """Returns which files fill at least half of a chunk, bool [F]: a few tokens at a file's end do not measure it.

        All fill a span without end."""
        start, end = span
        return np.array([end is None or 2 * (min(file.frames, end) - start) >= end - start for file in self.files])

    def within(self, span: Span) -> np.ndarray:
        """Returns which pieces lie in a span, bool [K]."""
        start, end = span
        return (self.pieces >= start) & (self.pieces < (math.inf if end is None else end))


def plan(
    conditions: list[Condition],
    checkpoints: list[CheckpointInfo],
    files: list[FileInfo],
    skipped: list[Skipped],
    **setting: Any,
) -> Experiment:
    """Returns the experiment on these files, without losses; `setting` are further fields of `Setting`.

    Raises `InputError` if no file is longer than a chunk.
    """
    if all(file.frames <= setting["chunk"] for file in files):
        raise InputError(
            f"no file is longer than a chunk of {setting['chunk']} frames, so nothing is left to compare: give longer"
            " files or a smaller --reset-every."
        )
    setting["window"] = max(info.context for info in checkpoints)
    # What reaches the stream's beginning, delayed codebooks included, reaches no further than the longest file.
    everything = max(file.frames for file in files) + max(info.max_delay for info in checkpoints)
    reach = max(info.reach for info in checkpoints)
    setting["reach"] = everything if reach == math.inf else reach
    setting["dtype"] = "bfloat16" if any(info.dtype == "bfloat16" for info in checkpoints) else "float32"
    return Experiment(Setting(**setting), conditions, checkpoints, files, skipped)


def pooled(values: np.ndarray, weight: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Returns means over the pieces `used` (bool [K]) weighted by tokens, [..., F, K] and [F, K] -> [..., F]; NaN where
    nothing is scored."""
    weight = np.where(used, weight, 0.0)
    with np.errstate(invalid="ignore"):  # 0 / 0
        return (weight * np.where(weight > 0, values, 0.0)).sum(-1) / weight.sum(-1)
