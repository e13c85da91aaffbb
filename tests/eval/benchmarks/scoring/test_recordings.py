"""Recordings to codes: equal to the codec's own, encoded once, and what cannot be read is named."""

import numpy as np
import pytest
import soundfile

from eval.benchmarks.scoring import recordings
from eval.benchmarks.scoring.recordings import encode
from ttt_jax.codec import load_codec

RATES = (16000, 24000)


@pytest.fixture(scope="module")
def codec():
    return load_codec()


@pytest.fixture
def wavs(tmp_path):
    """Twenty recordings of different lengths and two rates; the last two hold the same bytes."""
    rng, paths = np.random.default_rng(0), []
    for i in range(20):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, rng.uniform(-0.3, 0.3, 500 + 4000 * (i % 7)), RATES[i % 2])
        paths.append(path)
    paths[-1].write_bytes(paths[-2].read_bytes())
    return paths


def test_codes_are_those_of_the_codec_alone(wavs, codec, tmp_path):
    done = []
    found = encode(wavs, codec, tmp_path / "cache", done.append)
    assert not found.unreadable
    assert sum(done) == len(wavs)
    for path in wavs:
        np.testing.assert_array_equal(found.codes[path], codec.encode(recordings._read(path, codec)))


def test_equal_bytes_are_encoded_once_and_never_again(wavs, codec, tmp_path, monkeypatch):
    calls = []
    whole = recordings._encode
    monkeypatch.setattr(recordings, "_encode", lambda audio, codec: calls.extend(audio) or whole(audio, codec))
    first = encode(wavs, codec, tmp_path / "cache")
    assert len(calls) == 19
    again = encode([*wavs, wavs[0]], codec, tmp_path / "cache")
    assert len(calls) == 19
    assert all(np.array_equal(first.codes[path], again.codes[path]) for path in wavs)


def test_a_damaged_cache_is_made_again(wavs, codec, tmp_path):
    first = encode(wavs, codec, tmp_path / "cache")
    stored = sorted((tmp_path / "cache").rglob("*.npy"))
    stored[0].write_bytes(b"")
    stored[1].write_bytes(stored[1].read_bytes()[:-5])
    np.save(stored[2], np.full((8, 3), codec.cardinality, np.int32))
    again = encode(wavs, codec, tmp_path / "cache")
    assert all(np.array_equal(first.codes[path], again.codes[path]) for path in wavs)


def test_what_cannot_be_read_is_named_and_the_rest_is_encoded(wavs, codec, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    soundfile.write(tmp_path / "stereo.wav", np.zeros((800, 2)), 16000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "long.wav", np.zeros(301 * 1000), 1000)
    bad = [tmp_path / name for name in ("text.wav", "stereo.wav", "empty.wav", "missing.wav", "long.wav")]
    found = encode([bad[0], *wavs, *bad[1:]], codec, tmp_path / "cache")
    assert set(found.unreadable) == set(bad)
    assert all(path.name in reason for path, reason in found.unreadable.items())
    assert "2 channels" in found.unreadable[bad[1]]
    assert "more than 300 s" in found.unreadable[bad[4]]
    assert set(found.codes) == set(wavs)
