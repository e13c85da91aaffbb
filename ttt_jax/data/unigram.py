"""The memory-less baseline: how often each token occurs in the training data, stream by stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

FRAMES = 500_000
"""Frames that a baseline is fitted to, 11 hours; more would not change it visibly."""


def some(recordings: Iterable[Any], frames: int = FRAMES) -> Iterator[np.ndarray]:
    """Yields the tokens of the first of `recordings`, each whole, until there are so many frames."""
    for recording in recordings:
        if frames <= 0:
            return
        frames -= recording.num_frames
        yield recording.read()


def fit(files: Iterable[np.ndarray], cardinalities: Iterable[int]) -> list[np.ndarray]:
    """Returns a table of log-probabilities, float64 [cardinality], for each stream; one is added to every count.

    `files` are int32 [S, T_i] tokens, negative if absent. `cardinalities` are those of the first streams, text first;
    streams behind these are ignored.
    """
    counts = [np.ones(cardinality) for cardinality in cardinalities]
    for file in files:
        for count, tokens in zip(counts, file, strict=False):
            count += np.bincount(tokens[tokens >= 0], minlength=len(count))
    return [np.log(count / count.sum()) for count in counts]


def nats(tables: Sequence[np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Returns the cross-entropy of every token under `fit`'s tables.

    Tokens int32 [..., S, T] give float64 [..., len(tables), T]; NaN for absent tokens.
    """
    streams = [
        np.where(tokens[..., i, :] >= 0, -table[np.maximum(tokens[..., i, :], 0)], np.nan)
        for i, table in enumerate(tables)
    ]
    return np.stack(streams, axis=-2)
