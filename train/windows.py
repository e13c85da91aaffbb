"""Batches whose rows follow files: a row reads one file chunk by chunk to its end, then takes the next.

The rows take files from one endless list, the corpus reshuffled over and over. Everything random is a function of the
seed and of a file's place in that list, so the position is a few integers and a resumed run continues exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.errors import InputError


class Batch(NamedTuple):
    """One chunk of every row."""

    frames: np.ndarray
    """int32 [B, S, T]: tokens of S streams; -1 past the end of a row's file."""
    mask: np.ndarray
    """bool [B, T]: False past the end of a row's file."""
    reset: np.ndarray
    """bool [B]: True where a row starts a file with this chunk."""


class Windows:
    """Endless iterator of `Batch`.

    A row that takes a file starts at a random offset of less than one chunk, so that chunk boundaries, where gradients
    are cut, fall elsewhere in every pass; the frames before it are left out of that pass. A chunk never holds frames of
    two files.

    Args:
        files: one int32 [S, T_i] array of tokens per file, T_i >= 1.
        batch: rows B.
        chunk: frames T of a chunk.
        seed: of the order of files and the offsets.
    """

    def __init__(self, files: Sequence[np.ndarray], batch: int, chunk: int, seed: int):
        if not files:
            raise InputError("the training manifest names no files: give one line per file.")
        self._files = files
        self._chunk = chunk
        self._seed = seed
        self._taken = batch
        self._rows = [(place, self._offset(place)) for place in range(batch)]

    def __iter__(self) -> Windows:
        return self

    def __next__(self) -> Batch:
        streams = self._files[0].shape[0]
        frames = np.full((len(self._rows), streams, self._chunk), -1, np.int32)
        mask = np.zeros((len(self._rows), self._chunk), bool)
        reset = np.zeros(len(self._rows), bool)
        for row, (place, position) in enumerate(self._rows):
            file = self._files[self._index(place)]
            part = file[:, position : position + self._chunk]
            frames[row, :, : part.shape[1]] = part
            mask[row, : part.shape[1]] = True
            reset[row] = position == self._offset(place)
            self._rows[row] = (place, position + self._chunk)
            if position + self._chunk >= file.shape[1]:
                self._rows[row] = (self._taken, self._offset(self._taken))
                self._taken += 1
        return Batch(frames, mask, reset)

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON holds it."""
        return {"taken": self._taken, "rows": [list(row) for row in self._rows]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position that `get_state` gave for the same files, rows, chunk and seed."""
        self._taken = state["taken"]
        self._rows = [(place, position) for place, position in state["rows"]]

    def _index(self, place: int) -> int:
        """The file at `place` in the endless list."""
        passes, within = divmod(place, len(self._files))
        return int(_order(self._seed, passes, len(self._files))[within])

    def _offset(self, place: int) -> int:
        """First frame read of the file at `place`: under one chunk, and inside the file."""
        frames = self._files[self._index(place)].shape[1]
        return int(np.random.default_rng((self._seed, 0, place)).integers(min(self._chunk, frames)))


# A long corpus takes long to shuffle, and rows look files up in this pass and, around its end, in the next.
@functools.lru_cache(maxsize=2)
def _order(seed: int, passes: int, count: int) -> np.ndarray:
    """The files' numbers in the order of pass `passes` through the corpus, int [count]."""
    return np.random.default_rng((seed, passes)).permutation(count)
