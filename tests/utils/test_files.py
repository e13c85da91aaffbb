"""Files are written whole or not at all."""

import os

import pytest

from ttt_jax.utils.files import write_atomically


@pytest.mark.parametrize("step", ["fdopen", "chmod", "replace"])
def test_a_failure_at_any_step_leaves_the_old_file_alone(tmp_path, monkeypatch, step):
    path = tmp_path / "x.bin"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("killed")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="killed"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_content_replaces_the_old_and_others_may_read_it(tmp_path):
    path = tmp_path / "x.bin"
    write_atomically(path, b"a longer old content")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_appears_only_when_it_is_complete(tmp_path, monkeypatch):
    path, replace, found = tmp_path / "x.bin", os.replace, []

    def look_then_replace(source, target):
        with open(source, "rb") as file:
            found.append((path.exists(), file.read()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_then_replace)
    write_atomically(path, b"content")
    assert found == [(False, b"content")]
