"""Stored scores: missing, damaged and foreign files are named."""

import pytest

from eval.streaming.summary import summarise
from tests.helpers.made_scores import CHECKPOINT, FILES, SETTING, write
from ttt_jax.errors import InputError


def damage(path, how):
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        at = content.index(b"persist/nats") + 200
        path.write_bytes(content[:at] + bytes(255 - byte for byte in content[at : at + 50]) + content[at + 50 :])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "gone"])
def test_missing_and_damaged_scores_are_named(tmp_path, how):
    write(tmp_path)
    damage(tmp_path / "frames" / "tiny" / "b.npz", how)
    with pytest.raises(InputError, match=r"tiny/b\.npz .* again"):
        summarise(SETTING, [CHECKPOINT], FILES, [], tmp_path)


def test_scores_of_another_file_are_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "frames/tiny/a.npz").rename(tmp_path / "frames/tiny/b.npz")
    with pytest.raises(InputError, match="b.npz holds .* 200.* but b has .* 110"):
        summarise(SETTING, [CHECKPOINT], FILES[1:], [], tmp_path)
