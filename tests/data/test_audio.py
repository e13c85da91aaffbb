"""The sound file reader: formats, rates, and every kind of bad file."""

import struct
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.sounds import FORMATS, RATE, encoded, noise, refused, wav
from ttt_jax.data.audio import reader
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.errors import InputError

FLOAT = FORMATS["float"]


def tones(seconds=2.0):
    """A 440 Hz tone on the left, 1000 Hz on the right: float32 [samples, 2]."""
    time = np.arange(int(seconds * RATE)) / RATE
    left, right = 0.4 * np.sin(2 * np.pi * 440 * time), 0.2 * np.sin(2 * np.pi * 1000 * time)
    return np.stack([left, right], axis=1).astype(np.float32)


def spectrum(samples, rate):
    """Amplitudes by frequency in whole Hz, of the middle second."""
    middle = samples[len(samples) // 2 - rate // 2 :][:rate]
    return 2 * np.abs(np.fft.rfft(middle * np.hanning(rate))) / np.hanning(rate).sum()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_both_channels_at_the_asked_rate(read, name):
    samples = read(encoded(tones(), **FORMATS[name]), 24000)
    assert samples.dtype == np.float32
    assert samples.shape == (2, 48000)
    for channel, hertz, level in zip(samples, (440, 1000), (0.4, 0.2), strict=True):
        amplitudes = spectrum(channel, 24000)
        assert amplitudes.argmax() == hertz
        assert amplitudes[hertz] == pytest.approx(level, rel=0.1)


@pytest.mark.parametrize(
    ("rate", "hertz", "new", "left"),
    [
        (48000, 1000, 16000, 1000),
        (48000, 7000, 16000, 7000),  # near the new Nyquist frequency of 8,000 Hz
        (48000, 10000, 16000, None),  # beyond it, 6,000 Hz if aliased
        (44100, 9000, 16000, None),
        (8000, 3000, 16000, 3000),
        (22050, 440, 24000, 440),
    ],
)
def test_resampling_keeps_tones_below_nyquist_and_removes_all_else(read, rate, hertz, new, left):
    tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(2 * rate) / rate)
    samples = read(encoded(tone, rate, **FLOAT), new)
    assert samples.shape == (1, 2 * new)
    amplitudes = spectrum(samples[0], new)
    if left is not None:
        assert amplitudes[left] == pytest.approx(0.5, rel=0.01)
        amplitudes[left - 5 : left + 6] = 0
    assert amplitudes.max() < 0.5e-3  # -60 dB of the tone


def test_resampling_keeps_a_click_in_its_place(read):
    click = np.zeros(48000)
    click[30000] = 1
    assert np.abs(read(encoded(click, 48000, **FLOAT), 16000)[0]).argmax() == 10000


def test_equal_rate_returns_the_samples_of_the_file(read):
    np.testing.assert_array_equal(read(encoded(tones(), **FLOAT)), tones().T)


def test_reading_in_blocks_changes_nothing(read, monkeypatch):
    content = encoded(tones(), format="FLAC")
    whole = read(content, 24000)
    for block in (1000, 16000):  # 16000 divides the length: the last block is empty
        monkeypatch.setattr(reader, "_BLOCK", block)
        np.testing.assert_array_equal(read(content, 24000), whole)


@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_off_file_is_refused(read, files, name):
    for keep in (0.02, 0.5, 0.97):
        refused(read, files[name][: int(len(files[name]) * keep)], "is (cut off|not audio)")


def replaced(value):
    samples = noise(channels=2)
    samples[20000, 1] = value
    return encoded(samples, **FLOAT)


BAD = {
    "text": (b"hello, this is text\n" * 100, "sound is not audio"),
    "bytes": (bytes(range(256)) * 20, "sound is not audio"),
    "empty": (b"", "sound is an empty file"),
    "no samples, wav": (encoded(noise()[:0], **FORMATS["wav"]), "holds no samples"),
    "no samples, rf64": (encoded(noise()[:0], **FORMATS["rf64"]), "holds no samples"),
    "no samples, vorbis": (encoded(noise()[:0], **FORMATS["vorbis"]), "holds no samples"),
    "no channel": (wav(48000).replace(struct.pack("<HHI", 1, 1, RATE), struct.pack("<HHI", 1, 0, RATE)), "no channel"),
    "three channels": (encoded(noise(channels=3), format="FLAC"), "3 channels"),
    "NaN": (replaced(np.nan), "NaN or infinity"),
    "infinity": (replaced(np.inf), "NaN or infinity"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_sentence(read, name):
    refused(read, *BAD[name])


@pytest.mark.parametrize(("name", "message"), [("nowhere.wav", r"nowhere\.wav does not exist"), ("", "cannot be read")])
def test_a_missing_file_and_a_folder_are_refused(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        read_audio(tmp_path / name, RATE)


@pytest.mark.integration
def test_importing_the_reader_loads_no_audio_library():
    code = (
        "import sys, ttt_jax.data.audio.reader, ttt_jax.data.manifest, ttt_jax.data.text\n"
        "sys.exit(' '.join({'soundfile', 'soxr', 'sentencepiece', 'jax'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
