"""Fixtures of the tests of sound files."""

import logging

import pytest

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
