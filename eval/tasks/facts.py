"""Controlled tasks in which facts or habits of the start are needed later: recall, its control, speaker.

As in Moshi, a stream holds two speakers: the user in codebooks 1 and 2 of the user's stream, and Moshi, who answers in
codebook 1 of its own. Only answers are targets; the text is padding. Moshi delays all codebooks but the first by a
frame: column c of the delayed grid holds frame c of codebook 1 and frame c - 1 of codebook 2.
"""

from __future__ import annotations

import math

import numpy as np

from eval.tasks.streams import CARDINALITY, MOSHI, USER, empty
from ttt_jax.data.frames import ABSENT

SYMBOLS = 16
"""Number of keys and of values: ids from 0 in the user's codebooks 1 and 2."""
QUESTION = 31
"""Id in codebook 2 beside a key: asks for the value of the key."""
FILLERS = (32, 64)
"""Range of the ids that fill the rest of the user's codebooks."""
FACTS = 32
"""Frames at the start that hold the facts."""
GAP = 48
"""Frames behind the facts without an answer, more than attention reaches in the models that these tasks are for."""
VOCABULARY = 8
"""Number of tokens that a speaker uses, of `CARDINALITY`."""
LEAST_EVERY = 3
"""Frames for a question, its answer and one more."""


def _silent(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Returns a stream in which the user says fillers and Moshi nothing, int32 [17, T]."""
    stream = empty(frames)
    stream[USER : USER + 2] = rng.integers(*FILLERS, (2, frames))
    return stream


def _spread(rng: np.random.Generator, frames: int, every: int) -> np.ndarray:
    """Returns a column of each of equal parts, of at least `every` frames, of the stream behind `FACTS` and `GAP`.

    The column is not the last of its part, so that an answer fits behind it.
    """
    edges = np.linspace(FACTS + GAP, frames, (frames - FACTS - GAP) // every + 1).astype(int)
    return rng.integers(edges[:-1], edges[1:] - 1)


def _ask(rng: np.random.Generator, stream: np.ndarray, every: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Writes a value for each key, then questions for all keys in turn; returns questions, their keys, all values."""
    facts = rng.permutation(np.arange(1, FACTS))[:SYMBOLS]
    values = rng.integers(SYMBOLS, size=SYMBOLS)
    stream[USER, facts], stream[USER + 1, facts - 1] = np.arange(SYMBOLS), values
    questions = _spread(rng, stream.shape[1], every)
    keys = np.concatenate([rng.permutation(SYMBOLS) for _ in range(0, len(questions), SYMBOLS)])[: len(questions)]
    stream[USER, questions], stream[USER + 1, questions - 1] = keys, QUESTION
    return questions, keys, values


def recall(rng: np.random.Generator, frames: int, every: int) -> np.ndarray:
    """The user gives a value for each of 16 keys and asks for them later; Moshi answers."""
    stream = _silent(rng, frames)
    questions, keys, values = _ask(rng, stream, every)
    stream[MOSHI, questions + 1] = values[keys]
    return stream


def control(rng: np.random.Generator, frames: int, every: int) -> np.ndarray:
    """`recall` with nothing to remember: half of the answers, by chance, are the key, the others are drawn anew."""
    stream = _silent(rng, frames)
    questions, keys, _ = _ask(rng, stream, every)
    stream[MOSHI, questions + 1] = np.where(rng.random(len(keys)) < 0.5, keys, rng.integers(SYMBOLS, size=len(keys)))
    return stream


def speaker(rng: np.random.Generator, frames: int, every: int) -> np.ndarray:
    """Moshi uses 8 of 64 tokens, all equally likely: it speaks through the start, then now and then."""
    stream = _silent(rng, frames)
    spoken = np.concatenate([np.arange(FACTS), _spread(rng, frames, every)])
    stream[MOSHI, spoken] = rng.choice(rng.permutation(CARDINALITY)[:VOCABULARY], len(spoken))
    return stream


def best(task: str, stream: np.ndarray, reach: int) -> np.ndarray:
    """Returns the best possible losses from the last `reach` columns, as `eval.tasks.dataset.best`."""
    nats = np.full(stream.shape[1], np.nan)
    answers = np.flatnonzero(stream[MOSHI] != ABSENT)
    if task == "control":
        wrong = 0.5 / SYMBOLS
        hit = stream[MOSHI, answers] == stream[USER, answers - 1]
        nats[answers] = -np.log(np.where(hit, 0.5 + wrong, wrong))
        return nats
    for t in answers:
        if task == "speaker":
            seen = stream[MOSHI, max(0, t - reach) : t]
            known = np.unique(seen[seen != ABSENT])
            # Candidates for each token of the speaker that was not heard yet.
            unheard = (CARDINALITY - len(known)) / max(1, VOCABULARY - len(known))
            nats[t] = math.log(VOCABULARY) + (0.0 if stream[MOSHI, t] in known else math.log(unheard))
        else:
            # The value stands in the column of the fact or question, or in the next one.
            known = np.flatnonzero(stream[USER, : t - 1] == stream[USER, t - 1])
            nats[t] = 0.0 if (known >= t - reach).any() else math.log(SYMBOLS)
    return nats
