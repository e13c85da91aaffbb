"""Word times for the prompts of the corpus: forced alignment for English, an even spread for other languages.

Needs numpy; `Aligner` also needs PyPI's pocketsphinx, whose wheel holds the English acoustic model and dictionary.
"""

from __future__ import annotations

import re

import numpy as np

from ttt_jax.data.alignments import MAIN_SPEAKER, Word

RATE = 16000
HOP = 160  # 10 ms
_THRESHOLD = 35.0  # dB below the loud frames of a prompt at which a frame counts as silent
_BRIDGE = 12  # frames: silences this short belong to the speech around them (stops, closures)
_PRONOUNCED = {  # words of the prompts that pocketsphinx's dictionary lacks
    "digium": "D IH JH IY AH M",
    "prepend": "P R IY P EH N D",
    "prepending": "P R IY P EH N D IH NG",
    "rerecord": "R IY R AH K AO R D",
    "undelete": "AH N D IH L IY T",
    "unmute": "AH N M Y UW T",
    "unmuted": "AH N M Y UW T AH D",
}


def voiced_frames(audio: np.ndarray) -> np.ndarray:
    """Returns whether each 10 ms of float32 [samples] at 16 kHz is loud enough for speech, bool [frames]."""
    count = max(1, len(audio) // HOP)
    padded = np.pad(audio.astype(np.float64), (HOP // 2, HOP + HOP // 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * HOP)[::HOP][:count]
    level = 10 * np.log10(np.mean(windows**2, axis=1) + 1e-12)
    voiced = level > np.percentile(level, 95) - _THRESHOLD
    edges = np.flatnonzero(voiced)
    for left, right in zip(edges[:-1], edges[1:], strict=True):
        if right - left <= _BRIDGE:
            voiced[left:right] = True
    return voiced


def timed(text: str, first: int, last: int) -> Word:
    """Returns a word that lasts from one frame of 10 ms to another."""
    return Word(text, first * HOP / RATE, (last + 1) * HOP / RATE, MAIN_SPEAKER)


def spread(words: list[str], voiced: np.ndarray) -> list[Word]:
    """Returns the words spread over the voiced frames in proportion to their letters; pauses stay free."""
    letters = np.cumsum([0] + [max(1, len(re.sub(r"\W", "", word))) for word in words])
    frames = np.flatnonzero(voiced)
    marks = (letters / letters[-1] * len(frames)).astype(int)
    spans = zip(words, marks[:-1], marks[1:], strict=True)
    return [timed(word, frames[start], frames[max(start, end - 1)]) for word, start, end in spans]


class Aligner:
    """Forced alignment of English words by pocketsphinx's bundled model."""

    def __init__(self):
        import pocketsphinx

        self._decoder = pocketsphinx.Decoder(lm=None, loglevel="FATAL", samprate=RATE)
        for word, phones in _PRONOUNCED.items():
            self._decoder.add_word(word, phones, True)

    def align(self, words: list[str], audio: np.ndarray) -> list[Word] | None:
        """Returns the words' times in float32 [samples] at 16 kHz; None if a word is unknown or no path is found."""
        parts = [re.findall(r"[a-z']+", word.lower()) for word in words]
        if not all(parts) or any(self._decoder.lookup_word(part) is None for word in parts for part in word):
            return None
        self._decoder.set_align_text(" ".join(part for word in parts for part in word))
        self._decoder.start_utt()
        self._decoder.process_raw((audio * 32767).astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        segments = self._decoder.seg()
        found = [] if segments is None else [s for s in segments if not re.match(r"[<\[+]", s.word)]
        if [re.sub(r"\(\d+\)$", "", s.word) for s in found] != [part for word in parts for part in word]:
            return None
        ends = np.cumsum([len(pieces) for pieces in parts])
        spans = zip(words, ends - [len(pieces) for pieces in parts], ends - 1, strict=True)
        return [timed(word, found[start].start_frame, found[end].end_frame) for word, start, end in spans]
