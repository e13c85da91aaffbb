"""`python -m eval make-mini`: the official layouts, whole or not at all, and what the recordings are like."""

import csv
import hashlib
import shutil
from collections import Counter

import numpy as np
import pytest

from eval.__main__ import main
from eval.benchmarks.layouts import MINI_FILE
from eval.mini import command, consistency, sentences, stories, voices, words
from eval.mini.command import MiniSet, Options, make
from eval.mini.voices import MARGIN, RATE, SYNTHESISERS, Synthesiser
from eval.results import schema
from tests.helpers.places import ROOT
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.errors import InputError

BLOCK = 1024
"""Samples that an IMA ADPCM file is rounded up to, at most."""
SHIPPED = ROOT / "corpus" / "mini"
LEXICAL = ["filename", "id", "voice", "frequency", "word", "phones", "length", "correct"]
SYNTACTIC = ["filename", "id", "voice", "type", "subtype", "transcription", "correct"]
PARTS = ["lexical/dev", "syntactic/dev", "sSC", "tSC"]
SALMON = ["salmon_benchmark/speaker_consistency", "salmon_benchmark/gender_consistency"]


class Tones(Synthesiser):
    """A tone for each text or phones and voice, which needs no program."""

    NAME = "tones"
    VOICES = {"low": "m", "high": "f", "deep": "m"}
    LIST = ""
    _entry = _text = _phones = None

    def version(self):
        return "1"

    def has(self, voice):
        return True

    def say(self, text, voice):
        seed = int(hashlib.sha256(f"{text} {voice}".encode()).hexdigest()[:8], 16)
        length = RATE // 10 + 100 * len(text)
        return voices.tidy(np.sin(np.arange(length) * (0.05 + seed / 2**32)).astype(np.float32))


@pytest.fixture(scope="module")
def excerpts():
    """The embedded voices' excerpts, decoded once."""
    return consistency._excerpts()


@pytest.fixture(autouse=True)
def decoded_once(monkeypatch, excerpts):
    monkeypatch.setattr(consistency, "_excerpts", lambda: excerpts)


@pytest.fixture
def tones(monkeypatch):
    monkeypatch.setattr(command, "find", lambda name: Tones())


def options(out, **changes):
    return Options(str(out), **{"pairs": 4, "stories": 3, "voices": "low,high", **changes})


def rows(folder, part):
    with (folder / part / "gold.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        return reader.fieldnames, list(reader)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wavs(folder, part):
    return {path.stem for path in (folder / part).glob("*.wav")}


def check_layout(folder, made):
    """Checks that `folder` holds what `made` says, in the official layouts."""
    assert schema.read(folder, MiniSet, MINI_FILE) == made
    assert made.name == "mini"
    assert set(made.pairs) - {SALMON[1]} == {*PARTS, SALMON[0]}
    for part, columns, key in (
        ("lexical/dev", LEXICAL, ("voice", "id")),
        ("syntactic/dev", SYNTACTIC, ("type", "subtype", "id", "voice")),
    ):
        names, table = rows(folder, part)
        assert names == columns
        assert len({row["filename"] for row in table}) == len(table) == 2 * made.pairs[part]
        assert {row["filename"] for row in table} == wavs(folder, part)
        sides = {}
        for row in table:
            sides.setdefault(tuple(row[name] for name in key), []).append(row["correct"])
        assert set(map(tuple, sides.values())) == {("1", "0")}
        assert {row["voice"] for row in table} == set(made.voices)
    for part in ("sSC", "tSC"):
        split = [name.split("_") for name in wavs(folder, part)]
        assert Counter(len(parts) for parts in split) == {3: 2 * made.pairs[part]}
        pairs = {(number, story) for number, story, _ in split}
        assert len({story for _, story in pairs}) == len(pairs) == made.pairs[part]
        assert {(*pair, side) for pair in pairs for side in ("correct", "incorrect")} == set(map(tuple, split))
    for part in SALMON:
        count = made.pairs.get(part, 0)
        assert wavs(folder, part) == {f"sample_{i}_{j}" for i in range(count) for j in (0, 1)}
    assert (folder / "NOTICE").is_file()


def test_the_layouts_are_the_official_ones(tones, tmp_path):
    made = make(options(tmp_path / "mini", pairs=5))
    check_layout(tmp_path / "mini", made)
    assert made.pairs == dict.fromkeys(PARTS[:2], 10) | dict.fromkeys(PARTS[2:], 3) | dict.fromkeys(SALMON, 5)
    _, table = rows(tmp_path / "mini", "lexical/dev")
    assert {row["frequency"] for row in table if row["correct"] == "1"} == {"0", "3", "10", "50", "300"}
    assert {(row["frequency"], row["word"]) for row in table if row["correct"] == "0"} == {("", "")}
    assert all(row["length"] == str(len(row["phones"].split())) for row in table)


def test_names_of_files_do_not_say_what_is_right(tones, tmp_path):
    make(options(tmp_path / "mini", pairs=20))
    for part in PARTS[:2]:
        _, table = rows(tmp_path / "mini", part)
        first = [right["filename"] < wrong["filename"] for right, wrong in zip(table[::2], table[1::2], strict=True)]
        assert 0.25 < np.mean(first) < 0.75


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tones, tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        make(options(tmp_path / name, seed=seed))
    one, same, other = (content(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same
    assert one["lexical/dev/gold.csv"] != other["lexical/dev/gold.csv"]
    assert one["sources.csv"] != other["sources.csv"]


def test_recordings_are_16_bits_at_16_khz_and_pairs_of_words_and_sentences_equally_long(tones, tmp_path):
    import soundfile

    made = make(options(tmp_path / "mini"))
    assert {(i.samplerate, i.channels, i.subtype) for i in map(soundfile.info, (tmp_path / "mini").rglob("*.wav"))} == {
        (16_000, 1, "PCM_16")
    }
    for part in PARTS[:2]:
        _, table = rows(tmp_path / "mini", part)
        frames = [soundfile.info(tmp_path / "mini" / part / f"{row['filename']}.wav").frames for row in table]
        assert frames[::2] == frames[1::2]
        assert made.seconds[part] != (0, 0)


def test_compact_files_sound_the_same_and_take_a_quarter(tones, tmp_path):
    for name, compact in (("whole", False), ("compact", True)):
        make(options(tmp_path / name, compact=compact))
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).rglob("*.wav")) for name in ("whole", "compact")]
    assert 3.5 < sizes[0] / sizes[1] < 4.2
    for path in (tmp_path / "whole").rglob("*_*.wav"):
        whole = read_audio(path, RATE)[0]
        compact = read_audio(tmp_path / "compact" / path.relative_to(tmp_path / "whole"), RATE)[0]
        assert 0 <= len(compact) - len(whole) < BLOCK
        assert np.mean((whole - compact[: len(whole)]) ** 2) < 0.01 * np.mean(whole**2)
        assert np.abs(compact[len(whole) :]).max(initial=0) < 0.01


