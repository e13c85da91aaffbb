"""The embedded corpus is as its README describes it, and the steps of its build work."""

import json
import re

import numpy as np
import pytest

from corpus import fit_codec
from corpus.align import HOP, spread, voiced_frames
from corpus.prompts import Prompt, alike, clean_words, drop_similar, share_out, trim
from tests.helpers.manifests import write_entry
from tests.helpers.places import CORPUS
from tests.helpers.recordings import RATE, babble
from ttt_jax.codec import DEFAULT_FILE, load_codec
from ttt_jax.data.alignments import read_alignments
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.data.manifest import check_duration, read_manifest
from ttt_jax.data.text import load_tokenizer, text_stream

READER = "en_librivox"  # one short file, held out


def entries(split):
    return read_manifest(CORPUS / f"{split}.jsonl").entries


def by_voice(split):
    voices = {}
    for entry in entries(split):
        voices.setdefault(entry.path.parent.name, []).append(entry)
    return voices


def prompts_of(split):
    """(voice, prompt name, its words) of every prompt in a split."""
    for entry in entries(split):
        content = json.loads(entry.alignment.read_text(encoding="utf-8"))
        for prompt in content["prompts"]:
            end = prompt["start"] + prompt["seconds"] + 0.02
            words = [row[0] for row in content["alignments"] if prompt["start"] - 0.02 <= row[1][0] < end]
            yield entry.path.parent.name, prompt["name"], [word.lower().strip(".,!?") for word in words]


@pytest.fixture(scope="module")
def recordings():
    """Every recording at its own rate, float32 [2, samples], with its entry."""
    return [(entry, read_audio(entry.path, RATE)) for split in ("train", "heldout") for entry in entries(split)]


def test_each_voice_has_five_to_six_minutes_in_files_of_one_to_three():
    train, heldout = by_voice("train"), by_voice("heldout")
    assert len(train) == 5
    assert set(heldout) == {*train, READER}
    for voice in train:
        files = train[voice] + heldout[voice]
        assert 300 <= sum(entry.duration for entry in files) <= 360
        assert all(60 <= entry.duration <= 180 for entry in files)


def test_the_readme_states_the_length_of_the_recordings():
    minutes = {split: sum(entry.duration for entry in entries(split)) / 60 for split in ("train", "heldout")}
    readme = " ".join((CORPUS / "README.md").read_text(encoding="utf-8").split())
    parts = f"({minutes['train']:.1f} for training, {minutes['heldout']:.1f} held out)"
    assert f"{sum(minutes.values()):.0f} minutes in all {parts}" in readme


def test_the_audio_fits_in_eight_megabytes():
    files = list((CORPUS / "voices").rglob("*.ogg"))
    assert sum(file.stat().st_size for file in files) <= 8e6
    assert {entry.path for split in ("train", "heldout") for entry in entries(split)} == set(files)


def test_every_voice_states_licence_author_source_and_changes():
    for voice in by_voice("heldout"):
        notice = (CORPUS / "voices" / voice / "NOTICE").read_text(encoding="utf-8")
        assert all(part in notice for part in ("Author: ", "Terms: ", "Source packages:", "Changes made: ")), voice
        license_text = (CORPUS / "voices" / voice / "LICENSE").read_text(encoding="utf-8")
        assert len(license_text.splitlines()) > (20 if voice == READER else 250), voice
        assert license_text.startswith(notice.split("Terms: ")[1].split(" (")[0]) or voice == READER
    assert "CC-BY-SA-3.0" in (CORPUS / "tokenizer" / "NOTICE").read_text()
    packages = json.loads((CORPUS / "sources.json").read_text())["packages"]
    assert len(packages) == 11
    assert all(len(bytes.fromhex(source["sha256"])) == 32 and source["version"] for source in packages.values())


@pytest.mark.slow
def test_left_speaks_and_right_is_silent(recordings):
    for entry, audio in recordings:
        left, right = audio
        check_duration(entry, audio.shape[1] / RATE)
        assert 0.03 < np.sqrt(np.mean(left**2)) < 0.25, entry.path
        assert np.abs(left).max() < 1, entry.path
        assert np.sqrt(np.mean(right**2)) < 1e-5, entry.path
        assert np.abs(right).max() < 2e-3, entry.path


@pytest.mark.slow
def test_words_lie_on_the_speech(recordings):
    for entry, audio in recordings:
        voiced = voiced_frames(audio[0])
        spoken = np.zeros(len(voiced), bool)
        for word in read_alignments(entry.alignment, entry.duration).words:
            spoken[round(word.start * 100) : round(word.end * 100)] = True
        agreement = {shift: np.mean(np.roll(spoken, shift) == voiced) for shift in (-30, 0, 30)}
        assert agreement[0] > 0.85, entry.path
        assert agreement[0] > 0.03 + max(agreement[-30], agreement[30]), entry.path


def test_alignments_say_how_they_were_made():
    for split in ("train", "heldout"):
        for entry in entries(split):
            method = json.loads(entry.alignment.read_text(encoding="utf-8"))["alignment_method"]
            assert method == ("pocketsphinx" if entry.path.parent.name.startswith("en_") else "spread")


def test_no_held_out_prompt_has_a_twin_in_training():
    train = list(prompts_of("train"))
    assert len(train) > 100
    for voice, name, words in prompts_of("heldout"):
        assert len(words) >= 4, name
        twins = [other for place, other, text in train if place == voice and (other == name or alike(words, text))]
        assert not twins, (voice, name, twins)


