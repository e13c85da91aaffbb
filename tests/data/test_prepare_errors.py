"""`python -m eval prepare` on bad input: what is left out, and errors of one sentence."""

import re

import numpy as np
import pytest
import soundfile

from tests.helpers.recordings import CODEC, RATE, babble, librilight, lines_of, record, run, stems
from ttt_jax.codec import load_codec
from ttt_jax.utils import command


def with_nan(path):
    samples = babble(1.0)
    samples[700] = np.nan
    soundfile.write(path, samples, RATE, subtype="FLOAT")


DAMAGES = {
    "text": (lambda path: path.write_text("no audio"), "is not audio"),
    "empty": (lambda path: path.write_bytes(b""), "is an empty file"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:9000]), "is cut off"),
    "short": (
        lambda path: soundfile.write(path, babble(1.0)[:1000], RATE),
        "lasts 0.062 s, less than one frame of 0.080 s",
    ),
    "channels": (lambda path: record(path, channels=3), "has 3 channels"),
    "nan": (with_nan, "holds NaN or infinity"),
    "alignment": (
        lambda path: record(path, words=[["yes", [0.5, 9.0], "SPEAKER_MAIN"]]),
        "does not match its audio of 1.00 s",
    ),
    "json": (lambda path: path.with_suffix(".json").write_text("{"), "is not JSON"),
}


def damage(path, kind):
    """Makes the recording at `path` bad; returns a part of the error."""
    DAMAGES[kind][0](path)
    return DAMAGES[kind][1]


def test_bad_files_among_good_ones_are_named_and_left_out(tmp_path, capsys):
    paths = [record(tmp_path / "in" / f"bad{index}.wav") for index, _ in enumerate(DAMAGES)]
    messages = [damage(path, kind) for path, kind in zip(paths, DAMAGES, strict=True)]
    for name in ("a", "z"):
        record(tmp_path / "in" / f"{name}.wav")
    assert run(tmp_path / "in", "--out", tmp_path / "out") == command.PARTIAL == 3
    shown = capsys.readouterr()
    assert stems(tmp_path / "out") == [["a"], ["z"]]
    lines = [line for line in re.split(r"[\r\n]", shown.err) if line.startswith("skipped")]
    assert len(lines) == len(DAMAGES)
    for index, (line, what) in enumerate(zip(lines, messages, strict=True)):
        assert f"bad{index}." in line
        assert what in line
    assert "2 code files of 2 recordings, 0.00 hours of audio; 0 encoded before, the others at " in shown.out
    assert f"{len(DAMAGES)} recordings skipped" in shown.out
    assert f"manifest: {tmp_path / 'out' / 'manifest.jsonl'}" in shown.out
    assert f"python -m eval stream RUN --data {tmp_path / 'out'}" in shown.out
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) == 2


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_single_bad_file_ends_in_its_sentence(tmp_path, capsys, kind):
    path = record(tmp_path / "bad.wav")
    message = damage(path, kind)
    assert run(path, "--out", tmp_path / "out") == command.BAD_INPUT
    error = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("error: ")]
    assert len(error) == 1
    assert "bad." in error[0]
    assert message in error[0]
    assert not (tmp_path / "out" / "manifest.jsonl").exists()


@pytest.mark.parametrize("join", [False, True])
def test_a_book_without_chapters_among_others_is_reported_and_left_out(tmp_path, capsys, join):
    tree = librilight(tmp_path / "small", "9/a/c_1", "9/z/c_1")
    (tree / "9" / "empty").mkdir()
    args = (tree, tree / "9", "--out", tmp_path / "out", *(["--join"] if join else []))
    assert run(*args) == command.PARTIAL
    shown = capsys.readouterr()
    assert [entry["group"] for entry in lines_of(tmp_path / "out")] == ["9/a", "9/z"]
    lines = [line for line in re.split(r"[\r\n]", shown.err) if line.startswith("skipped")]
    assert lines == [
        f"skipped: {tree / '9' / 'empty'} is a book without chapters (it holds no audio): complete the download,"
        " remove the folder or give --layout folder."
    ]
    assert "2 code files of 2 recordings" in shown.out
    assert "; 1 recording skipped" in shown.out