def test_stories_of_a_pair_begin_alike_and_the_right_one_is_the_same_in_both_parts(tones, tmp_path):
    make(options(tmp_path / "mini"))
    for story in stories.draw(0, 3):
        start = len(Tones().say(story.start, "low"))
        found = [
            read_audio(next((tmp_path / "mini" / part).glob(f"*_{story.id}_{side}.wav")), RATE)[0]
            for part, side in (("sSC", "correct"), ("tSC", "correct"), ("sSC", "incorrect"), ("tSC", "incorrect"))
        ]
        np.testing.assert_array_equal(found[0], found[1])
        for other in found[2:]:
            np.testing.assert_array_equal(other[:start], found[0][:start])
            assert not np.array_equal(other, found[0])


def test_voices_of_one_gender_make_no_pairs_of_genders(tones, tmp_path, capsys):
    main(["make-mini", "--out", str(tmp_path / "mini"), "--pairs", "4", "--stories", "2", "--voices", "low,deep"])
    assert not (tmp_path / "mini" / SALMON[1]).exists()
    assert "no gender_consistency: the voices are of one gender" in capsys.readouterr().out


# Speakers


@pytest.mark.parametrize("count", [4, 5, 40])
def test_the_foreign_part_is_of_another_speaker_and_each_excerpt_is_right_and_wrong_as_often(count):
    pairs = consistency.speaker_pairs(1, count)
    for pair, right, wrong in pairs:
        assert pair.first.speaker == pair.same.speaker != pair.other.speaker
        assert pair.first != pair.same
        assert len(right) == len(wrong)
        half = (len(right) - RATE // 5) // 2
        np.testing.assert_array_equal(right[:half], wrong[:half])
        levels = [np.sqrt(np.mean(part**2)) for part in (right[:half], right[-half:], wrong[-half:])]
        assert max(levels) < 1.3 * min(levels)
    assert Counter(pair.same for pair, _, _ in pairs) == Counter(pair.other for pair, _, _ in pairs)
    excerpts = [excerpt for pair, _, _ in pairs for excerpt in (pair.first, pair.same)]
    assert len(set(excerpts)) == len(excerpts)
    assert len({pair.first.voice for pair, _, _ in pairs}) == min(count, 6)


def test_more_pairs_of_speakers_than_there_are_excerpts_are_refused():
    with pytest.raises(InputError, match="--pairs 1000 is more than the .* pairs of excerpts"):
        consistency.speaker_pairs(0, 1000)


# What is refused


def test_a_folder_that_is_taken_stays_as_it_is(tones, tmp_path):
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="mini is not empty"):
        make(options(tmp_path / "mini"))
    assert content(tmp_path) == {"mini/mine.txt": b"mine"}


