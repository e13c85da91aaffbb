"""A recording to codes: audio to the codes of both streams, alignments to the text row. Imports no jax.

Training, `python -m eval prepare` and evaluation all encode audio here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ttt_jax.codec import Codec, CodecInfo
from ttt_jax.data.alignments import MAIN_SPEAKER, Kind, Word, read_beside
from ttt_jax.data.audio.reader import read_blocks
from ttt_jax.data.manifest import Entry, check_duration
from ttt_jax.data.text import ABSENT, Text, Tokenizer, TokenizerInfo, read_text
from ttt_jax.errors import InputError

Voice = Literal["moshi", "user"]
"""The stream of the left or only channel."""
Watch = Callable[[Iterable[np.ndarray]], Iterable[np.ndarray]]
"""Passes on blocks of audio, float32 [channels, n]."""
_BLOCK = 256  # frames encoded at a time; bounds memory
_PIECE = 32  # shorter calls are filled up to a multiple of these frames: few lengths, so few programs of jax

log = logging.getLogger("ttt_jax")


class Encoded(NamedTuple):
    """The codes of a recording."""

    codes: np.ndarray  # int32 [2 * num_codebooks, T]: Moshi's stream, then the user's
    text: np.ndarray | None  # Moshi's, int32 [T]; None if it is not known
    seconds: float  # of audio

    @property
    def frames(self) -> np.ndarray:
        """Text, Moshi's stream and the user's, int32 [1 + 2 * num_codebooks, T]; text that is not known is -1."""
        return join_rows(self.text, self.codes)


class Encoder:
    """Encodes recordings with one codec, from a fresh state for each, and one tokenizer.

    `voice` is the stream of the left or only channel; the right channel is the other stream, silence if there is none.
    """

    def __init__(self, codec: Codec | CodecInfo, tokenizer: Tokenizer | TokenizerInfo, voice: Voice = "moshi") -> None:
        self.codec, self.tokenizer, self.voice = codec, tokenizer, voice
        self._silence: np.ndarray | None = None
        self._silence_state: Any = None
        self._silence_lock = threading.Lock()  # runs side by side read in threads and share an encoder

    def encode(self, entry: Entry, watch: Watch = lambda blocks: blocks) -> Encoded:
        """Returns the codes of an audio file, read block by block; logs which of its words were dropped.

        `watch` gets the blocks at the codec's rate. A duration of NaN in `entry` agrees with any length. Raises
        `InputError` if audio or alignments are unusable.
        """
        codec, path = self.codec, entry.path
        channels, num_samples = encode_blocks(watch(read_blocks(path, codec.sample_rate)), codec)
        seconds = num_samples / codec.sample_rate
        if num_samples < codec.frame_size:
            raise InputError(
                f"{path} lasts {seconds:.3f} s, less than one frame of {1 / codec.frame_rate:.3f} s: give a longer"
                " recording or leave it out."
            )
        check_duration(entry, seconds)
        num_frames, is_mono = channels[0].shape[1], len(channels) == 1
        left, right = channels[0], self.silence(num_frames) if is_mono else channels[1]
        text = self.text(entry, seconds, num_frames, is_mono)
        warn(entry.alignment, text.notice)
        return Encoded(np.concatenate([left, right] if self.voice == "moshi" else [right, left]), text.row, seconds)

    def text(self, entry: Entry, seconds: float, num_frames: int, is_mono: bool = False) -> Text:
        """Returns Moshi's text for `seconds` of audio; in mono the right channel is silent. Raises `InputError`."""
        if entry.alignment is None:
            return Text(None, None)
        if isinstance(self.tokenizer, TokenizerInfo) and read_beside(entry.alignment)[0] is Kind.ALIGNMENTS:
            raise InputError(
                f"{entry.alignment} has the words of {entry.path.name}, but data.codec='files' brings no tokenizer for"
                " them: give data.tokenizer, or remove the words."
            )

        def is_moshis(word: Word) -> bool:
            is_left = word.speaker == MAIN_SPEAKER
            return is_left if self.voice == "moshi" else not (is_left or is_mono)

        return read_text(entry.alignment, seconds, num_frames, self.tokenizer, self.codec.frame_rate, is_moshis)

    def silence(self, num_frames: int) -> np.ndarray:
        """Returns the codes of silence, int32 [num_codebooks, num_frames], equal to `codec.encode` of zeros."""
        codec = self.codec
        with self._silence_lock:
            if self._silence is None:
                self._silence = np.empty((codec.num_codebooks, 0), np.int32)
                self._silence_state = codec.init_encoder(1)
            for start in range(self._silence.shape[1], num_frames, _BLOCK):
                zeros = np.zeros((1, min(_whole(num_frames - start), _BLOCK) * codec.frame_size), np.float32)
                codes, self._silence_state = codec.encode_step(zeros, self._silence_state)
                # At once: codes and state must agree if the next call is interrupted.
                self._silence = np.concatenate([self._silence, codes[0]], axis=1)
            return self._silence[:, :num_frames]


def encode_blocks(blocks: Iterable[np.ndarray], codec: Codec) -> tuple[np.ndarray, int]:
    """Encodes blocks of audio, float32 [channels, n], any n, at the codec's rate; channels are rows of one batch.

    Returns int32 [channels, num_codebooks, T], T = ceil(samples / frame_size), of each channel equal to `codec.encode`
    of the whole; and the number of samples. No blocks have no channels.
    """
    size, num_samples = codec.frame_size, 0
    rest: np.ndarray | None = None
    state: Any = None
    codes = []
    for block in blocks:
        if rest is None:
            rest, state = block[:, :0], codec.init_encoder(len(block))
        num_samples += block.shape[1]
        rest = np.concatenate([rest, block], axis=1)
        while rest.shape[1] >= _BLOCK * size:
            block_codes, state = codec.encode_step(rest[:, : _BLOCK * size], state)
            codes.append(block_codes)
            rest = rest[:, _BLOCK * size :].copy()  # a view would keep the block in memory
    if rest is None:
        return np.empty((0, codec.num_codebooks, 0), np.int32), 0
    count = -(-rest.shape[1] // size)
    filled = _whole(count) * size
    block_codes, _ = codec.encode_step(np.pad(rest, ((0, 0), (0, filled - rest.shape[1]))), state)
    return np.concatenate([*codes, block_codes[:, :, :count]], axis=2), num_samples


def _whole(num_frames: int) -> int:
    """Returns the number of frames filled up to a multiple of `_PIECE`."""
    return -(-num_frames // _PIECE) * _PIECE


def join_rows(text: np.ndarray | None, *codes: np.ndarray) -> np.ndarray:
    """Returns a text row int32 [T], or -1 for None, above codes int [K, T]: int32 [1 + K, T]."""
    row = np.full(codes[0].shape[1], ABSENT, np.int32) if text is None else text
    return np.concatenate([row[None], *codes]).astype(np.int32)


def warn(path: Path | None, notice: str | None) -> None:
    """Logs `Text.notice` on the words in `path`, if there is one."""
    if notice is not None:
        log.warning("%s: %s", path, notice)


def codec_missing(path: Path) -> InputError:
    """Returns the error for audio where the codec is known by code files only."""
    return InputError(
        f"{path} is audio, but data.codec='files' reads code files only: make codes of it with the codec of the other"
        " files (docs/data.md), or give data.codec the codec itself."
    )
