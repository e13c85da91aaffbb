"""`python -m eval stream`: which files and arms, what is stored where, what is skipped or refused."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from eval.__main__ import main
from eval.inputs import dataset
from eval.streaming import plots, score_files
from eval.streaming.scores import load
from tests.helpers import made_scores, micro
from tests.helpers.eval_models import tokens, write_data, write_run
from ttt_jax.errors import InputError
from ttt_jax.utils.command import PARTIAL

LENGTHS = (60, 45, 52)


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    """Made-up scores and empty figures; test_runner.py and test_plots.py look at real ones."""
    monkeypatch.setattr(score_files, "stream", made_scores.stream)
    for name in ("_losses", "_figure5", "_state", "_checkpoints"):
        monkeypatch.setattr(plots, name, lambda *_: None)

    def save(figure, folder, name):
        paths = [folder / f"{name}.{kind}" for kind in plots.KINDS]
        for path in paths:
            path.write_bytes(b"a figure")
        return paths

    monkeypatch.setattr(plots, "save", save)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("checkpoints") / "memory")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint without TTT layers."""
    ttt = micro.MODEL.ttt.__class__(layers="none")
    cfg = micro.config(model=micro.MODEL.__class__(**vars(micro.MODEL) | {"ttt": ttt}))
    return write_run(tmp_path_factory.mktemp("checkpoints") / "plain", cfg)


@pytest.fixture
def data(tmp_path):
    codes = [tokens(length, i) for i, length in enumerate(LENGTHS)]
    return write_data(tmp_path / "speech", [*codes[:2], codes[2][1:]])


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_checkpoints_times_files_times_arms(run, plain, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["stream", str(run), str(plain), "--data", str(data), "--out", str(out), "--window", "20"]) == 0
    stored = results(out)
    arms = {"memory": ["persist", "reset", "frozen", "off"], "plain": ["off"]}
    assert {checkpoint["info"]["name"]: checkpoint["arms"] for checkpoint in stored["checkpoints"]} == arms
    assert [file["name"] for file in stored["files"]] == ["0", "1", "2"]
    assert [file["frames"] for file in stored["files"]] == list(LENGTHS)
    assert stored["setting"]["reset_every"] == micro.CONFIG.data.chunk
    assert stored["checkpoints"][0]["losses"]["persist"]["text"]["n"] == 2  # the third has none
    assert stored["checkpoints"][0]["losses"]["persist"]["equal"]["n"] == 3
    for name, measured in {"memory": True, "plain": False}.items():
        for scores in load(out / "frames" / name / stored["files"][2]["npz"]).arms.values():
            assert (scores.inner is not None) == measured
            assert np.isnan(scores.nats[0]).all()
            assert np.isfinite(scores.nats[1]).all()
    assert {"memory-memory.png", "figure5-memory.pdf", "memory-plain.png", "checkpoints.png"} <= set(os.listdir(out))
    assert "plain: no TTT layers" in capsys.readouterr().out