def test_an_error_leaves_nothing_behind(tones, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "speakers", lambda *_: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        make(options(tmp_path / "mini"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "none of flite and espeak-ng is installed, .* by `apt-get install flite`"),
        (["--synthesiser", "espeak-ng"], "espeak-ng is not installed, .* by `apt-get install espeak-ng`"),
        (["--pairs", "3"], "--pairs 3 is too few: give 4 or more"),
        (["--seed", "-1"], "--seed -1 is negative"),
    ],
)
def test_what_cannot_be_made_is_said_in_a_sentence(args, message, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=message):
        main(["make-mini", "--out", str(tmp_path / "mini"), *args])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("low,loud", "loud is no voice of tones .* give some of low, high, deep"),
        ("low,", "an empty name is no voice"),
        ("low,low", "--voices low,low names a voice twice"),
    ],
)
def test_voices_that_are_not_there_are_named(names, message):
    with pytest.raises(InputError, match=message):
        voices.choose(Tones(), names)


def test_silence_from_a_synthesiser_is_refused():
    with pytest.raises(InputError, match="the synthesiser gave silence"):
        voices.tidy(np.zeros(RATE, np.float32))


# With the programs


@pytest.fixture(scope="module", params=SYNTHESISERS)
def spoken(request, tmp_path_factory):
    """A set that a program spoke: its folder and what was made."""
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed")
    folder = tmp_path_factory.mktemp(request.param) / "mini"
    first, second = list(SYNTHESISERS[request.param].VOICES)[:2]
    return folder, make(Options(str(folder), pairs=4, stories=2, synthesiser=request.param, voices=f"{first},{second}"))


def test_a_program_gives_the_layouts(spoken):
    folder, made = spoken
    check_layout(folder, made)
    assert made.version[0].isdigit()


@pytest.mark.integration
def test_a_program_gives_the_same_files_again(spoken, tmp_path):
    folder, made = spoken
    again = Options(str(tmp_path / "mini"), 4, 2, synthesiser=made.synthesiser, voices=",".join(made.voices))
    make(again)
    assert content(folder) == content(tmp_path / "mini")


def test_spoken_files_are_neither_silent_nor_clipped(spoken):
    for path in spoken[0].rglob("*.wav"):
        audio = read_audio(path, RATE)[0]
        assert 0.1 < np.abs(audio).max() < 0.95, path
        assert 0.02 < np.sqrt(np.mean(audio**2)) < 0.06, path


def test_right_and_wrong_take_equally_long_and_sound_different(spoken):
    folder, made = spoken
    for part in PARTS:
        right, wrong = made.seconds[part]
        assert abs(right - wrong) < 0.06 * right, part
    for part, least in zip(PARTS, (0.01, 0.002), strict=False):  # the s of a plural is a small part of a sentence
        _, table = rows(folder, part)
        sounds = [read_audio(folder / part / f"{row['filename']}.wav", RATE)[0] for row in table]
        for right, wrong in zip(sounds[::2], sounds[1::2], strict=True):
            assert len(right) == len(wrong)
            assert np.mean((right - wrong) ** 2) > least * np.mean(right**2)


def test_words_are_spoken_at_speed_with_silence_around(spoken):
    folder, _ = spoken
    for name in wavs(folder, "lexical/dev"):
        audio = read_audio(folder / "lexical/dev" / f"{name}.wav", RATE)[0]
        assert 0.4 < len(audio) / RATE < 2
        assert not audio[: MARGIN - 1].any()
        assert not audio[-MARGIN + 1 :].any()


# The shipped set


def test_the_shipped_set_is_what_its_seed_gives():
    """Fails when words or templates change: make the set again, as corpus/mini/README.md says."""
    made = schema.read(SHIPPED, MiniSet, MINI_FILE)
    check_layout(SHIPPED, made)
    count = made.pairs["lexical/dev"] // len(made.voices)
    _, lexical = rows(SHIPPED, "lexical/dev")
    drawn = [phones for pair in words.draw(made.seed, count) for phones in (pair.word.phones, pair.nonword)]
    first = [tuple(row["phones"].split()) for row in lexical if row["voice"] == made.voices[0]]
    assert first == drawn
    _, syntactic = rows(SHIPPED, "syntactic/dev")
    drawn = [text for pair in sentences.draw(made.seed, count) for text in (pair.right, pair.wrong)]
    assert [row["transcription"] for row in syntactic if row["voice"] == made.voices[0]] == drawn
    drawn = {story.id for story in stories.draw(made.seed, made.pairs["sSC"])}
    assert {name.split("_")[1] for name in wavs(SHIPPED, "sSC")} == drawn


def test_the_shipped_set_is_small_and_its_recordings_are_sound():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_500_000
    for path in SHIPPED.rglob("*.wav"):
        assert 0.1 < np.abs(read_audio(path, RATE)).max() < 0.95, path
