"""Every command ends in one sentence and an exit code when the user, not the program, can mend things."""

import errno
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ttt_jax import __version__
from ttt_jax.errors import InputError
from ttt_jax.utils import command


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("layer 9 is not there: name another."), 2, "error: layer 9 is not there: name another."),
        (ModuleNotFoundError("no", name="soxr"), 2, "the package soxr is not installed"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk: No space left on device"),
        (FileExistsError(errno.EEXIST, "File exists", "results"), 2, "results: File exists"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_mendable_problem_is_one_line(capsys, error, code, words):
    assert command.run(lambda: _raise(error)) == code
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), ModuleNotFoundError("no", name="train.typo"), OSError(errno.EBADF, "closed")]
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        command.run(lambda: _raise(error))


def test_a_warning_of_the_library_is_one_line(capsys):
    root = logging.StreamHandler(sys.stderr)  # as absl installs one
    logging.getLogger().addHandler(root)
    try:
        for _ in range(2):  # commands that run in one process show it once
            assert command.run(lambda: command.log.warning("a\nb.wav is nearly silent.") or 0) == 0
            assert capsys.readouterr().err == "warning: a\\nb.wav is nearly silent.\n"
    finally:
        logging.getLogger().removeHandler(root)


def test_cost_grows_with_memory_and_time():
    before = command.cost()
    held = bytearray(300_000_000)
    held[::4096] = b"x" * len(held[::4096])
    after = command.cost()
    assert after["peak_gigabytes"] >= min(before["peak_gigabytes"] + 0.05, 0.3)
    assert after["seconds"] >= before["seconds"]


def test_the_version_of_a_checkout_has_its_commit_and_says_if_files_were_changed(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True
        ).stdout

    folder = tmp_path / "ttt_jax" / "utils"
    folder.mkdir(parents=True)
    file = Path(shutil.copy(command.__file__, folder))
    monkeypatch.setattr(command, "__file__", str(file))
    assert command.version() == __version__  # no checkout
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    git("tag", "-a", "v9", "-m", "a tag is no commit")
    commit = git("rev-parse", "--short", "HEAD").strip()
    assert command.version() == f"{__version__}+g{commit}"
    file.write_text("changed")
    assert command.version() == f"{__version__}+g{commit}.dirty"
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert command.version() == __version__
