"""Laws that every codec keeps, for its encoder and its decoder.

A test file makes the two streams of its codec, `encoding` and `decoding`, and calls each of `LAWS` with both; then
`check_recordings` and `check_errors`. All calls have one of four shapes, since codecs may compile for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from ttt_jax.codec import Codec
from ttt_jax.errors import InputError

ROWS, FRAMES = 3, 6
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 0]], bool)


class Stream(NamedTuple):
    """A codec's encoder or decoder as a function of frames."""

    init: Callable[[int], Any]
    step: Callable[..., tuple[np.ndarray, Any]]
    """Frames [B, n, width], a state and a mask or nothing -> frames [B, n, width] and the next state."""
    fork: Callable[[Any], Any]
    reset: Callable[[Any, np.ndarray], Any]
    frames: np.ndarray
    """[ROWS, 2 * FRAMES, width], all different: what the stream reads."""
    hole: float
    """What a frame that is left out may hold, though no other may."""
    absent: float
    """What a frame that is left out gives."""
    atol: float
    """Largest difference between results that are equal by law."""

    def is_equal(self, got: np.ndarray, expected: np.ndarray) -> None:
        np.testing.assert_allclose(got, expected, rtol=0, atol=self.atol, strict=True)


def encoding(codec: Codec, audio: np.ndarray) -> Stream:
    """The encoder of `codec`; `audio`, float32 [samples], has ROWS * 2 * FRAMES frames at least."""

    def step(frames, state, *mask):
        codes, state = codec.encode_step(frames.reshape(len(frames), -1), state, *mask)
        assert codes.shape == (len(frames), codec.num_codebooks, frames.shape[1])
        assert codes.dtype == np.int32
        return np.moveaxis(codes, 1, 2), state

    frames = audio[: ROWS * 2 * FRAMES * codec.frame_size].reshape(ROWS, 2 * FRAMES, -1)
    return Stream(codec.init_encoder, step, codec.fork, codec.reset, frames, np.nan, -1, 0)


def decoding(codec: Codec, audio: np.ndarray, atol: float) -> Stream:
    """The decoder of `codec`, which reads the codes of `audio`; samples may differ by `atol`."""

    def step(frames, state, *mask):
        samples, state = codec.decode_step(np.moveaxis(frames, 2, 1), state, *mask)
        assert samples.shape == (len(frames), frames.shape[1] * codec.frame_size)
        assert samples.dtype == np.float32
        return samples.reshape(*frames.shape[:2], -1), state

    encoder = encoding(codec, audio)
    first, state = encoder.step(encoder.frames[:, :FRAMES], encoder.init(ROWS))
    codes = np.concatenate([first, encoder.step(encoder.frames[:, FRAMES:], state)[0]], 1)
    return Stream(codec.init_decoder, step, codec.fork, codec.reset, codes, -1, 0, atol)


def blocks_give_what_the_whole_gives(stream: Stream) -> None:
    """Also where frames are left out, and in what follows: the states say the same."""
    frames, after = np.where(MASK[..., None], stream.frames[:, :FRAMES], stream.hole), stream.frames[:, FRAMES:]
    frames = frames.astype(stream.frames.dtype)
    whole, state = stream.step(frames, stream.init(ROWS), MASK)
    rest, _ = stream.step(after, state)
    assert (whole[~MASK] == stream.absent).all()
    for size in (1, 3):
        state, parts = stream.init(ROWS), []
        for start in range(0, FRAMES, size):
            part, state = stream.step(frames[:, start : start + size], state, MASK[:, start : start + size])
            parts.append(part)
        stream.is_equal(np.concatenate(parts, 1), whole)
        stream.is_equal(stream.step(after, state)[0], rest)


def a_row_is_its_frames_alone(stream: Stream) -> None:
    """Neither other rows nor frames that are left out change it: it pauses there."""
    frames = np.where(MASK[..., None], stream.frames[:, :FRAMES], stream.hole).astype(stream.frames.dtype)
    together, state = stream.step(frames, stream.init(ROWS), MASK)
    rest, _ = stream.step(stream.frames[:, FRAMES:], state)
    for row, mask in enumerate(MASK):
        alone = np.full_like(frames[:1], stream.hole)
        alone[:, : mask.sum()] = frames[row, mask]
        got, state = stream.step(alone, stream.init(1), np.arange(FRAMES)[None] < mask.sum())
        stream.is_equal(got[0, : mask.sum()], together[row, mask])
        stream.is_equal(stream.step(stream.frames[row, None, FRAMES:], state)[0][0], rest[row])


def no_mask_is_a_mask_of_all(stream: Stream) -> None:
    frames = stream.frames[:, :FRAMES]
    both = [stream.step(frames, stream.init(ROWS), *mask)[0] for mask in ((), (np.ones_like(MASK),))]
    stream.is_equal(*both)


