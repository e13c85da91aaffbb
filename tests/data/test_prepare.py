"""`python -m eval prepare`: layouts, codes to the bit, boundaries, going on after an interrupt, and every kind of bad
input."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import types
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import safetensors.numpy
import soundfile

from eval.__main__ import main
from tests.helpers.places import ROOT
from ttt_jax.codec import load_codec
from ttt_jax.codec.kmeans import KMeansCodec
from ttt_jax.data import encode, sources
from ttt_jax.data.audio import reader
from ttt_jax.data.audio.reader import read_audio, read_blocks
from ttt_jax.data.codes import Codes, Source, read_codes, write_codes
from ttt_jax.data.corpus import EMBEDDED, CorpusConfig, load_coders
from ttt_jax.data.frames import FrameReader, open_manifest
from ttt_jax.data.manifest import Entry, read_manifest
from ttt_jax.data.text import EPAD, PAD
from ttt_jax.errors import InputError
from ttt_jax.utils import command

RATE = 16000
CODEC, TOKENIZER = load_coders(CorpusConfig())


def babble(seconds, seed=0, channels=1, rate=RATE):
    """Noise whose level changes every tenth of a second: float32 [samples, channels]."""
    rng = np.random.default_rng(seed)
    level = np.repeat(10 ** rng.uniform(-3, -0.5, (round(seconds * 10), channels)), rate // 10, axis=0)
    return (level * rng.normal(size=level.shape)).clip(-1, 1).astype(np.float32)


def record(path, seconds=1.0, seed=None, channels=1, rate=RATE, words=None, **format_):
    """Writes a recording, all different, and its alignments if there are `words`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(str(path.name).encode()) if seed is None else seed
    soundfile.write(path, babble(seconds, seed, channels, rate), rate, **format_)
    if words is not None:
        path.with_suffix(".json").write_text(json.dumps({"alignments": words}))
    return path


def librilight(root, *chapters):
    """LibriLight's tree with speaker/book/chapter.flac and their JSON."""
    for chapter in chapters:
        path = record(root / f"{chapter}.flac")
        about = {"speaker": chapter.split("/")[0], "book_meta": {"id": "7", "title": "T"}, "snr": 1.0}
        path.with_suffix(".json").write_text(json.dumps({**about, "voice_activity": [[0.1, 0.9]]}))
    return root


def run(*args):
    """The exit code of `python -m eval prepare`, as the shell sees it."""
    return command.run(lambda: main(["prepare", *map(str, args)]))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def codes_of(folder):
    return [read_codes(folder / entry["path"]) for entry in lines_of(folder)]


def offline(path):
    """The codes of each channel in one piece, and silence for as long."""
    channels = [CODEC.encode(channel) for channel in read_audio(path, RATE)]
    silence = CODEC.encode(np.zeros(channels[0].shape[1] * CODEC.frame_size, np.float32))
    return channels, silence


def stems(folder):
    return [[Path(source["path"]).stem for source in entry["sources"]] for entry in lines_of(folder)]


@pytest.fixture
def encoded(monkeypatch):
    """How many recordings have been encoded: a list with one item for each."""
    real, calls = encode.encode_blocks, []

    def counting(blocks, codec):
        calls.append(None)
        return real(blocks, codec)

    monkeypatch.setattr(encode, "encode_blocks", counting)
    return calls


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


def test_blocks_are_the_samples_of_read_audio(tmp_path, monkeypatch):
    path = record(tmp_path / "a.flac", 2.0, channels=2)
    monkeypatch.setattr(reader, "_BLOCK", 3000)
    blocks = list(read_blocks(path, 24000))
    assert len(blocks) > 5
    assert {block.dtype.name for block in blocks} == {"float32"}
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), read_audio(path, 24000))


def test_memory_does_not_grow_with_length(tmp_path):
    peaks = []
    for minutes in (1, 5):
        path = tmp_path / f"{minutes}.wav"
        soundfile.write(path, np.tile(babble(10, rate=8000), (6 * minutes, 1)), 8000)
        tracemalloc.start()
        assert run(path, "--out", tmp_path / f"out{minutes}") == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one_channel = 5 * 60 * RATE * 4  # bytes of five minutes
    assert peaks[1] - peaks[0] < one_channel / 8, peaks
    assert peaks[1] < 2 * one_channel, peaks


