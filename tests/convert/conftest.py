"""Sources and conversions that several files use."""

import pytest

from tests.helpers import kyutai_files as files
from tests.helpers.converting import TTT, info_of
from ttt_jax.convert import export, kyutai


@pytest.fixture(scope="module")
def with_ttt(tmp_path_factory):
    """Weights ("source"), converted with TTT layers ("ours") and without ("plain"), and exported ("out"). Do not write
    there."""
    folder = tmp_path_factory.mktemp("ttt")
    c = files.config()
    kyutai(files.write(folder / "source", c, files.weights(c)), folder / "ours", ttt=TTT, seed=3)
    kyutai(folder / "source", folder / "plain")
    export(folder / "ours", folder / "out")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """config.json of the model that all these sources hold, converted from one file of Kyutai's."""
    folder = tmp_path_factory.mktemp("plain")
    kyutai(files.write(folder / "source", files.config(), files.weights(files.config())), folder / "ours")
    return info_of(folder / "ours")


@pytest.fixture
def source(tmp_path):
    """A sound source folder."""
    return files.write(tmp_path / "source", files.config(), files.weights(files.config()))
