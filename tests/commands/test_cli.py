"""The commands in another folder: help, and mistakes that end in one sentence and leave nothing."""

import json
import os
import struct

import numpy as np
import pytest
import soundfile

from tests.helpers import in_process
from tests.helpers.converting import assert_one_sentence, run


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs a command in an empty folder, in this process; its cache is in `cache`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return in_process.command


@pytest.mark.integration
def test_help_is_complete_and_quick(tmp_path):
    run(tmp_path, "--help", module="train")  # the first one compiles Python files
    before = os.times()
    done = run(tmp_path, "--help", module="train")
    after = os.times()
    assert done.returncode == 0
    for word in ("--model.ttt.mini-batch", "--optim.gate-lr", "--run-dir", "--from", "--resume", "moshi-7b", "small"):
        assert word in done.stdout
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 2


@pytest.mark.integration
@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        ("train", ["--data.train", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        ("eval", ["stream", "nowhere"], "nowhere is no checkpoint"),
    ],
)
def test_a_mistake_in_a_shell_is_one_sentence_and_leaves_nothing(tmp_path, module, args, message):
    assert_one_sentence(run(tmp_path, *args, module=module), message)
    assert left(tmp_path) == set()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tinny"], 'unknown preset "tinny"'),
        (["--model.ttt.layers", "9"], "names layer 9, but the model has layers 0 to 2"),
        (["--model.ttt.mini-batch", "0"], "mini_batch=0 is not a size"),
        (["--data.train", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--data.train", "empty.jsonl"], "empty.jsonl is empty"),
        (["--data.codec", "mimi"], "codec 'mimi' does not come with the project"),
        (["--model.n-q", "4", "--model.dep-q", "2", "--model.delays", "0", "0", "1", "0", "1"], "do not fit the codec"),
        (["--resume", "nowhere"], "nowhere is not the folder of a run"),
        (["--from", "nowhere.json"], "nowhere.json is not a file"),
        (["--run-dir", "taken"], "taken is taken"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(command, tmp_path, args, message):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").touch()
    assert_one_sentence(command("train", *args), message)
    assert left(tmp_path) == {"empty.jsonl", "taken"}


def write_bad(folder, kind):
    """Writes a manifest of one recording of 4 s with one thing wrong and returns its name."""
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
    ("kind", "message"),
    [
        ("not audio", "bad.wav is not audio"),
        ("cut off", "bad.wav is cut off"),
        ("length zero", "bad.wav holds no samples"),
        ("no channel", "bad.wav has no channel"),
        ("other words", "bad.json does not match its audio"),
    ],
)
def test_a_bad_recording_is_one_sentence_and_leaves_no_run_and_nothing_cached(command, tmp_path, kind, message):
    manifest = write_bad(tmp_path, kind)
    before = left(tmp_path)
    assert_one_sentence(command("train", "--data.train", manifest), message)
    assert left(tmp_path) == before
    # frames/ holds what was encoded; a half-written entry would lie there
    assert not [path for path in (tmp_path / "cache" / "ttt_jax").rglob("*") if path.is_file()]


@pytest.mark.parametrize("args", [["nowhere"], ["nowhere", "--out", "results"]])
def test_evaluating_what_is_no_run_is_one_sentence_and_leaves_nothing(command, tmp_path, args):
    assert_one_sentence(command("eval", "stream", *args), "nowhere is no checkpoint")
    assert left(tmp_path) == set()


def left(folder):
    """What a command left in the folder it ran in, but for the cache."""
    return {path.name for path in folder.iterdir()} - {"cache"}


def test_a_mistyped_field_gets_a_suggestion(command, tmp_path):
    done = command("train", "--data.chonk", "3")
    assert done.returncode == 2
    assert "--data.chunk" in done.stderr
    assert not list(tmp_path.iterdir())