def test_the_tokenizer_covers_every_word_and_leaves_the_special_ids_free():
    tokenizer = load_tokenizer(CORPUS / "tokenizer" / "spm512.model")
    assert tokenizer.cardinality == 512
    words = {word for split in ("train", "heldout") for _, _, text in prompts_of(split) for word in text}
    words |= {"Zürich", "ça", "ящик", "1234", "d'été"}
    for word in words:
        assert tokenizer.decode(tokenizer.encode(word)) == word.lower()
        assert min(tokenizer.encode(word)) > 3


def test_most_tokens_find_room_in_the_text_row():
    tokenizer = load_tokenizer(CORPUS / "tokenizer" / "spm512.model")
    for entry in entries("train"):
        words = read_alignments(entry.alignment, entry.duration).words
        tokens = [tokenizer.encode(word.text) for word in words]
        row = text_stream(words, tokens, int(entry.duration * 12.5), 12.5)
        wanted = sum(map(len, tokens))
        assert (row > 3).sum() > 0.95 * wanted, entry.path


@pytest.fixture
def other_manifest(tmp_path):
    """Fifteen seconds of noise, as another's recordings."""
    return write_entry(tmp_path, babble(15.0))


ABOUT = {"--name": "mine-8x64", "--licence": "CC0-1.0", "--fitted-to": "noise"}


@pytest.mark.slow
def test_a_codec_of_other_recordings_has_the_given_metadata(other_manifest, tmp_path):
    out = tmp_path / "new" / "mine.safetensors"
    options = [part for pair in ABOUT.items() for part in pair]
    fit_codec.main(["--manifest", str(other_manifest), "--out", str(out), *options])
    codec = load_codec(out)
    assert (codec.name, codec.metadata["licence"], codec.metadata["fitted_to"]) == tuple(ABOUT.values())


@pytest.mark.parametrize("missing", ["--out", *ABOUT])
def test_a_codec_of_other_recordings_never_claims_the_embedded_corpus(other_manifest, tmp_path, capsys, missing):
    before = DEFAULT_FILE.read_bytes()
    options = {**ABOUT, "--out": str(tmp_path / "mine.safetensors")}
    del options[missing]
    with pytest.raises(SystemExit) as stop:
        fit_codec.main(["--manifest", str(other_manifest), *[part for pair in options.items() for part in pair]])
    assert stop.value.code == 2
    assert re.search(rf"m\.jsonl is not the embedded corpus.*give {missing}\.", capsys.readouterr().err)
    assert DEFAULT_FILE.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"a.wav", "m.jsonl"}


def speech(*spans, seconds=4.0):
    """Noise inside the spans (in seconds), nothing elsewhere: float32 [samples]."""
    audio = np.zeros(int(seconds * RATE), np.float32)
    for start, end in spans:
        part = slice(int(start * RATE), int(end * RATE))
        audio[part] = np.random.default_rng(0).normal(0, 0.1, audio[part].shape)
    return audio


def test_voiced_frames_are_those_with_energy_and_trimming_keeps_them():
    voiced = voiced_frames(speech((1.0, 1.5), (1.55, 2.0), (3.0, 3.5)))
    expected = np.zeros(400, bool)
    expected[100:200] = expected[300:350] = True  # the gap of 50 ms is bridged
    assert (voiced != expected).sum() <= 8
    assert len(trim(speech((1.0, 2.0)))) == pytest.approx(1.16 * RATE, abs=4 * HOP)  # with its margin


def test_spread_words_share_the_voiced_part_by_their_letters():
    voiced = np.zeros(300, bool)
    voiced[50:100] = voiced[200:250] = True
    timed = spread(["aa", "bbb,", "ccccc"], voiced)
    expected = [("aa", 0.5, 0.7), ("bbb,", 0.7, 1.0), ("ccccc", 2.0, 2.5)]
    assert [(word.text, word.start, word.end) for word in timed] == expected


@pytest.mark.parametrize(
    ("text", "language", "words"),
    [
        ("Press 1 to “stop”...", "en", "Press one to stop"),
        ("Appuyez sur 4 ou 6, s'il vous plaît!", "fr", "Appuyez sur quatre ou six, s'il vous plaît!"),
        ("Нажмите «решётку» - или 7.", "ru", "Нажмите решётку или семь."),
        *((text, "en", "") for text in ("Press * now", "dial 1234 now", "[sound of monkeys]", "connect to the PBX")),
        ("La chiamata non pu? essere", "it", ""),
        ("это Asterisk", "ru", ""),
    ],
)
def test_only_plain_speech_is_taken(text, language, words):
    assert clean_words(text, language) == tuple(words.split())


def test_similar_prompts_leave_only_the_longest():
    def prompt(name, text, seconds):
        return Prompt(name, tuple(text.split()), np.zeros(int(seconds * RATE), np.float32))

    first = prompt("a", "please press one to hear the message", 2)
    longer = prompt("b", "Please press two to hear the message.", 3)
    other = prompt("c", "your call cannot be completed", 1)
    assert drop_similar([first, other, longer]) == [longer, other]


def test_files_share_the_prompts_without_overlap():
    prompts = [Prompt(str(i), ("w",), np.zeros(RATE * (3 + i % 5), np.float32)) for i in range(80)]
    heldout, files = share_out(prompts, 300.0, 60.0, 4, 0.3, seed=1)
    names = [prompt.name for group in (heldout, *files) for prompt in group]
    assert len(names) == len(set(names))
    lengths = [sum(prompt.seconds + 0.3 for prompt in file) for file in files]
    assert max(lengths) - min(lengths) < 10
    assert sum(lengths) + sum(prompt.seconds + 0.3 for prompt in heldout) == pytest.approx(304, abs=4.5)
    assert share_out(prompts, 300.0, 60.0, 4, 0.3, seed=1) == (heldout, files)
