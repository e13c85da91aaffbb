"""The interface of codecs, and what is common to them: whole recordings as streams, checks of audio and codes."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from ttt_jax.errors import InputError


class Codec(abc.ABC):
    """Turns audio into codes and back. Data, training and evaluation use nothing beyond this class.

    A codec reads and writes a batch of streams, B rows, each at its own place. Where the stream of a row stands is a
    value, the state, which is passed in and returned. A state is passed on once, as its memory may be used again;
    `fork` copies one that is to be passed on twice. A frame that the mask leaves out takes no place in its row's
    stream, whatever it holds: its codes are -1, its audio is 0. Codes depend on no later sample, audio on no later
    code, and any split of a stream into calls and batches gives the same codes and audio.
    """

    name: str  # stored with every result, e.g. "melkmeans-8x64"
    digest: str  # SHA-256, hex, of all that codes depend on: equal digests mean equal codes
    sample_rate: int  # samples a second that `encode` takes and `decode` returns
    frame_rate: float  # frames a second: `ttt_jax.config.FRAME_RATE`
    frame_size: int  # samples of a frame, sample_rate / frame_rate
    num_codebooks: int  # rows of the codes, the coarsest first: 8 for Moshi
    cardinality: int  # entries of a codebook; codes lie in [0, cardinality)

    @abc.abstractmethod
    def init_encoder(self, batch: int) -> Any:
        """The state of `batch` streams of audio before their first sample."""

    @abc.abstractmethod
    def encode_step(self, audio: np.ndarray, state: Any, mask: np.ndarray | None = None) -> tuple[np.ndarray, Any]:
        """The next whole frames of each stream, float [B, n * frame_size], and the state before them
        -> int32 [B, num_codebooks, n] and the state after them.

        `mask`, bool [B, n], says which frames there are; None: all. Raises `InputError` for another shape, or audio
        that is not finite in a frame that the mask keeps.
        """

    @abc.abstractmethod
    def init_decoder(self, batch: int) -> Any:
        """The state of `batch` streams of codes before their first frame."""

    @abc.abstractmethod
    def decode_step(self, codes: np.ndarray, state: Any, mask: np.ndarray | None = None) -> tuple[np.ndarray, Any]:
        """The next frames of each stream, int [B, num_codebooks, n], and the state before them
        -> float32 [B, n * frame_size] and the state after them.

        `mask` as in `encode_step`. Raises `InputError` for another shape, or codes outside [0, cardinality) in a frame
        that the mask keeps.
        """

    @abc.abstractmethod
    def fork(self, state: Any) -> Any:
        """Returns a copy of an encoder's or a decoder's state: both may be passed on."""

    @abc.abstractmethod
    def reset(self, state: Any, rows: np.ndarray) -> Any:
        """Returns an encoder's or a decoder's state in which the streams of `rows`, bool [B], begin anew."""

    def encode(self, audio: np.ndarray) -> np.ndarray:
        """float [samples], one channel -> int32 [num_codebooks, T], T = ceil(samples / frame_size).

        The last frame is filled up with zeros. Raises `InputError` as `encode_step`.
        """
        return self.encode_batch([audio])[0]

    def encode_batch(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        """`encode` of each recording; they are rows of one batch and may differ in length, each at the cost of the
        longest."""
        for audio in recordings:
            check_channel(audio)
        size = self.frame_size
        lengths = [-(-len(audio) // size) for audio in recordings]
        padded = np.zeros((len(recordings), max(lengths, default=0) * size), np.float32)
        for row, audio in zip(padded, recordings, strict=True):
            row[: len(audio)] = audio
        codes, _ = self.encode_step(padded, self.init_encoder(len(recordings)), _first(lengths))
        return [row[:, :length] for row, length in zip(codes, lengths, strict=True)]

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int [num_codebooks, T] in [0, cardinality) -> float32 [T * frame_size]. Raises `InputError`."""
        return self.decode_batch([codes])[0]

    def decode_batch(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """`decode` of each stream of codes; they are rows of one batch and may differ in length."""
        codes = [check_codes(self, np.asarray(row)[None])[0][0] for row in codes]
        lengths = [row.shape[1] for row in codes]
        padded = np.zeros((len(codes), self.num_codebooks, max(lengths, default=0)), np.int32)
        for row, stream in zip(padded, codes, strict=True):
            row[:, : stream.shape[1]] = stream
        audio, _ = self.decode_step(padded, self.init_decoder(len(codes)), _first(lengths))
        return [row[: length * self.frame_size] for row, length in zip(audio, lengths, strict=True)]


def check_channel(audio: np.ndarray) -> None:
    """Raises `InputError` if `audio` is not one channel of floats."""
    audio = np.asarray(audio)
    if audio.ndim != 1 or not np.issubdtype(audio.dtype, np.floating):
        raise InputError(
            f"the codec got {audio.dtype} audio of shape {list(audio.shape)}, but takes one channel of floats,"
            " [samples]: mix or choose channels first, full scale 1."
        )


def check_audio(codec: Codec, audio: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the audio of `Codec.encode_step`, float32 [B, n * frame_size] with 0 in frames that are left out, and its
    mask, bool [B, n]. Raises `InputError`."""
    audio, size = np.asarray(audio), codec.frame_size
    if audio.ndim != 2 or not np.issubdtype(audio.dtype, np.floating):
        raise InputError(
            f"encode_step got {audio.dtype} audio of shape {list(audio.shape)}, expected floats of shape [rows,"
            " samples]: give one channel a row, full scale 1."
        )
    if audio.shape[1] % size:
        raise InputError(
            f"encode_step got {audio.shape[1]} samples a row, which is no multiple of frame_size={size}: give whole"
            " frames and keep the rest for the next call."
        )
    mask = check_mask(mask, (len(audio), audio.shape[1] // size))
    if not mask.all():
        audio = np.where(mask[..., None], audio.reshape(*mask.shape, size), 0).reshape(audio.shape)
    audio = audio.astype(np.float32, copy=False)
    if not np.isfinite(audio).all():
        row, sample = np.argwhere(~np.isfinite(audio))[0]
        raise InputError(
            f"the codec got audio whose sample {sample} (row {row}) is not finite: mend the recording or leave it out."
        )
    return audio, mask


def check_codes(codec: Codec, codes: np.ndarray, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the codes of `Codec.decode_step`, int32 [B, num_codebooks, n] with 0 in frames that are left out, and
    their mask, bool [B, n]. Raises `InputError`."""
    codes = np.asarray(codes)
    if codes.ndim != 3 or codes.shape[1] != codec.num_codebooks or not np.issubdtype(codes.dtype, np.integer):
        raise InputError(
            f"decode got {codes.dtype} codes of shape {list(codes.shape[codes.ndim == 3 :])}, but {codec.name} needs"
            f" integers of shape [{codec.num_codebooks}, T]: give the codes of one stream."
        )
    mask = check_mask(mask, (len(codes), codes.shape[2]))
    codes = np.where(mask[:, None], codes, 0)
    if codes.size and (codes.min() < 0 or codes.max() >= codec.cardinality):
        raise InputError(
            f"decode got codes from {codes.min()} to {codes.max()}, but {codec.name} has entries 0 to"
            f" {codec.cardinality - 1}: drop absent (-1) and special tokens first."
        )
    return codes.astype(np.int32, copy=False), mask


def check_mask(mask: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a mask, bool [B, n] or [B]; None stands for all. Raises `InputError` for another shape or type."""
    if mask is None:
        return np.ones(shape, bool)
    mask = np.asarray(mask)
    if mask.shape != shape or mask.dtype != bool:
        raise InputError(
            f"the codec got a {mask.dtype} mask of shape {list(mask.shape)}, expected bool of shape {list(shape)}: give"
            f" one value for each {'frame of each row' if len(shape) > 1 else 'row'}."
        )
    return mask


def _first(lengths: Sequence[int]) -> np.ndarray:
    """The mask of rows of `lengths` frames, bool [B, longest]."""
    return np.arange(max(lengths, default=0)) < np.asarray(lengths, int)[:, None]