def a_reset_row_begins_anew_and_no_other(stream: Stream) -> None:
    before, after = stream.frames[:, :FRAMES], stream.frames[:, FRAMES:]
    _, state = stream.step(before, stream.init(ROWS))
    going, fresh = stream.step(after, stream.fork(state))[0], stream.step(after, stream.init(ROWS))[0]
    rows = np.array([False, True, False])
    got, _ = stream.step(after, stream.reset(state, rows))
    stream.is_equal(got, np.where(rows[:, None, None], fresh, going))
    assert (going != fresh).any(axis=(1, 2)).all(), "the law says nothing where a fresh row gives the same"


def a_fork_is_a_value(stream: Stream) -> None:
    """Neither a step nor a reset of a state changes its copies, whose future is the same."""
    frames = stream.frames[:, :FRAMES].copy()
    _, state = stream.step(frames, stream.init(ROWS))
    fork, kept = stream.fork(state), jax.tree.map(np.array, state)
    frames[:] = frames[::-1].copy()
    got, after = stream.step(frames, state)
    stream.step(frames, after, MASK)
    stream.reset(stream.fork(fork), np.ones(ROWS, bool))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, fork), kept)
    np.testing.assert_array_equal(stream.step(frames, fork)[0], got)


LAWS = (
    blocks_give_what_the_whole_gives,
    a_row_is_its_frames_alone,
    no_mask_is_a_mask_of_all,
    a_reset_row_begins_anew_and_no_other,
    a_fork_is_a_value,
)


def check_recordings(codec: Codec, audio: np.ndarray, atol: float) -> None:
    """Recordings of any lengths may be one batch; codes see no later sample, audio no later code."""
    whole = audio[: FRAMES * codec.frame_size]
    recordings = [whole, whole[: 2 * codec.frame_size], whole[:-100]]
    codes = codec.encode_batch(recordings)
    assert [row.shape for row in codes] == [(codec.num_codebooks, n) for n in (FRAMES, 2, FRAMES)]
    np.testing.assert_array_equal(codes[0], codec.encode(whole))
    np.testing.assert_array_equal(codes[1], codes[0][:, :2])
    filled = np.pad(whole[:-100], (0, 100))
    np.testing.assert_array_equal(codes[2], codec.encode(filled))
    decoded = codec.decode_batch(codes)
    assert [row.shape for row in decoded] == [(n * codec.frame_size,) for n in (FRAMES, 2, FRAMES)]
    np.testing.assert_allclose(decoded[0], codec.decode(codes[0]), rtol=0, atol=atol)
    np.testing.assert_allclose(decoded[1], decoded[0][: len(decoded[1])], rtol=0, atol=atol)
    assert codec.encode(whole[:0]).shape == (codec.num_codebooks, 0)
    assert codec.decode(codes[0][:, :0]).shape == (0,)
    assert codec.encode_batch([]) == codec.decode_batch([]) == []


def check_errors(codec: Codec) -> None:
    """Audio, codes and masks that are none are refused in one sentence."""
    size, codebooks, most = codec.frame_size, codec.num_codebooks, codec.cardinality
    audio, codes = np.zeros((2, 3 * size), np.float32), np.zeros((2, codebooks, 3), np.int32)
    broken, high = audio.copy(), codes.copy()
    broken[1, size + 7] = np.nan
    high[1, 2, 1] = most
    encoder, decoder = codec.init_encoder(2), codec.init_decoder(2)
    of_shape = r"mask of shape \[2, 2\], expected bool of shape \[2, 3\]: give one"
    for call, args, message in (
        (codec.encode, (np.zeros((6, size), np.float32),), rf"shape \[6, {size}\], but takes one channel.*: mix or"),
        (codec.encode, (np.zeros(size, np.int16),), r"int16 audio .*floats.*full scale 1"),
        (codec.encode, (broken[1],), rf"sample {size + 7} \(row 0\) is not finite: mend"),
        (codec.encode_step, (broken, encoder), rf"sample {size + 7} \(row 1\) is not finite: mend"),
        (codec.encode_step, (audio[0], encoder), rf"shape \[{3 * size}\], expected .*\[rows, samples\]: give"),
        (codec.encode_step, (audio[:, :-1], encoder), rf"{3 * size - 1} samples .*={size}: give whole"),
        (codec.encode_step, (audio, encoder, np.ones((2, 2), bool)), of_shape),
        (codec.encode_step, (audio, encoder, np.ones((2, 3))), "float64 mask .*expected bool"),
        (codec.decode, (high[1],), rf"from 0 to {most}, but .* has entries 0 to {most - 1}: drop"),
        (codec.decode, (codes[0] - 1,), "from -1 to -1, but .*: drop"),
        (codec.decode, (codes[0, 1:],), rf"shape \[{codebooks - 1}, 3\], but .*shape \[{codebooks}, T\]: give"),
        (codec.decode, (codes[0].astype(np.float32),), "float32 codes .*needs integers"),
        (codec.decode_step, (high, decoder), rf"from 0 to {most}, but"),
        (codec.decode_step, (codes, decoder, np.ones((2, 2), bool)), of_shape),
        (codec.reset, (decoder, np.ones(3, bool)), r"mask of shape \[3\], expected bool of shape \[2\]: give one"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            call(*args)
        assert str(caught.value).count(". ") == 0
