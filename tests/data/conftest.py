"""Fixtures of the tests of sound files."""

import logging

import numpy as np
import pytest
import soundfile

from tests.helpers.sounds import FORMATS, RATE, encoded, noise
from ttt_jax.data.audio.reader import read_audio


@pytest.fixture(scope="session")
def files():
    """The same noise in every format."""
    return {name: encoded(noise(), **form) for name, form in FORMATS.items()}


@pytest.fixture
def read(tmp_path):
    """Samples [channels, n] of the file that has these bytes."""

    def read(content, rate=RATE):
        path = tmp_path / "sound"
        path.write_bytes(content)
        return read_audio(path, rate)

    return read


@pytest.fixture(autouse=True)
def _warnings_are_seen(caplog):
    caplog.set_level(logging.WARNING, logger="ttt_jax")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Two recordings of a second: their bytes."""
    path = tmp_path_factory.mktemp("sounds") / "a.wav"
    contents = []
    for seed in range(2):
        soundfile.write(path, np.random.default_rng(seed).normal(size=16000) / 10, 16000)
        contents.append(path.read_bytes())
    return contents
