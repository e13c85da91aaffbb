"""Speech of one speaker, from which excerpts and fillers are drawn. Imports no jax."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.inputs.dataset import EvalFile

CHANGING = 0.5
"""Least share of an excerpt's frames whose semantic code differs from that of the frame before: silence hardly
changes."""


class Pool:
    """All speech of a speaker, the recordings one after the other."""

    def __init__(self, unit: str, files: Sequence[EvalFile], excerpt: int):
        self.unit, self.excerpt = unit, excerpt
        self.frames = np.concatenate([file.frames for file in files], 1)
        self.named = any(file.group != file.name for file in files)
        """Whether the data names the speaker; else it is a file, whose speaker others may share."""
        self._files = [file.name for file in files]
        self._begins = np.cumsum([0, *(file.frames.shape[1] for file in files)])
        cuts = [begin + cut for begin, file in zip(self._begins, files, strict=False) for cut in (0, *file.boundaries)]
        self.starts = _starts(self.frames, cuts, excerpt)
        """Frames at which an excerpt can start, int [N]."""
        self._keys = _keys(self.frames[1:], excerpt // 2)

    @property
    def length(self) -> int:
        """Frames of speech."""
        return self.frames.shape[1]

    def draw(self, rng: np.random.Generator, count: int = 2) -> list[int] | None:
        """Returns starts of `count` excerpts, 1 or 2, that do not overlap; None if this draw found none."""
        if not len(self.starts):
            return None
        first = int(rng.choice(self.starts))
        others = self.starts[np.abs(self.starts - first) >= self.excerpt]
        if count == 1:
            return [first]
        return [first, int(rng.choice(others))] if len(others) else None

    def cut(self, start: int) -> np.ndarray:
        """Returns the excerpt at `start`."""
        return self.frames[:, start : start + self.excerpt]

    def place(self, start: int) -> str:
        """Returns file and frame of `start`."""
        file = int(np.searchsorted(self._begins, start, "right")) - 1
        return f"{self._files[file]}@{start - self._begins[file]}"

    def fill(self, frames: int, without: Sequence[int], rng: np.random.Generator) -> np.ndarray | None:
        """Returns `frames` frames in their order, without the excerpts at `without`; None if this draw found none.

        Speech that repeats half an excerpt or more (a recording that is there twice) is no filler.
        """
        at = rng.random()
        rest = np.ones(self.length, bool)
        for start in without:
            rest[start : start + self.excerpt] = False
        places = np.flatnonzero(rest)
        if len(places) < frames:
            return None
        begin = int(at * (len(places) - frames + 1))
        taken = places[begin : begin + frames]
        runs = [self._keys[start : start + self.excerpt - self.excerpt // 2 + 1] for start in without]
        filled = self._keys[taken[taken < len(self._keys)]]
        if any(np.isin(filled, run).any() for run in runs) or (len(runs) > 1 and np.isin(*runs).any()):
            return None
        return self.frames[:, taken]


def _starts(frames: np.ndarray, cuts: Sequence[int], excerpt: int) -> np.ndarray:
    """Returns where excerpts can start that lie in one recording and are not mostly silence.

    Args:
      frames: tokens [17, T]; cuts: frames at which a recording begins.
    """
    semantic = frames[1]
    changes = (semantic >= 0) & (semantic != np.roll(semantic, 1))
    count = np.concatenate([[0], np.cumsum(changes)])
    if len(semantic) < excerpt:
        return np.zeros(0, int)
    starts = np.arange(len(semantic) - excerpt + 1)
    recording = np.searchsorted(np.sort(cuts), np.arange(len(semantic)), "right")
    whole = recording[starts] == recording[starts + excerpt - 1]
    return starts[whole & (count[starts + excerpt] - count[starts] >= CHANGING * excerpt)]


def _keys(codes: np.ndarray, length: int) -> np.ndarray:
    """Returns a number for each run of `length` frames that is the same where the codes are, uint64 [T - length + 1].

    Runs that differ share a number with a chance of about 2^-64.
    """
    factors = np.random.default_rng(0).integers(1 << 62, size=len(codes) + length, dtype=np.uint64) * 2 + 1
    columns = (codes.astype(np.uint64) * factors[: len(codes), None]).sum(0, dtype=np.uint64)
    count = max(0, codes.shape[1] - length + 1)
    keys = np.zeros(count, np.uint64)
    for i, factor in enumerate(factors[len(codes) :]):
        keys += columns[i : i + count] * factor
    return keys