def test_nothing_usable_at_all_is_an_error(tmp_path, capsys):
    for name in "ab":
        damage(record(tmp_path / "in" / f"{name}.wav"), "empty")
    assert run(tmp_path / "in", "--out", tmp_path / "out") == command.BAD_INPUT
    assert "none of 2 recordings could be encoded" in capsys.readouterr().err


MISTAKES = [
    (["nowhere"], "nowhere does not exist: give an audio file, a folder"),
    (["m.jsonl"], "m.jsonl line 2 is not JSON"),
    (["ll/8", "--layout", "librilight"], "8/empty is a book without chapters (it holds no audio)"),
    (["ll", "ll/9", "--layout", "librilight"], "none of 3 recordings or books can be used, for one: "),
    (["docs"], "docs holds no audio (.wav"),
    (["a.wav", "--layout", "librilight"], "a.wav is a file, but layout librilight is one of"),
    (["a.wav", "--out", "taken/out"], "taken/out cannot be made or used (Not a directory): give another folder"),
    (["a.wav", "--out", "data"], "data holds a manifest.jsonl that is not from `prepare`"),
    (["a.wav", "--codec", "mimi"], "codec 'mimi' does not come with the project"),
    (["a.wav", "--codec", "mimi:nowhere"], "codec 'mimi:nowhere' is neither a codec nor a file"),
    (["a.wav", "--tokenizer", "no.model"], "no.model cannot be read"),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES)
def test_a_mistake_is_one_sentence_and_makes_nothing(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "a.wav")
    for folder in ("ll/8/empty", "ll/9/empty", "ll/9/another", "docs", "data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "m.jsonl").write_text('{"path": "a.wav", "duration": 1.0}\n{"path"\n')
    for name in ("docs/a.txt", "taken", "data/manifest.jsonl"):
        (tmp_path / name).write_text("{}")
    before = set(tmp_path.rglob("*"))
    assert run("--out", "out", *args) == command.BAD_INPUT
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


def test_another_codec_or_another_choice_of_joining_needs_another_folder(tmp_path, capsys):
    path, out = record(tmp_path / "a.wav"), tmp_path / "out"
    assert run(path, "--out", out) == 0
    line = lines_of(out)
    other = load_codec()
    other.tensors["mean"] = other.tensors["mean"] + 1
    other.save(tmp_path / "other.safetensors")
    digest = load_codec(tmp_path / "other.safetensors").digest
    assert run(path, "--out", out, "--codec", tmp_path / "other.safetensors") == command.BAD_INPUT
    err = capsys.readouterr().err
    assert CODEC.digest in err
    assert digest in err
    assert run(path, "--out", out, "--join") == command.BAD_INPUT
    assert "was prepared without --join" in capsys.readouterr().err
    assert lines_of(out) == line


@pytest.mark.parametrize("out", ["out", "new/deep/out"])
@pytest.mark.parametrize("there", [True, False])
def test_a_run_that_made_nothing_leaves_nothing_and_does_not_bind_the_next(tmp_path, out, there):
    folder = tmp_path / out
    bad, good = record(tmp_path / "other" / "bad.wav"), record(tmp_path / "good.wav")
    damage(bad, "text")
    if there:
        folder.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert run(bad, "--out", folder) == command.BAD_INPUT
    assert sorted(tmp_path.rglob("*")) == before
    assert run(good, "--out", folder, "--join") == 0
    assert run(bad, "--out", folder, "--join") == command.BAD_INPUT
    assert len(lines_of(folder)) == 1
    assert run(good, "--out", folder) == command.BAD_INPUT  # now the choice holds
