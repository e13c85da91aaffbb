"""Sound files as bytes, sound and damaged."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ttt_jax.data.audio.containers import Source
from ttt_jax.errors import InputError

RATE = 16000
COUNT = 24000  # samples of `noise`
FORMATS = {
    "wav": {"format": "WAV", "subtype": "PCM_16"},
    "rifx": {"format": "WAV", "subtype": "PCM_16", "endian": "BIG"},
    "extensible": {"format": "WAVEX", "subtype": "PCM_24"},
    "float": {"format": "WAV", "subtype": "FLOAT"},
    "rf64": {"format": "RF64", "subtype": "PCM_16"},
    "flac": {"format": "FLAC"},
    "vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {"format": "MP3"},
}
RANDOM = np.random.default_rng(0).integers(1, 255, 5000, dtype=np.uint8).tobytes()
TAG = b"TAG" + b"x" * 125
ID3 = b"ID3\x04\0\0\0\0\0\x0a" + b"y" * 10
APE = b"".join(
    (b"APETAGEX", struct.pack("<IIIIQ", 2000, 42, 1, 0xA0000000, 0), b"z" * 10)
    + (b"APETAGEX", struct.pack("<IIIIQ", 2000, 42, 1, 0x80000000, 0))
)


APE_1 = b"x" * 1500 + b"APETAGEX" + struct.pack("<IIIIQ", 1000, 1532, 1, 0, 0)  # version 1: a footer only


def noise(count=COUNT, channels=1, seed=0):
    """Noise that begins quietly: encoders of a variable bit rate spend less on its first third."""
    samples = np.random.default_rng(seed).uniform(-0.3, 0.3, (count, channels))
    samples[: count // 3] *= 0.01
    return samples


def encoded(samples, rate=RATE, **form):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **form)
    return file.getvalue()


def refused(read, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read(content)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text


def wav(size, whole=None, magic=b"RIFF", tail=b"", before=b""):
    """24,000 samples of 16 bits behind a header that states other sizes; without `whole` the RIFF size is true."""
    order = ">" if magic == b"RIFX" else "<"
    pcm = (noise()[:, 0] * 32767).astype(order + "i2").tobytes()
    chunks = before + b"fmt " + struct.pack(order + "IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    whole = 4 + len(chunks) + 8 + len(pcm) + len(tail) if whole is None else whole
    sizes = struct.pack(order + "I", whole & 0xFFFFFFFF), struct.pack(order + "I", size & 0xFFFFFFFF)
    return magic + sizes[0] + b"WAVE" + chunks + b"data" + sizes[1] + pcm + tail


def chunk(name, content):
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def flac_with_total(content, total):
    fields = int.from_bytes(content[18:26], "big") >> 36 << 36 | total
    return content[:18] + fields.to_bytes(8, "big") + content[26:]


def source(content):
    return Source(Path("made"), io.BytesIO(content), len(content))
