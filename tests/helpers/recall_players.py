"""Speech for items of recall, and players that are no model: it is known what each of them recalls."""

import zlib

import numpy as np

from eval.inputs.dataset import EvalFile

UNKNOWN = 3.0
"""Nats of a token that a player does not know."""
CODEC = {"name": "a codec", "digest": "0"}


def speech(frames, seed=0, name=None, group=None, boundaries=()):
    """A file of random tokens, of which no two frames are alike by chance."""
    codes = np.random.default_rng(seed).integers(0, 64, (17, frames)).astype(np.int32)
    name = name or f"file{seed}"
    return EvalFile(name, group or name, codes, boundaries, CODEC)


def _as_scores(nats):
    """Nats by frame [T] as those of a text and 8 codebooks, under the arm persist; under reset nothing is known."""
    return {
        arm: np.repeat(values[None], 9, 0) for arm, values in {"persist": nats, "reset": 0 * nats + UNKNOWN}.items()
    }


def _before(stream, run):
    """For each frame, that of the earlier one which follows the same `run` frames; -1 if there is none."""
    found, last = np.full(stream.shape[1], -1), {}
    for t in range(run, stream.shape[1]):
        key = stream[:, t - run : t].tobytes()
        found[t] = last.get(key, -1)
        last.setdefault(key, t)
    return found


def perfect_buffer(streams):
    """Knows every token as soon as it can tell what is being repeated: from 4 frames."""
    return forgetting(np.inf)(streams)


def forgetting(half):
    """A buffer whose memory of a frame halves every `half` frames."""

    def player(streams):
        scores = []
        for stream in streams:
            at = _before(stream, 4)
            age = np.arange(stream.shape[1]) - at
            scores.append(_as_scores(UNKNOWN * (1 - np.where(at >= 0, 0.5 ** (age / half), 0))))
        return scores

    return player


def memoryless(streams):
    """The loss of a frame depends on its tokens alone, whatever they are."""
    columns = [[zlib.crc32(frame.tobytes()) % 1000 / 250 for frame in stream.T] for stream in streams]
    return [_as_scores(np.array(nats)) for nats in columns]


def dice(seed):
    """Losses that have nothing to do with the stream."""
    rng = np.random.default_rng(seed)
    return lambda streams: [_as_scores(rng.gamma(4.0, 1.0, stream.shape[1])) for stream in streams]


def knows_voices(streams):
    """Knows a voice (what codebook 1 of `voice` says) that has spoken more than 20 frames before this frame."""
    scores = []
    for stream in streams:
        voices = stream[2]
        first = {voice: int(np.argmax(voices == voice)) for voice in np.unique(voices)}
        # The second playing is a voice's second turn if another one has spoken in between.
        turns = np.cumsum(np.diff(voices, prepend=voices[0]) != 0)
        known = [turns[t] > turns[first[voice]] for t, voice in enumerate(voices)]
        scores.append(_as_scores(np.where(known, 1.0, UNKNOWN)))
    return scores


def voice(frames, seed, number):
    """Random speech of a speaker who is called by, and known from, a number."""
    file = speech(frames, seed, f"file{seed}", f"speaker{number}")
    file.frames[2] = number
    return file
