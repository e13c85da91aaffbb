"""`python -m eval prepare`: layouts, equal codes, text, boundaries."""

import hashlib
import json
import shutil
import subprocess
import sys
import tracemalloc
from typing import get_args

import numpy as np
import pytest
import safetensors.numpy
import soundfile

from eval.__main__ import main
from tests.helpers.manifests import write_entry
from tests.helpers.places import ROOT
from tests.helpers.recordings import (
    CODEC,
    RATE,
    TOKENIZER,
    babble,
    codes_of,
    librilight,
    lines_of,
    offline,
    record,
    run,
    stems,
)
from ttt_jax.data import encode, sources
from ttt_jax.data.audio import reader
from ttt_jax.data.codes import Source, read_codes
from ttt_jax.data.corpus import EMBEDDED
from ttt_jax.data.frames import FrameReader, open_manifest
from ttt_jax.data.manifest import read_manifest
from ttt_jax.data.text import EPAD, PAD


@pytest.mark.parametrize("rate", [RATE, 44100])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("block", [1000, 1 << 18])
def test_codes_equal_offline_encoding_to_the_bit(tmp_path, monkeypatch, rate, channels, block):
    monkeypatch.setattr(reader, "_BLOCK", block)
    monkeypatch.setattr(encode, "_BLOCK", 5)
    path = record(tmp_path / "a.wav", 2.5, channels=channels, rate=rate)
    assert run(path, "--out", tmp_path / "out") == 0
    voices, silence = offline(path)
    (codes,) = codes_of(tmp_path / "out")
    np.testing.assert_array_equal(codes.codes, np.concatenate([voices[0], voices[1] if channels == 2 else silence]))
    assert len(np.unique(codes.codes[0])) > 3


def test_memory_does_not_grow_with_length(tmp_path):
    peaks = []
    for minutes in (1, 3):
        path = tmp_path / f"{minutes}.wav"
        soundfile.write(path, np.tile(babble(10, rate=8000), (6 * minutes, 1)), 8000)
        tracemalloc.start()
        assert run(path, "--out", tmp_path / f"out{minutes}") == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one_channel = 3 * 60 * RATE * 4  # bytes of three minutes
    assert peaks[1] - peaks[0] < one_channel / 8, peaks
    assert peaks[1] < 2 * one_channel, peaks


@pytest.mark.parametrize("voice", ["moshi", "user"])
@pytest.mark.parametrize("channels", [1, 2])
def test_voice_decides_where_the_left_channel_goes(tmp_path, voice, channels):
    words = [["yes", [0.3, 0.5], "SPEAKER_MAIN"], ["no", [0.6, 0.8], "SPEAKER_OTHER"]]
    path = record(tmp_path / "a.wav", 2.0, channels=channels, words=words)
    assert run(path, "--out", tmp_path / "out", "--voice", voice) == 0
    found, silence = offline(path)
    left, right = found if channels == 2 else (found[0], silence)
    (codes,) = codes_of(tmp_path / "out")
    assert codes.voice == voice
    assert codes.codes.shape == (17, 25)
    moshi, user = (left, right) if voice == "moshi" else (right, left)
    np.testing.assert_array_equal(codes.codes[1:9], moshi)
    np.testing.assert_array_equal(codes.codes[9:], user)
    # The text is that of Moshi's stream: with --voice user that of the right channel, none if it is silent.
    spoken = {("moshi", 1): "yes", ("moshi", 2): "yes", ("user", 2): "no", ("user", 1): ""}[voice, channels]
    expected = np.full(25, PAD)
    if spoken:
        start, tokens = {"yes": 3, "no": 7}[spoken], TOKENIZER.encode(spoken)
        expected[start - 1 : start + len(tokens)] = [EPAD, *tokens]
    np.testing.assert_array_equal(codes.codes[0], expected)


