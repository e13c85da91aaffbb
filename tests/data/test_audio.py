"""The sound file reader: formats, rates, and every kind of bad file."""

import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from ttt_jax.data.audio import reader
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.errors import InputError

RATE = 16000
FORMATS = {
    "pcm.wav": {"format": "WAV", "subtype": "PCM_16"},
    "float.wav": {"format": "WAV", "subtype": "FLOAT"},
    "large.wav": {"format": "RF64", "subtype": "PCM_16"},
    "sound.flac": {"format": "FLAC"},
    "opus.ogg": {"format": "OGG", "subtype": "OPUS"},
    "vorbis.ogg": {"format": "OGG", "subtype": "VORBIS"},
    "sound.mp3": {"format": "MP3"},
}


def tones(seconds=2.0, rate=RATE, channels=2):
    """A 440 Hz tone on the left, 1000 Hz on the right: float32 [samples, channels]."""
    time = np.arange(int(seconds * rate)) / rate
    left, right = 0.4 * np.sin(2 * np.pi * 440 * time), 0.2 * np.sin(2 * np.pi * 1000 * time)
    return np.stack([left, right], axis=1)[:, :channels].astype(np.float32)


def strongest_hz(samples, rate):
    """The frequency with the most energy."""
    return np.fft.rfftfreq(len(samples), 1 / rate)[np.abs(np.fft.rfft(samples)).argmax()]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_both_channels_at_the_asked_rate(tmp_path, name):
    soundfile.write(tmp_path / name, tones(), RATE, **FORMATS[name])
    samples = read_audio(tmp_path / name, 24000)
    assert samples.dtype == np.float32
    assert samples.shape == (2, 48000)
    assert strongest_hz(samples[0], 24000) == pytest.approx(440, abs=1)
    assert strongest_hz(samples[1], 24000) == pytest.approx(1000, abs=1)
    level = np.sqrt(np.mean(samples[:, 12000:36000] ** 2, axis=1))
    np.testing.assert_allclose(level * np.sqrt(2), [0.4, 0.2], rtol=0.1)


def spectrum(samples, rate):
    """Amplitudes by frequency in whole Hz, of the middle second."""
    middle = samples[len(samples) // 2 - rate // 2 :][:rate]
    return 2 * np.abs(np.fft.rfft(middle * np.hanning(rate))) / np.hanning(rate).sum()


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
def test_resampling_keeps_tones_below_nyquist_and_removes_all_else(tmp_path, rate, hertz, new, left):
    tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(2 * rate) / rate)
    soundfile.write(tmp_path / "a.wav", tone.astype(np.float32), rate, subtype="FLOAT")
    samples = read_audio(tmp_path / "a.wav", new)
    assert samples.shape == (1, 2 * new)
    amplitudes = spectrum(samples[0], new)
    if left is not None:
        assert amplitudes[left] == pytest.approx(0.5, rel=0.01)
        amplitudes[left - 5 : left + 6] = 0
    assert amplitudes.max() < 0.5e-3  # -60 dB of the tone


def test_resampling_keeps_a_click_in_its_place(tmp_path):
    click = np.zeros(48000, np.float32)
    click[30000] = 1
    soundfile.write(tmp_path / "a.wav", click, 48000, subtype="FLOAT")
    assert np.abs(read_audio(tmp_path / "a.wav", 16000)[0]).argmax() == 10000


def test_equal_rate_returns_the_samples_of_the_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", tones(), RATE, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", RATE), tones().T)


def test_reading_in_blocks_changes_nothing(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.flac", tones(), RATE)
    whole = read_audio(tmp_path / "a.flac", 24000)
    for block in (1000, 16000):  # 16000 divides the length: the last block is empty
        monkeypatch.setattr(reader, "_BLOCK", block)
        np.testing.assert_array_equal(read_audio(tmp_path / "a.flac", 24000), whole)


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.97])
@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_off_file_is_refused(tmp_path, name, keep):
    path = tmp_path / name
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (3 * RATE, 1))
    soundfile.write(path, noise, RATE, **FORMATS[name])
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(InputError, match=rf"{name} is (cut off|not audio)"):
        read_audio(path, RATE)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.wav does not exist"):
        read_audio(tmp_path / "nowhere.wav", RATE)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_audio(tmp_path, RATE)


@pytest.mark.parametrize("content", [b"hello, this is text\n" * 100, bytes(range(256)) * 20])
def test_a_file_that_is_not_audio_is_refused(tmp_path, content):
    path = tmp_path / "notes.wav"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"notes\.wav is not audio"):
        read_audio(path, RATE)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.ogg").touch()
    with pytest.raises(InputError, match=r"a\.ogg is an empty file"):
        read_audio(tmp_path / "a.ogg", RATE)


@pytest.mark.parametrize("name", ["pcm.wav", "large.wav", "vorbis.ogg"])
def test_length_zero_is_refused(tmp_path, name):
    soundfile.write(tmp_path / name, tones()[:0], RATE, **FORMATS[name])
    with pytest.raises(InputError, match="holds no samples"):
        read_audio(tmp_path / name, RATE)


def test_no_channel_is_refused(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, tones(), RATE, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    at = content.index(b"fmt ") + 10
    content[at : at + 2] = struct.pack("<H", 0)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.wav has no channel"):
        read_audio(path, RATE)


def test_more_than_two_channels_are_refused(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.repeat(tones(channels=1), 3, axis=1), RATE)
    with pytest.raises(InputError, match="3 channels"):
        read_audio(tmp_path / "a.flac", RATE)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path, value):
    samples = tones()
    samples[20000, 1] = value
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(InputError, match="NaN or infinity"):
        read_audio(tmp_path / "a.wav", 24000)


@pytest.mark.integration
def test_importing_the_reader_loads_no_audio_library():
    code = (
        "import sys, ttt_jax.data.audio.reader, ttt_jax.data.manifest, ttt_jax.data.text\n"
        "sys.exit(' '.join({'soundfile', 'soxr', 'sentencepiece', 'jax'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