@pytest.mark.parametrize("voice", ["moshi", "user"])
@pytest.mark.parametrize("channels", [1, 2])
def test_voice_says_where_the_left_channel_goes(tmp_path, voice, channels):
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
    # The text is what the model's voice says: the swapped channel's words, none where it is silent.
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
        np.testing.assert_array_equal(one.read(), FrameReader(CODEC, TOKENIZER, tmp_path / "cache").read(entry))
    assert [codes.tokenizer for codes in codes_of(out)] == [TOKENIZER.digest] * 2
    stored = safetensors.numpy.load_file(out / lines_of(out)[0]["path"])
    assert stored["codes"].dtype == np.int16


YES = ["yes", [0.3, 0.5], "SPEAKER_MAIN"]


@pytest.mark.parametrize(
    ("content", "known", "told"),
    [
        ({"alignments": [YES]}, 25, None),
        ({"alignments": []}, 25, None),
        ({"alignments": [["no", [0.3, 0.5], "SPEAKER_OTHER"]]}, 25, None),
        ({"alignments": [YES, ["\u4e2d", [1.0, 1.2], "SPEAKER_MAIN"]]}, 21, "1 of 2 words dropped, 1 without a token"),
        ({"alignments": [YES, ["no", [1.0, 1.0], "SPEAKER_MAIN"]]}, 25, "1 of 2 words dropped, 1 without duration"),
        ({"alignments": [YES, ["no", [9.0, 9.5], "SPEAKER_MAIN"]]}, 25, "1 of 2 words dropped, 1 outside the audio"),
        (
            {"alignments": [["yes", [0.3, 0.5], "SPEAKER_00"]]},
            0,
            "of 1 words none is of SPEAKER_MAIN (but of 'SPEAKER_00')",
        ),
        ({"book_meta": {}, "speaker": "64"}, 0, None),
        ({"id": "X", "wav": "a.mp3", "text": "yes", "speaker": "S1"}, 0, None),
        ({"segments": [{"start": 0.3, "end": 0.5, "text": "yes"}]}, 0, "holds words that are not read"),
        ([1, 2], 0, None),
    ],
)
def test_training_takes_the_json_beside_a_recording_for_what_prepare_takes_it(
    tmp_path, capsys, caplog, content, known, told
):
    path = record(tmp_path / "a.wav", 2.0)
    path.with_suffix(".json").write_text(json.dumps(content))
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"path": "a.wav", "duration": 2.0}))
    assert run(manifest, "--out", tmp_path / "out") == 0
    shown = [line.split("warning: ")[1] for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    caplog.clear()
    frames = [
        open_manifest(one, CODEC, TOKENIZER, tmp_path / "cache", progress=False)[0].read()
        for one in (manifest, tmp_path / "out" / "manifest.jsonl", manifest)
    ]
    np.testing.assert_array_equal(frames[0], frames[1])
    assert (frames[0][0] >= 0).sum() == known
    assert shown == ([] if told is None else [caplog.messages[0]])
    assert caplog.messages == shown  # of frames from the cache and from code files nothing is said again
    assert told is None or caplog.messages[0].startswith(f"{tmp_path / 'a.json'}: {told}")


@pytest.mark.parametrize(("label", "rows"), [("SPEAKER_01", 16), ("SPEAKER_OTHER", 17), ("SPEAKER_MAIN", 17)])
def test_the_other_voice_is_known_where_one_of_both_is_named(tmp_path, label, rows):
    path = record(tmp_path / "a.wav", 2.0, channels=2, words=[["yes", [0.3, 0.5], label]])
    assert run(path, "--out", tmp_path / "out", "--voice", "user") == 0
    (codes,) = codes_of(tmp_path / "out")
    assert len(codes.codes) == rows
    assert rows == 16 or (codes.codes[0] == PAD).all() == (label == "SPEAKER_MAIN")


def test_without_alignments_there_is_no_text_row_and_training_masks_it(tmp_path):
    assert run(record(tmp_path / "a.wav"), "--out", tmp_path / "out") == 0
    (codes,) = codes_of(tmp_path / "out")
    assert codes.codes.shape == (16, 13)
    assert codes.tokenizer is None
    assert not codes.has_text
    (one,) = open_manifest(tmp_path / "out" / "manifest.jsonl", CODEC, TOKENIZER, tmp_path, progress=False)
    assert (one.read()[0] == -1).all()


def test_manifest_and_metadata_say_what_was_made_of_what(tmp_path):
    path, out = record(tmp_path / "in" / "a b!.wav", 1.0), tmp_path / "out"
    record(tmp_path / "in" / "a_b_.wav", 1.0)
    assert run(tmp_path / "in", "--out", out) == 0
    assert [len(entry["sources"]) for entry in lines_of(out)] == [1, 1]
    entry = next(entry for entry in lines_of(out) if entry["sources"][0]["path"] == str(path))
    codes = read_codes(out / entry["path"])
    source = Source(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), 1.0, 13, 0)
    assert codes.sources == (source,)
    assert (codes.frame_rate, codes.codec, codes.codec_name, codes.cardinality, codes.boundaries) == (
        12.5,
        CODEC.digest,
        CODEC.name,
        64,
        (),
    )
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
    names = {line["path"] for line in lines_of(out)}
    assert len(names) == 2
    assert all(re.fullmatch(r"codes/([\w.-]+/)*[\w.-]+\.safetensors", name) for name in names)


