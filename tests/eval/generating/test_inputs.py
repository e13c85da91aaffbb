"""Which recordings are found, under which names, and whose voice is heard."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile

from eval.generating.inputs import find, read
from eval.generating.outputs import ENDINGS
from ttt_jax.errors import InputError

RATE = 16000


def write(path: Path, samples=None, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(800, 0.25) if samples is None else samples, rate)
    return path


def names(*paths: Path) -> list[str]:
    return [source.name for source in find(list(map(str, paths)))[0]]


def test_names_have_as_many_folders_as_tell_them_apart(tmp_path):
    for name in ("x/1/a.wav", "x/2/a.wav", "y/2/a.wav", "b.wav", "c.wav", "c.flac"):
        write(tmp_path / name)
    assert names(tmp_path) == ["b", "c.flac", "c.wav", "1-a", "x-2-a", "y-2-a"]
    assert names(tmp_path / "b.wav", tmp_path / "b.wav", tmp_path / "x") == ["b", "1-a", "2-a"]
    write(tmp_path / "a-b/c.wav")
    write(tmp_path / "b/c.wav")
    assert len(set(names(tmp_path))) == 8


def test_no_two_talks_write_the_same_file(tmp_path):
    for name in ("a.wav", "a.conversation.wav", "a-conversation.wav", "b.conversation.ogg"):
        write(tmp_path / name)
    files = [f"{name}{ending}" for name in names(tmp_path) for ending in ENDINGS]
    assert len(set(files)) == 4 * len(ENDINGS)


def test_a_folder_of_full_duplex_bench(tmp_path):
    for name in ("t/10/input.wav", "t/2/input.wav", "t/2/output.wav", "t/2/clean_input.wav"):
        write(tmp_path / name)
    inputs, skipped = find([str(tmp_path)])
    assert [(source.name, source.answer) for source in inputs] == [
        ("2", tmp_path / "t/2/output.wav"),
        ("10", tmp_path / "t/10/output.wav"),
    ]
    assert skipped == []


def test_what_cannot_be_found_is_named(tmp_path):
    write(tmp_path / "a.wav")
    (tmp_path / "b.m4a").touch()
    inputs, skipped = find([str(tmp_path), str(tmp_path / "none.wav")])
    assert [source.name for source in inputs] == ["a"]
    assert [reason.split(" ")[0] for _, reason in skipped] == [str(tmp_path / "b.m4a"), str(tmp_path / "none.wav")]
    with pytest.raises(InputError, match="none.wav does not exist"):
        find([str(tmp_path / "none.wav")])


def test_a_seed_depends_on_the_content_alone(tmp_path):
    first, second = find([str(write(tmp_path / "a.wav")), str(write(tmp_path / "b.wav", np.zeros(9)))])[0]
    (copy,) = find([str(write(tmp_path / "c.wav"))])[0]
    assert first.seed(0) == copy.seed(0) != second.seed(0)
    assert first.seed(1) == (first.seed(0) + 1) % 2**32


@pytest.mark.parametrize(("channel", "level"), [("auto", 0.5), ("right", 0.5), ("left", 0.1), ("mix", 0.3)])
def test_channels(tmp_path, channel, level):
    path = write(tmp_path / "s.wav", np.stack([np.full(800, 0.1), np.full(800, 0.5)], 1))
    np.testing.assert_allclose(read(path, RATE, channel), level, atol=1e-4)
    np.testing.assert_allclose(read(write(tmp_path / "m.wav"), RATE, channel), 0.25, atol=1e-4)


def test_a_silent_right_channel_beside_a_loud_one(tmp_path, caplog):
    path = write(tmp_path / "s.wav", np.stack([np.full(800, 0.1), np.zeros(800)], 1))
    silent = write(tmp_path / "n.wav", np.zeros((800, 2)))
    with caplog.at_level(logging.WARNING, "ttt_jax"):
        assert read(path, RATE, "right").max() == read(silent, RATE, "auto").max() == 0
        assert "right channel" not in caplog.text
        np.testing.assert_allclose(read(path, RATE, "auto"), 0.1, atol=1e-4)
    assert "s.wav has no sound in its right channel, the user's: the left one is heard." in caplog.text


def test_unusable_recordings(tmp_path):
    with pytest.raises(InputError, match="six.wav has 6 channels: give one, or two"):
        read(write(tmp_path / "six.wav", np.full((800, 6), 0.1)), RATE, "right")
    with pytest.raises(InputError, match="short.wav is shorter than a sample at 16000 Hz"):
        read(write(tmp_path / "short.wav", [0.1], 96000), RATE, "right")
    (tmp_path / "c.safetensors").touch()
    with pytest.raises(InputError, match="c.safetensors is a file of codes, which only --score reads"):
        read(tmp_path / "c.safetensors", RATE, "right")
