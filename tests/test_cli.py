"""`python -m train` from a shell in another folder: help, and mistakes that end in one sentence and leave nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(folder, *args):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "train", *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_help_is_complete_and_quick(tmp_path):
    before = os.times()
    done = run(tmp_path, "--help")
    after = os.times()
    assert done.returncode == 0
    for said in ("--model.ttt.mini-batch", "--optim.gate-lr", "--run-dir", "--from", "--resume", "moshi-7b", "small"):
        assert said in done.stdout
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 2


def test_the_command_line_is_read_without_jax():
    code = "import sys, train.config; train.config.parse(['small', '--steps', '3']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["tinny"], 'unknown preset "tinny"'),
        (["--model.ttt.layers", "9"], "names layer 9, but the model has layers 0 to 2"),
        (["--model.ttt.mini-batch", "0"], "mini_batch=0 is not a size"),
        (["--data.train", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--data.train", "empty.jsonl"], "empty.jsonl is empty"),
        (["--data.codec", "mimi"], "codec 'mimi' is not available"),
        (["--model.n-q", "4", "--model.dep-q", "2", "--model.delays", "0", "0", "1", "0", "1"], "do not fit the codec"),
        (["--resume", "nowhere"], "nowhere is not the folder of a run"),
        (["--from", "nowhere.json"], "nowhere.json is not a file"),
        (["--run-dir", "taken"], "taken is taken"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(tmp_path, args, said):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").touch()
    done = run(tmp_path, *args)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line]
    assert [line for line in lines if line.startswith("error: ") and said in line], done.stderr
    assert "Traceback" not in done.stderr
    left = {path.name for path in tmp_path.iterdir()} - {"cache"}
    assert left == {"empty.jsonl", "taken"}


def test_a_mistyped_field_gets_a_suggestion(tmp_path):
    done = run(tmp_path, "--data.chonk", "3")
    assert done.returncode == 2
    assert "--data.chunk" in done.stderr
    assert not list(tmp_path.iterdir())
