"""Recordings of any rate through Mimi, block by block: the codes of the whole, in few programs."""

import collections

import numpy as np
import pytest

from tests.helpers.recordings import record
from ttt_jax.codec import load_codec
from ttt_jax.data.audio.reader import read_audio, read_blocks
from ttt_jax.data.encode import Encoder, encode_blocks
from ttt_jax.data.text import TokenizerInfo

SECONDS, FRAMES = 22.3, 279
"""More than codecs get at a time."""


@pytest.fixture(scope="module")
def codec(small_mimi):
    return load_codec(small_mimi)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [44100, 16000])
def test_resampled_blocks_give_the_codes_of_the_whole(codec, tmp_path, rate, channels):
    path = record(tmp_path / "a.wav", SECONDS, channels=channels, rate=rate)
    codes, samples = encode_blocks(read_blocks(path, codec.sample_rate), codec)
    whole = read_audio(path, codec.sample_rate)
    assert samples == whole.shape[1] == round(SECONDS * rate) * 24000 // rate
    assert codes.shape == (channels, 8, FRAMES)
    for found, expected in zip(codes, codec.encode_batch(whole), strict=True):
        np.testing.assert_array_equal(found, expected)
        # Random codebooks are used unevenly; all codes equal would show nothing.
        assert all(len(collections.Counter(row.tolist())) > 3 for row in found)


def test_silence_is_what_zeros_give_whatever_was_asked_for_before(codec):
    encoder = Encoder(codec, TokenizerInfo())
    expected = codec.encode(np.zeros(FRAMES * codec.frame_size, np.float32))
    for frames in (3, FRAMES, 250):
        np.testing.assert_array_equal(encoder.silence(frames), expected[:, :frames])


def test_recordings_of_any_length_reach_a_codec_in_few_lengths(monkeypatch):
    codec, asked = load_codec(), set()
    step = codec.encode_step

    def spy(audio, state, mask=None):
        asked.add(audio.shape[1] // codec.frame_size)
        return step(audio, state, mask)

    monkeypatch.setattr(codec, "encode_step", spy)
    rng = np.random.default_rng(0)
    for _ in range(5):
        sound = rng.normal(size=(1, int(rng.integers(1, 600 * 1280)))).astype(np.float32) / 10
        cuts = np.sort(rng.integers(0, sound.shape[1], 3))
        codes, samples = encode_blocks(np.split(sound, cuts, axis=1), codec)
        assert samples == sound.shape[1]
        assert codes.shape[2] == -(-samples // 1280)
        Encoder(codec, TokenizerInfo()).silence(codes.shape[2])
    assert 256 in asked
    assert asked <= {32 * count for count in range(1, 9)}
