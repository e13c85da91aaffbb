"""The commands from a shell in another folder: help, and mistakes that end in one sentence and leave nothing."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from tests.helpers.places import ROOT


def run(folder, *args, module="train"):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", module, *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_help_is_complete_and_quick(tmp_path):
    run(tmp_path, "--help")  # the first one compiles Python files
    before = os.times()
    done = run(tmp_path, "--help")
    after = os.times()
    assert done.returncode == 0
    for said in ("--model.ttt.mini-batch", "--optim.gate-lr", "--run-dir", "--from", "--resume", "moshi-7b", "small"):
        assert said in done.stdout
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 2


def test_the_command_line_is_read_without_jax():
    code = (
        "import sys; from train.__main__ import parse; parse(['small', '--steps', '3']); sys.exit('jax' in sys.modules)"
    )
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
    assert_one_sentence(done, said)
    assert left(tmp_path) == {"empty.jsonl", "taken"}


def write_bad(folder, kind):
    """A manifest of one recording of 4 s with one thing wrong; its name."""
    sound = folder / "bad.wav"
    samples = np.random.default_rng(0).uniform(-0.3, 0.3, 0 if kind == "length zero" else 4 * 16000)
    soundfile.write(sound, samples, 16000, subtype="PCM_16")
    content = bytearray(sound.read_bytes())
    if kind == "not audio":
        content = b"These bytes are no sound. " * 100
    elif kind == "cut off":
        content = content[: len(content) // 2]
    elif kind == "no channel":
        at = content.index(b"fmt ") + 10
        content[at : at + 2] = struct.pack("<H", 0)
    sound.write_bytes(content)
    if kind == "other words":
        (folder / "bad.json").write_text(json.dumps({"alignments": [["hello", [9.0, 9.5], "SPEAKER_MAIN"]]}))
    (folder / "bad.jsonl").write_text(json.dumps({"path": "bad.wav", "duration": 4.0}))
    return "bad.jsonl"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("not audio", "bad.wav is not audio"),
        ("cut off", "bad.wav is cut off"),
        ("length zero", "bad.wav holds no samples"),
        ("no channel", "bad.wav has no channel"),
        ("other words", "bad.json does not match its audio"),
    ],
)
def test_a_bad_recording_is_one_sentence_and_leaves_no_run_and_nothing_cached(tmp_path, kind, said):
    manifest = write_bad(tmp_path, kind)
    before = left(tmp_path)
    assert_one_sentence(run(tmp_path, "--data.train", manifest), said)
    assert left(tmp_path) == before
    # frames/ holds what was encoded; a half-written entry would lie there
    assert not [path for path in (tmp_path / "cache" / "ttt_jax").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["stream", "nowhere"], "nowhere is no checkpoint"),
        (["stream", "nowhere", "--out", "results"], "nowhere is no checkpoint"),
    ],
)
def test_evaluating_what_is_no_run_is_one_sentence_and_leaves_nothing(tmp_path, args, said):
    assert_one_sentence(run(tmp_path, *args, module="eval"), said)
    assert left(tmp_path) == set()


def assert_one_sentence(done, said):
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in done.stderr


def left(folder):
    """What a command left in the folder it ran in, but for the cache."""
    return {path.name for path in folder.iterdir()} - {"cache"}


def test_a_mistyped_field_gets_a_suggestion(tmp_path):
    done = run(tmp_path, "--data.chonk", "3")
    assert done.returncode == 2
    assert "--data.chunk" in done.stderr
    assert not list(tmp_path.iterdir())
