"""`python -m eval prepare` again: what an earlier, interrupted or killed run has made."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.helpers.places import ROOT
from tests.helpers.recordings import codes_of, librilight, lines_of, offline, record, run, stems
from ttt_jax.codec.kmeans import KMeansCodec
from ttt_jax.data import encode
from ttt_jax.data.codes import read_codes
from ttt_jax.data.corpus import EMBEDDED
from ttt_jax.utils import command


@pytest.fixture
def encoded(monkeypatch):
    """How many recordings have been encoded: a list with one item for each."""
    real, calls = encode.encode_blocks, []

    def counting(blocks, codec):
        calls.append(None)
        return real(blocks, codec)

    monkeypatch.setattr(encode, "encode_blocks", counting)
    return calls


def test_a_second_run_encodes_only_what_is_new_or_changed(tmp_path, encoded, capsys):
    for index in range(3):
        record(tmp_path / "in" / f"{index}.wav")
    args = (tmp_path / "in", "--out", tmp_path / "out")
    assert run(*args) == 0
    first = lines_of(tmp_path / "out")
    assert len(encoded) == 3
    assert run(*args) == 0
    assert len(encoded) == 3
    assert lines_of(tmp_path / "out") == first
    assert "3 encoded before; 0 recordings skipped" in capsys.readouterr().out
    record(tmp_path / "in" / "0.wav", 1.2)
    record(tmp_path / "in" / "1.wav", seed=77)  # as long as before
    record(tmp_path / "in" / "3.wav")
    assert run(*args) == 0
    assert len(encoded) == 6
    assert [entry["frames"] for entry in lines_of(tmp_path / "out")] == [15, 13, 13, 13]
    ((expected,), _) = offline(tmp_path / "in" / "1.wav")
    np.testing.assert_array_equal(codes_of(tmp_path / "out")[1].codes[:8], expected)


@pytest.mark.parametrize("what", ["voice", "tokenizer", "alignment", "codes damaged", "codes of another recording"])
def test_whatever_decides_the_codes_makes_them_again(tmp_path, encoded, what):
    path = record(tmp_path / "a.wav", words=[["yes", [0.3, 0.5], "SPEAKER_MAIN"]])
    args, out = [path, "--out", tmp_path / "out"], tmp_path / "out"
    assert run(*args) == 0
    before, (line,) = codes_of(out)[0].codes, lines_of(out)
    if what == "voice":
        args += ["--voice", "user"]
    elif what == "tokenizer":
        model = (EMBEDDED / "tokenizer" / "spm512.model").read_bytes()
        # An unknown field behind the message: another digest, the same pieces.
        (tmp_path / "t.model").write_bytes(model + b"\xa2\x06\x01x")
        args += ["--tokenizer", tmp_path / "t.model"]
    elif what == "alignment":
        path.with_suffix(".json").write_text(json.dumps({"alignments": [["no", [0.3, 0.5], "SPEAKER_MAIN"]]}))
    elif what == "codes damaged":
        content = bytearray((out / line["path"]).read_bytes())
        content[-20] ^= 1
        (out / line["path"]).write_bytes(content)
    else:
        record(tmp_path / "b.wav", words=[["yes", [0.3, 0.5], "SPEAKER_MAIN"]])
        assert run(tmp_path / "b.wav", "--out", out) == 0
        encoded.pop()
        shutil.copy(out / lines_of(out)[1]["path"], out / line["path"])
    assert run(*args) == 0
    assert len(encoded) == 2
    changed = what in ("voice", "alignment")
    assert (codes_of(out)[0].codes.tolist() != before.tolist()) == changed


@pytest.mark.parametrize("join", [False, True])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch, encoded, capsys, join):
    tree = librilight(tmp_path / "small", *(f"9/b/c_{i}" for i in range(4)))
    args = (tree, "--out", tmp_path / "out", *(["--join"] if join else []))
    with monkeypatch.context() as patch:
        real = KMeansCodec.encode_step

        def interrupted(self, audio, *args):
            if len(encoded) == 3 and audio.any():
                raise KeyboardInterrupt
            return real(self, audio, *args)

        patch.setattr(KMeansCodec, "encode_step", interrupted)
        assert run(*args) == command.INTERRUPTED
    assert len(lines_of(tmp_path / "out")) == 2 if not join else not (tmp_path / "out" / "manifest.jsonl").exists()
    assert len(encoded) == 3
    assert run(*args) == 0
    assert len(encoded) == 5
    assert "2 encoded before" in capsys.readouterr().out
    whole = np.concatenate([codes.codes for codes in codes_of(tmp_path / "out")], axis=1)
    each = [
        np.concatenate([voices[0], silence]) for voices, silence in (offline(p) for p in sorted(tree.rglob("*.flac")))
    ]
    np.testing.assert_array_equal(whole, np.concatenate(each, axis=1))


@pytest.mark.integration
def test_a_killed_run_leaves_only_whole_files(tmp_path, encoded):
    for index in range(40):
        record(tmp_path / "in" / f"{index}.wav", 4.0)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "eval", "prepare", tmp_path / "in", "--out", out],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None and len(list(out.rglob("*.safetensors"))) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len([read_codes(path) for path in out.rglob("*.safetensors")])
    assert finished >= 3
    assert run(tmp_path / "in", "--out", out) == 0
    assert len(encoded) == 40 - finished
    assert len(lines_of(out)) == 40


def test_earlier_entries_stay_while_their_file_is_intact(tmp_path, capsys):
    out = tmp_path / "out"
    for name in "abcd":
        assert run(record(tmp_path / f"{name}.wav"), "--out", out) == 0
    assert stems(out) == [["a"], ["b"], ["c"], ["d"]]
    (out / lines_of(out)[1]["path"]).unlink()
    with (out / lines_of(out)[3]["path"]).open("ab") as file:
        file.write(b"more")
    assert run(tmp_path / "a.wav", "--out", out) == 0
    assert stems(out) == [["a"], ["c"]]
    assert capsys.readouterr().err.count("which is gone or damaged") == 2
    (tmp_path / "a.wav").write_bytes(b"no audio any more")
    assert run(tmp_path / "a.wav", "--out", out) == command.BAD_INPUT
    assert stems(out) == [["c"]]