def test_embedded_corpus_gives_the_frames_that_training_reads(tmp_path):
    out = tmp_path / "out"
    manifest = tmp_path / "two.jsonl"
    entries = [json.loads(line) for line in (EMBEDDED / "heldout.jsonl").read_text().splitlines()[:2]]
    manifest.write_text("".join(json.dumps(e | {"path": str(EMBEDDED / e["path"])}) + "\n" for e in entries))
    assert run(manifest, "--out", out) == 0
    made = open_manifest(out / "manifest.jsonl", CODEC, TOKENIZER, tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache").exists()
    for one, entry in zip(made, read_manifest(manifest).entries, strict=True):
        np.testing.assert_array_equal(one.read(), FrameReader(CODEC, TOKENIZER, tmp_path / "cache").open(entry).read())
    assert [codes.tokenizer for codes in codes_of(out)] == [TOKENIZER.digest] * 2
    stored = safetensors.numpy.load_file(out / lines_of(out)[0]["path"])
    assert stored["codes"].dtype == np.int16


YES = ["yes", [0.3, 0.5], "SPEAKER_MAIN"]


@pytest.mark.parametrize(
    ("content", "known", "warning"),
    [
        ({"alignments": [YES]}, 25, None),
        ({"alignments": []}, 25, None),
        ({"alignments": [["no", [0.3, 0.5], "SPEAKER_OTHER"]]}, 25, None),
        ({"alignments": [YES, ["\u4e2d", [1.0, 1.2], "SPEAKER_MAIN"]]}, 21, "1 of 2 words dropped, 1 without a token"),
        ({"alignments": [YES, ["no", [1.0, 1.0], "SPEAKER_MAIN"]]}, 25, "1 of 2 words dropped, 1 without duration"),
        ({"alignments": [YES, ["no", [9.0, 9.5], "SPEAKER_MAIN"]]}, 25, "1 of 2 words dropped, 1 outside the audio"),
        ({"alignments": [["yes", [0.3, 0.5], "SPEAKER_00"]]}, 0, "of 1 words none is of SPEAKER_MAIN"),
        ({"book_meta": {}, "speaker": "64"}, 0, None),
        ({"id": "X", "wav": "a.mp3", "text": "yes", "speaker": "S1"}, 0, None),
        ({"segments": [{"start": 0.3, "end": 0.5, "text": "yes"}]}, 0, "holds words that are not read"),
        ([1, 2], 0, None),
    ],
)
def test_training_reads_the_json_beside_a_recording_as_prepare(tmp_path, capsys, caplog, content, known, warning):
    manifest = write_entry(tmp_path, babble(2.0))
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert run(manifest, "--out", tmp_path / "out") == 0
    shown = [line.split("warning: ")[1] for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    caplog.clear()
    frames = [
        open_manifest(one, CODEC, TOKENIZER, tmp_path / "cache", progress=False)[0].read()
        for one in (manifest, tmp_path / "out" / "manifest.jsonl", manifest)
    ]
    np.testing.assert_array_equal(frames[0], frames[1])
    assert (frames[0][0] >= 0).sum() == known
    assert shown == ([] if warning is None else [caplog.messages[0]])
    assert caplog.messages == shown  # of frames from the cache and from code files nothing is logged again
    assert warning is None or caplog.messages[0].startswith(f"{tmp_path / 'a.json'}: {warning}")


@pytest.mark.parametrize(("label", "rows"), [("SPEAKER_01", 16), ("SPEAKER_OTHER", 17), ("SPEAKER_MAIN", 17)])
def test_the_other_voice_is_known_where_one_of_both_is_named(tmp_path, label, rows):
    path = record(tmp_path / "a.wav", 2.0, channels=2, words=[["yes", [0.3, 0.5], label]])
    assert run(path, "--out", tmp_path / "out", "--voice", "user") == 0
    (codes,) = codes_of(tmp_path / "out")
    assert len(codes.codes) == rows
    assert rows == 16 or (codes.codes[0] == PAD).all() == (label == "SPEAKER_MAIN")


def test_without_alignments_there_is_no_text_row(tmp_path):
    assert run(record(tmp_path / "a.wav"), "--out", tmp_path / "out") == 0
    (codes,) = codes_of(tmp_path / "out")
    assert codes.codes.shape == (16, 13)
    assert codes.tokenizer is None
    assert not codes.has_text


def test_manifest_and_metadata_say_what_was_made_of_what(tmp_path):
    path, out = record(tmp_path / "in" / "a b!.wav", 1.0), tmp_path / "out"
    record(tmp_path / "in" / "a_b_.wav", 1.0)
    assert run(tmp_path / "in", "--out", out) == 0
    assert [len(entry["sources"]) for entry in lines_of(out)] == [1, 1]
    entry = next(entry for entry in lines_of(out) if entry["sources"][0]["path"] == str(path))
    codes = read_codes(out / entry["path"])
    source = Source(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), 1.0, 13, 0)
    assert codes.sources == (source,)
    assert codes[1:5] == (12.5, CODEC.digest, CODEC.name, 64)
    assert codes.boundaries == ()
    assert entry == {
        "path": entry["path"],
        "duration": 13 / 12.5,
        "frames": 13,
        "group": "in",
        "codec": CODEC.digest,
        "codec_name": CODEC.name,
        "sha256": hashlib.sha256((out / entry["path"]).read_bytes()).hexdigest(),
        "boundaries": [],
        "sources": [source._asdict()],
    }
    assert len({line["path"] for line in lines_of(out)}) == 2


def test_a_folder_is_read_recursively_in_natural_order(tmp_path):
    for name in ("b/2.wav", "b/10.flac", "a/x.OGG", ".hidden/z.wav", "b/._9.wav", "1.mp3"):
        record(tmp_path / "in" / name, format="OGG" if name.endswith("OGG") else None)
    (tmp_path / "in" / "notes.txt").write_text("no audio")
    found = [r.path.relative_to(tmp_path / "in").as_posix() for r in sources.find([tmp_path / "in"]).recordings]
    assert found == ["1.mp3", "a/x.OGG", "b/2.wav", "b/10.flac"]
    groups = [(s.group, len(s.recordings)) for s in sources.streams(sources.find([tmp_path / "in"]), True)]
    assert groups == [("in", 1), ("a", 1), ("b", 2)]


def test_librilight_chapters_join_to_books_in_natural_order(tmp_path):
    tree = librilight(tmp_path / "small", "9/b/c_10", "9/b/c_2", "10/x/c_1", "9/a/c_1")
    out = tmp_path / "out"
    assert run(tree, "--out", out, "--join") == 0
    assert stems(out) == [["c_1"], ["c_2", "c_10"], ["c_1"]]
    expected = [("9/a", "9", []), ("9/b", "9", [13]), ("10/x", "10", [])]
    assert [(e["group"], e["speaker"], e["boundaries"]) for e in lines_of(out)] == expected
    assert all(len(codes.codes) == 16 for codes in codes_of(out))
    for part in (tree / "9", tree / "9" / "b"):  # any folder of the tree gives the same groups
        assert {s.group for s in sources.streams(sources.find([part]), True)} <= {"9/a", "9/b"}


@pytest.mark.parametrize("transcripts", ["84-121.trans.txt", "84-121-0.txt"])
def test_librispeech_long_joins_by_speaker(tmp_path, transcripts):
    tree = tmp_path / "long"
    for name in ("84/121/84-121-10", "84/121/84-121-2", "84/7/84-7-1", "90/1/90-1-1"):
        record(tree / "dev-clean" / f"{name}.flac")
        (tree / "dev-clean" / name).parent.joinpath(transcripts).write_text("84-121-2 WORDS WITHOUT TIMES")
    out = tmp_path / "out"
    assert run(tree, "--out", out, "--join") == 0
    assert stems(out) == [["84-7-1", "84-121-2", "84-121-10"], ["90-1-1"]]
    assert [(e["group"], e["speaker"]) for e in lines_of(out)] == [("dev-clean/84", "84"), ("dev-clean/90", "90")]
    assert [len(codes.codes) for codes in codes_of(out)] == [16, 16]
    assert [s.group for s in sources.streams(sources.find([tree], "folder"), True)] == ["7", "121", "1"]


def test_a_folder_with_notes_is_no_data_set(tmp_path):
    record(tmp_path / "talks" / "monday" / "a.flac").with_name("notes.txt").write_text("notes")
    assert [recording.group for recording in sources.find([tmp_path / "talks"]).recordings] == ["monday"]


def test_a_manifest_keeps_its_order_and_joins_by_folder(tmp_path):
    names = ["b/2.wav", "a/1.wav", "b/1.wav"]
    for name in names:
        record(tmp_path / name)
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps({"path": name, "duration": 1.0}) + "\n" for name in names))
    assert run(manifest, "--out", tmp_path / "out", "--join") == 0
    assert stems(tmp_path / "out") == [["2", "1"], ["1"]]
    # Another manifest of the same folders is another stream.
    shutil.copy(manifest, tmp_path / "n.jsonl")
    keys = [{s.name for s in sources.streams(sources.find([tmp_path / f"{m}.jsonl"]), True)} for m in "mn"]
    assert not keys[0] & keys[1]