def test_a_bad_file_among_good_ones_is_skipped_counted_and_told(run, data, tmp_path, capsys):
    (data / "1.safetensors").write_bytes(b"nothing")
    out = tmp_path / "out"
    assert main(["stream", str(run), "--data", str(data), "--out", str(out), "--arms", "persist"]) == PARTIAL
    stored = results(out)
    assert [file["name"] for file in stored["files"]] == ["0", "2"]
    (entry,) = stored["skipped"]
    assert entry["name"] == "1"
    assert "1.safetensors" in entry["reason"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(lines) == 1


def test_absent_files_are_skipped_counted_and_told_briefly(run, tmp_path, capsys):
    data = write_data(tmp_path / "speech", [tokens(16, i) for i in range(2)])
    gone = "".join(json.dumps({"path": f"gone{i}.safetensors", "duration": 1.0}) + "\n" for i in range(30))
    packed = data / "some.jsonl.gz"
    packed.write_bytes(gzip.compress((gone + (data / "manifest.jsonl").read_text()).encode()))
    out = tmp_path / "out"
    assert main(["stream", str(run), "--data", str(packed), "--out", str(out), "--arms", "persist"]) == PARTIAL
    stored = results(out)
    assert [file["name"] for file in stored["files"]] == ["0", "1"]
    assert [entry["name"] for entry in stored["skipped"]] == [f"gone{i}" for i in range(30)]
    assert all(f"line {i + 1} names" in entry["reason"] for i, entry in enumerate(stored["skipped"]))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(lines) == 11
    assert lines[-1].startswith(
        f"skipped: 20 more, the last: {packed} line 30 names {data}/gone29.safetensors, which is not"
    )


def test_results_on_other_speech_do_not_replace_the_runs_own(run, data):
    assert main(["stream", str(run), "--data", str(data), "--arms", "persist", "--frames", "16"]) == 0
    assert not (run / "eval").exists()
    stored = results(run / "eval-speech")
    assert [file["frames"] for file in stored["files"]] == [16, 16, 16]
    namesake = write_data(data.parent / "x" / "speech", [tokens(20, 5)])
    refused("eval-speech holds results on .*speech,? .*but .*x/speech, as asked for", run, "--data", namesake)
    assert results(run / "eval-speech") == stored


def test_an_interrupted_evaluation_leaves_the_one_before(run, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = ["stream", str(run), "--data", str(data), "--arms", "persist", "--frames", "16", "--out", str(out)]
    assert main(words) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(score_files, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def refused(message, *args):
    with pytest.raises(InputError, match=message):
        main(["stream", *map(str, args)])


def test_what_cannot_be_is_one_sentence(run, plain, data, tmp_path):
    out = tmp_path / "out"
    refused("has no TTT layers, so the arms persist", plain, "--data", data, "--arms", "persist", "--out", out)
    refused("'sideways' does not exist", run, "--data", data, "--arms", "sideways", "--out", out)
    for flag in ("--chunk", "--frames", "--reset-every", "--batch", "--window"):
        refused(f"{flag} 0 is out of range", run, "--data", data, flag, "0", "--out", out)
    refused("the arm '' does not exist", run, "--data", data, "--arms", "", "--out", out)
    refused("no checkpoint", tmp_path, "--data", data, "--out", out)
    refused("does not exist", run, "--data", tmp_path / "nothing.jsonl", "--out", out)
    refused("memory is given twice", run, run, "--data", data, "--out", out)
    refused("there is no --data", run, plain, "--out", out)
    alone = write_data(tmp_path / "alone", [tokens(20)])
    refused("exchanges memories between speakers", run, "--data", alone, "--arms", "persist,permuted", "--out", out)
    (tmp_path / "raw").mkdir()
    refused("make codes of the recordings in it first", run, "--data", tmp_path / "raw", "--out", out)
    (tmp_path / "file").touch()
    refused("--out .*file cannot be made", run, "--data", data, "--out", tmp_path / "file")
    (data / "manifest.jsonl").write_text('{"path": "0.safetensors", "duration": 4.8}\n{"path"\n')
    refused("manifest.jsonl line 2 is not JSON", run, "--data", data, "--out", out)
    assert not out.exists() or not any(out.iterdir())


def test_codes_of_another_codec_are_refused(run, tmp_path):
    other = write_data(tmp_path / "other", [tokens(20)], digest="0" * 64)
    refused("was trained with the codec a codec .*was encoded with a codec .digest 000000000000", run, "--data", other)
    large = write_data(tmp_path / "large", [tokens(20) + 40])
    refused("expected -1 to 63", run, "--data", large)


def test_a_model_that_leaves_the_numbers_is_no_result(run, data, tmp_path, monkeypatch, capsys):
    def spoilt(*args, **rest):
        stored = made_scores.stream(*args, **rest)
        stored[0].arms["persist"].nats[:, 10:] = np.nan
        return stored

    monkeypatch.setattr(score_files, "stream", spoilt)
    out = tmp_path / "out"
    assert (
        main(["stream", str(run), "--data", str(data), "--arms", "persist", "--frames", "16", "--out", str(out)])
        == PARTIAL
    )
    stored = results(out)
    assert len(stored["files"]) == 2
    (entry,) = stored["skipped"]
    assert "under persist gives no finite predictions" in entry["reason"]
    assert "from frame 10 on" in entry["reason"]
    assert len(list((out / "frames" / "memory").iterdir())) == 2
    assert "skipped: memory under persist" in capsys.readouterr().err


def test_the_same_again_replaces_everything_and_less_is_refused(run, data, tmp_path):
    out = tmp_path / "out"
    words = ["stream", str(run), "--data", str(data), "--arms", "persist", "--frames", "16", "--out", str(out)]
    main([*words, "--no-figure5"])
    assert not (out / "figure5.png").exists()
    (out / "state.pdf").write_bytes(b"of before")
    (out / "notes.txt").write_text("mine")
    names = {path.name for path in out.iterdir()}
    main(words)
    made = {f"{name}.{kind}" for name in ("memory", "figure5", "state") for kind in ("png", "pdf")}
    assert {path.name for path in out.iterdir()} == names | made
    assert (out / "state.pdf").read_bytes() != b"of before"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused("of inner losses, which would not be measured again", *words[1:], "--no-figure5")
    refused("0 has other content or another length", *words[1:], "--frames", "17")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.integration
def test_interrupting_ends_as_it_should(tiny_run, tmp_path):
    """With a program on its way: an interpreter that ended under it would crash."""
    code = """
import os, signal, sys
from eval.__main__ import main
from eval.streaming import runner
from ttt_jax.utils.command import run

block, calls = runner._block, []


def interrupting(*args):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return block(*args)


runner._block, runner.SEGMENT = interrupting, 1
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do without
sys.exit(run(lambda: main(sys.argv[1:])))
"""
    words = ["stream", tiny_run.run, "--data", tiny_run.heldout, "--arms", "persist", "--chunk", "8"]
    command = [sys.executable, "-c", code, *words, "--out", tmp_path / "o"]
    env = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 130, done.stderr
    assert not (tmp_path / "o").exists()


def test_a_run_of_more_steps_replaces_its_own_evaluation_alone(run, data, tmp_path, monkeypatch):
    from eval.inputs import evaluation_set

    files = [dataset.EvalFile("a", "a", tokens(20), (), {"name": "c", "digest": "d"})]
    monkeypatch.setattr(evaluation_set, "load", lambda *_: evaluation_set.EvaluationSet(files, [], None))
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", seed=1)
    assert main(["stream", str(first)]) == 0
    shutil.rmtree(first / "checkpoints")
    shutil.copytree(second / "checkpoints", first / "checkpoints")
    refused(r"holds results of first \(step 1, .*not of first \(step 1, ", first, "--out", first / "eval")
    before = results(first / "eval")["checkpoints"][0]["info"]["about"]["weights"]
    assert main(["stream", str(first), "--arms", "persist"]) == 0
    assert results(first / "eval")["checkpoints"][0]["info"]["about"]["weights"] != before