def test_a_folder_is_read_recursively_in_natural_order(tmp_path):
    for name in ("b/2.wav", "b/10.flac", "a/x.OGG", ".hidden/z.wav", "b/._9.wav", "1.mp3"):
        record(tmp_path / "in" / name, format="OGG" if name.endswith("OGG") else None)
    (tmp_path / "in" / "notes.txt").write_text("no audio")
    found = [r.path.relative_to(tmp_path / "in").as_posix() for r in sources.find([tmp_path / "in"]).recordings]
    assert found == ["1.mp3", "a/x.OGG", "b/2.wav", "b/10.flac"]
    groups = [(s.group, len(s.recordings)) for s in sources.streams(sources.find([tmp_path / "in"]), True)]
    assert groups == [("in", 1), ("a", 1), ("b", 2)]


def test_a_recording_named_twice_comes_once(tmp_path, monkeypatch):
    path = record(tmp_path / "in" / "a.wav")
    monkeypatch.chdir(tmp_path)
    assert len(sources.find([path, "in", "in/../in/a.wav"]).recordings) == 1


def test_librilight_chapters_join_to_books_in_natural_order(tmp_path):
    tree = librilight(tmp_path / "small", "9/b/c_10", "9/b/c_2", "10/x/c_1", "9/a/c_1")
    out = tmp_path / "out"
    assert run(tree, "--out", out, "--join") == 0
    assert stems(out) == [["c_1"], ["c_2", "c_10"], ["c_1"]]
    assert [(e["group"], e["speaker"], e["boundaries"]) for e in lines_of(out)] == [
        ("9/a", "9", []),
        ("9/b", "9", [13]),
        ("10/x", "10", []),
    ]
    assert all(len(codes.codes) == 16 for codes in codes_of(out))
    for part in (tree / "9", tree / "9" / "b"):  # any folder of the tree gives the same groups
        assert {s.group for s in sources.streams(sources.find([part]), True)} <= {"9/a", "9/b"}


@pytest.mark.parametrize("layout", ["auto", "folder"])
def test_librilights_json_is_not_read_as_alignment(tmp_path, layout):
    tree = librilight(tmp_path / "small", "9/b/c_1")
    assert run(tree, "--out", tmp_path / "out", "--layout", layout) == 0
    assert [len(codes.codes) for codes in codes_of(tmp_path / "out")] == [16]


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

        def interrupted(self, samples, state):
            if len(encoded) == 3 and samples.any():
                raise KeyboardInterrupt
            return real(self, samples, state)

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


