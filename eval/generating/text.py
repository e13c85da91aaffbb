"""What Moshi says, with times: words, subtitles (WebVTT) and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.config import FRAME_RATE
from ttt_jax.data.text import EPAD, PAD, Tokenizer, TokenizerInfo

PAUSE = 1.0
"""Seconds without text that end a word and a subtitle."""
LONGEST, WIDEST = 6.0, 80
"""Seconds and characters of a subtitle at most."""


class Spoken(NamedTuple):
    """A word, or several."""

    text: str
    start: float
    """Seconds from the recording's beginning."""
    end: float


class Counts(NamedTuple):
    """Text tokens of a talk."""

    pad: int
    """Frames without text."""
    epad: int
    """Frames before a word."""
    text: int
    """Frames with a piece of a word."""


def counts(tokens: np.ndarray) -> Counts:
    """Returns how many of the text tokens, int [T], are of each kind; absent ones (-1) are of none."""
    pad, epad = int((tokens == PAD).sum()), int((tokens == EPAD).sum())
    return Counts(pad, epad, int((tokens >= 0).sum()) - pad - epad)


def words(tokens: np.ndarray, tokenizer: Tokenizer | TokenizerInfo) -> list[Spoken]:
    """Returns the words in a text row, int [T]: from the first frame of a word's tokens to the end of the last.

    A piece that begins no word belongs to the one before, unless a pause lies between. Without a tokenizer each token
    is a word of its own, [ID].
    """
    found: list[list[int]] = []
    for frame in np.flatnonzero((tokens >= 0) & (tokens != EPAD) & (tokens != PAD)):
        is_first = isinstance(tokenizer, TokenizerInfo) or tokenizer.begins_word(tokens[frame])
        if is_first or not found or frame - found[-1][-1] - 1 >= PAUSE * FRAME_RATE:
            found.append([])
        found[-1].append(int(frame))
    spoken = []
    for frames in found:
        ids = tokens[frames]
        text = f"[{ids[0]}]" if isinstance(tokenizer, TokenizerInfo) else tokenizer.decode(ids).strip()
        if text:
            spoken.append(Spoken(text, frames[0] / FRAME_RATE, (frames[-1] + 1) / FRAME_RATE))
    return spoken


def subtitles(spoken: Sequence[Spoken]) -> list[Spoken]:
    """Returns the words as lines, broken at pauses."""
    lines: list[Spoken] = []
    for word in spoken:
        if lines:
            last = lines[-1]
            joined = Spoken(f"{last.text} {word.text}", last.start, word.end)
            fits = len(joined.text) <= WIDEST and joined.end - joined.start <= LONGEST
            if fits and word.start - last.end < PAUSE:
                lines[-1] = joined
                continue
        lines.append(word)
    return lines


def webvtt(spoken: Sequence[Spoken]) -> str:
    """Returns words as a WebVTT file: a cue for each line of `subtitles`."""
    cues = ["WEBVTT"]
    for line in subtitles(spoken):
        text = line.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        cues.append(f"{_clock(line.start)} --> {_clock(line.end)}\n{text}")
    return "\n\n".join(cues) + "\n"


def _clock(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}.{rest % 1000:03d}"


def as_json(name: str, tokens: np.ndarray, spoken: Sequence[Spoken]) -> dict[str, Any]:
    """Returns the content of a talk's text file: the whole text, words with seconds, and the token of each frame."""
    return {
        "file": name,
        "text": " ".join(word.text for word in spoken),
        "words": [word._asdict() for word in spoken],
        "frames_per_second": FRAME_RATE,
        "tokens": tokens.tolist(),
    }