def test_joined_recordings_are_each_encoded_from_the_start(tmp_path):
    words = [["yes", [0.3, 0.5], "SPEAKER_MAIN"]]
    paths = [record(tmp_path / "in" / "1.wav", 1.0), record(tmp_path / "in" / "2.wav", 1.5, words=words)]
    paths.append(record(tmp_path / "in" / "3.wav", 0.5))
    assert run(tmp_path / "in", "--out", tmp_path / "out", "--join") == 0
    (codes,) = codes_of(tmp_path / "out")
    each = [np.concatenate([voices[0], silence]) for voices, silence in map(offline, paths)]
    np.testing.assert_array_equal(codes.codes[1:], np.concatenate(each, axis=1))
    assert codes.boundaries == (13, 32)
    assert [source.start for source in codes.sources] == [0, 13, 32]
    assert [source.seconds for source in codes.sources] == [1.0, 1.5, 0.5]
    text = codes.codes[0]
    assert (text[:13] == -1).all()
    assert (text[32:] == -1).all()
    assert text[15] == EPAD
    assert codes.tokenizer == TOKENIZER.digest


@pytest.mark.integration
def test_prepare_loads_no_jax():
    code = "import sys, eval.prepare, eval.__main__; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_help_tells_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "3 some recordings were unusable" in shown
    for layout in get_args(sources.Layout):
        assert layout in shown