def damage(path, kind):
    """Makes the recording at `path` bad; what is said of it."""
    content = path.read_bytes()
    if kind == "text":
        path.write_text("no audio")
        return "is not audio"
    if kind == "empty":
        path.write_bytes(b"")
        return "is an empty file"
    if kind == "cut off":
        path.write_bytes(content[: len(content) // 2])
        return "is cut off"
    if kind == "short":
        soundfile.write(path, babble(1.0)[:1000], RATE)
        return "lasts 0.062 s, less than one frame of 0.080 s"
    if kind == "channels":
        record(path, channels=3)
        return "has 3 channels"
    if kind == "nan":
        samples = babble(1.0)
        samples[700] = np.nan
        soundfile.write(path, samples, RATE, subtype="FLOAT")
        return "holds NaN or infinity"
    words = {"alignment": '{"alignments": [["yes", [0.5, 9.0], "SPEAKER_MAIN"]]}', "json": "{"}[kind]
    path.with_suffix(".json").write_text(words)
    return {"alignment": "does not match its audio of 1.00 s", "json": "is not JSON"}[kind]


KINDS = ("text", "empty", "cut off", "short", "channels", "nan", "alignment", "json")


def test_bad_files_among_good_ones_are_named_and_left_out(tmp_path, capsys):
    for index, _ in enumerate(KINDS):
        record(tmp_path / "in" / f"bad{index}.wav")
    said = [damage(tmp_path / "in" / f"bad{index}.wav", kind) for index, kind in enumerate(KINDS)]
    for name in ("a", "z"):
        record(tmp_path / "in" / f"{name}.wav")
    assert run(tmp_path / "in", "--out", tmp_path / "out") == command.PARTIAL == 3
    shown = capsys.readouterr()
    assert stems(tmp_path / "out") == [["a"], ["z"]]
    lines = [line for line in re.split(r"[\r\n]", shown.err) if line.startswith("skipped")]
    assert len(lines) == len(KINDS)
    for index, (line, what) in enumerate(zip(lines, said, strict=True)):
        assert f"bad{index}." in line
        assert what in line
    assert "2 code files of 2 recordings, 0.00 hours of audio; 0 encoded before, the others at " in shown.out
    assert f"{len(KINDS)} recordings skipped" in shown.out
    assert f"manifest: {tmp_path / 'out' / 'manifest.jsonl'}" in shown.out
    assert f"python -m eval stream RUN --data {tmp_path / 'out'}" in shown.out
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_bad_file_ends_in_its_sentence(tmp_path, capsys, kind):
    path = record(tmp_path / "bad.wav")
    said = damage(path, kind)
    assert run(path, "--out", tmp_path / "out") == command.BAD_INPUT
    error = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("error: ")]
    assert len(error) == 1
    assert "bad." in error[0]
    assert said in error[0]
    assert not (tmp_path / "out" / "manifest.jsonl").exists()


def test_words_without_tokens_name_their_file(tmp_path):
    path = record(tmp_path / "a.wav", words=[["yes", [0.3, 0.5], "SPEAKER_MAIN"]])
    mute = types.SimpleNamespace(cardinality=9, digest="m", encode=lambda word: [])
    with pytest.raises(InputError, match=r"a\.json: the text tokenizer has no"):
        encode.Encoder(CODEC, mute).encode(Entry(path, 1.0, path.with_suffix(".json")))


def test_a_stream_with_a_bad_recording_is_left_out_whole(tmp_path, capsys):
    tree = librilight(tmp_path / "small", "9/a/c_1", "9/b/c_1", "9/b/c_2")
    damage(tree / "9/b/c_2.flac", "text")
    assert run(tree, "--out", tmp_path / "out", "--join") == command.PARTIAL
    assert [entry["group"] for entry in lines_of(tmp_path / "out")] == ["9/a"]
    err = capsys.readouterr().err
    assert "skipped the stream 9/b: " in err
    assert "c_2.flac is not audio" in err


@pytest.mark.parametrize("join", [False, True])
def test_a_book_without_chapters_among_others_is_told_and_left_out(tmp_path, capsys, join):
    tree = librilight(tmp_path / "small", "9/a/c_1", "9/z/c_1")
    (tree / "9" / "empty").mkdir()
    args = (tree, tree / "9", "--out", tmp_path / "out", *(["--join"] if join else []))
    assert run(*args) == command.PARTIAL
    shown = capsys.readouterr()
    assert [entry["group"] for entry in lines_of(tmp_path / "out")] == ["9/a", "9/z"]
    said = [line for line in re.split(r"[\r\n]", shown.err) if line.startswith("skipped")]
    assert said == [
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


def test_a_duration_that_the_manifest_states_wrongly_is_told(tmp_path, capsys):
    record(tmp_path / "a.wav")
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": "a.wav", "duration": 5.0}))
    assert run(tmp_path / "m.jsonl", "--out", tmp_path / "out") == command.BAD_INPUT
    assert "a.wav lasts 1.00 s but its manifest says 5.00 s" in capsys.readouterr().err


def manifest_of_garbage(folder):
    (folder / "m.jsonl").write_text('{"path": "a.wav", "duration": 1.0}\n{"path"\n')
    return [folder / "m.jsonl"]


def book_without_chapters(folder):
    (folder / "ll" / "9" / "empty").mkdir(parents=True)
    return [folder / "ll", folder / "ll" / "9", "--layout", "librilight"]


def books_without_chapters(folder):
    (folder / "ll" / "9" / "another").mkdir(parents=True)
    return book_without_chapters(folder)


def folder_without_audio(folder):
    (folder / "docs").mkdir()
    (folder / "docs" / "a.txt").write_text("text")
    return [folder / "docs"]


def file_for_folder(folder):
    (folder / "taken").write_text("a file")
    return [folder / "a.wav", "--out", folder / "taken" / "out"]


def foreign_manifest(folder):
    (folder / "data").mkdir()
    (folder / "data" / "manifest.jsonl").write_text("{}")
    return [folder / "a.wav", "--out", folder / "data"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: [folder / "nowhere"], "nowhere does not exist: give an audio file, a folder"),
        (manifest_of_garbage, "m.jsonl line 2 is not JSON"),
        (book_without_chapters, "9/empty is a book without chapters (it holds no audio)"),
        (books_without_chapters, "none of 2 recordings or books can be used, for one: "),
        (folder_without_audio, "docs holds no audio (.wav"),
        (
            lambda folder: [folder / "a.wav", "--layout", "librilight"],
            "a.wav is a file, but layout librilight is one of",
        ),
        (file_for_folder, "taken/out cannot be made or used (Not a directory): give another folder"),
        (foreign_manifest, "data holds a manifest.jsonl that is not from `prepare`"),
        (lambda folder: [folder / "a.wav", "--codec", "mimi"], "codec 'mimi' is not available"),
        (lambda folder: [folder / "a.wav", "--tokenizer", folder / "no.model"], "no.model cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence_and_makes_nothing(tmp_path, capsys, make, said):
    record(tmp_path / "a.wav")
    args = make(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert run("--out", tmp_path / "out", *args) == command.BAD_INPUT
    err = capsys.readouterr().err
    assert said in err
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


def test_code_files_of_others_need_only_rate_and_codec(tmp_path):
    metadata = {"frame_rate": "12.5", "codec": "d" * 64}
    safetensors.numpy.save_file({"codes": np.zeros((8, 5), np.int64)}, tmp_path / "a.safetensors", metadata=metadata)
    codes = read_codes(tmp_path / "a.safetensors")
    assert codes[1:] == (12.5, "d" * 64, None, None, None, None, (), (), None)
    assert codes.codes.dtype == np.int32
    assert (codes.num_frames, codes.seconds, codes.has_text) == (5, 0.4, False)


def test_code_files_return_what_was_written(tmp_path):
    source = Source("\u00e9\udcff.wav", "0" * 64, 0.25, 4, 0)
    tokens = np.full((17, 9), 40000, np.int32)  # no int16
    codes = Codes(tokens, 12.5, "d", "name", 50000, "t", "moshi", (source, source._replace(start=4)), (4,), "i")
    write_codes(tmp_path / "sub" / "a.safetensors", codes)
    found = read_codes(tmp_path / "sub" / "a.safetensors")
    np.testing.assert_array_equal(found.codes, tokens)
    assert found[1:] == codes[1:]
    assert found.has_text
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"boundaries": "[5]"}, r"states boundaries \[5\]"),
        ({"boundaries": "[3, 2]"}, r"states boundaries \[3, 2\]"),
        ({"boundaries": "{"}, "metadata that cannot be read"),
        ({"sources": '[{"path": "a"}]'}, "metadata that cannot be read"),
        ({"cardinality": "many"}, "metadata that cannot be read"),
        ({"frame_rate": "0"}, "states frame_rate '0'"),
        ({"checksum": "0" * 64}, "is damaged"),
    ],
)
def test_metadata_that_make_no_sense_are_refused(tmp_path, changes, said):
    metadata = {"frame_rate": "12.5", "codec": "d" * 64} | changes
    safetensors.numpy.save_file({"codes": np.zeros((8, 5), np.int16)}, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(InputError, match=said):
        read_codes(tmp_path / "a.safetensors")


def test_a_text_row_of_another_tokenizer_is_refused(tmp_path):
    record(tmp_path / "a.wav", words=[["yes", [0.3, 0.5], "SPEAKER_MAIN"]])
    assert run(tmp_path / "a.wav", "--out", tmp_path / "out") == 0
    (entry,) = read_manifest(tmp_path / "out" / "manifest.jsonl").entries
    codes = read_codes(entry.path)
    write_codes(entry.path, codes._replace(tokenizer="u" * 64))
    with pytest.raises(InputError, match=f"states tokenizer 'u*' in its metadata.*{TOKENIZER.digest}"):
        FrameReader(CODEC, TOKENIZER, tmp_path / "cache").read(entry)
    write_codes(entry.path, codes._replace(tokenizer=None))
    assert FrameReader(CODEC, TOKENIZER, tmp_path / "cache").read(entry).shape == (17, 13)


def test_prepare_loads_no_jax():
    code = "import sys, eval.prepare, eval.__main__; sys.exit('jax' in sys.modules)"
    root = ROOT
    assert subprocess.run([sys.executable, "-c", code], cwd=root, env=dict(os.environ)).returncode == 0


def test_help_tells_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "3 some recordings were unusable" in shown
    for layout in get_args(sources.Layout):
        assert layout in shown
