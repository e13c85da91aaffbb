"""Controlled task of spoken recall: excerpts of a stream of random codes come again, word for word.

Moshi speaks in codebook 1: parts of equal length, each new or a replay of an earlier one. It is what
`python -m eval recall` asks for, with a known best loss.

The user's stream is an echo: its codebook 2 says what Moshi says. Moshi delays it by a frame, so every column of the
delayed grid holds a token beside the one before it, as a fact of the task recall stands beside its key. A TTT layer can
then learn what follows what from single columns. It says nothing new, so the best loss is that without it.
"""

from __future__ import annotations

import math

import numpy as np

from eval.tasks.streams import MOSHI, USER, empty

VOCABULARY = 32
"""Number of tokens that Moshi uses, all equally likely."""
REPLAYED = 0.75
"""Chance that a part is a replay, where one is possible."""
NEAREST, FURTHEST = 64, 2000
"""Frames from the start of a part's last playing to the start of its next one."""


def replay(rng: np.random.Generator, frames: int, every: int) -> np.ndarray:
    """Moshi says parts of equal length of random tokens; three of four were said 64 to 2,000 frames before."""
    stream = empty(frames)
    spoken = rng.integers(VOCABULARY, size=frames)
    last: dict[int, int] = {}
    for start in range(0, frames, every):
        candidates = _candidates(last, start)
        source = start
        if candidates and rng.random() < REPLAYED:
            source = candidates[rng.integers(len(candidates))]
        length = min(every, frames - start)
        spoken[start : start + length] = spoken[source : source + length]
        last[source] = start
    stream[MOSHI] = stream[USER + 1] = spoken
    return stream


def _candidates(last: dict[int, int], start: int) -> list[int]:
    """Returns the first frames of parts that can come again at frame `start`; `last`: of their last playings."""
    return [source for source, playing in last.items() if NEAREST <= start - playing <= FURTHEST]


def best(stream: np.ndarray, every: int, reach: int) -> np.ndarray:
    """Returns the best possible losses from the last `reach` columns, as `eval.tasks.dataset.best`.

    The predictor knows where parts begin and what they are made of. It weighs by Bayes' rule whether the part is new or
    which earlier one it repeats; of a part whose last playing it cannot see all tokens are equally likely.
    """
    spoken, nats = stream[MOSHI], np.full(stream.shape[1], np.nan)
    last: dict[int, int] = {}
    for start in range(0, len(spoken), every):
        length = min(every, len(spoken) - start)
        candidates = _candidates(last, start)
        visible = np.array([start - last[source] <= reach for source in candidates], bool)
        new = 1 - REPLAYED if candidates else 1.0
        weight = np.array([new, *(REPLAYED / len(candidates) for _ in candidates)])
        for i in range(length):
            told = np.array([spoken[source + i] == spoken[start + i] for source in candidates], float)
            joint = weight * [1 / VOCABULARY, *np.where(visible, told, 1 / VOCABULARY)]
            nats[start + i] = -math.log(joint.sum())
            weight = joint / joint.sum()
        source = next((source for source in candidates if _same(spoken, source, start, length)), start)
        last[source] = start
    return nats


def _same(spoken: np.ndarray, source: int, start: int, length: int) -> bool:
    return np.array_equal(spoken[source : source + length], spoken[start : start + length])
