"""`python -m eval make-mini`: small benchmarks of synthetic speech, in the official layouts. Imports no jax.

FOLDER/mini.json                        how it was made, numbers of pairs, mean lengths
FOLDER/NOTICE, sources.csv              licences; which excerpts the pairs of speakers were made of
FOLDER/lexical/dev/*.wav, gold.csv      words and non-words, as ZeroSpeech 2021's sWUGGY
FOLDER/syntactic/dev/*.wav, gold.csv    sentences, as its sBLIMP
FOLDER/sSC/, tSC/                       N_UUID_correct.wav, N_UUID_incorrect.wav: stories, as Spoken StoryCloze
FOLDER/salmon_benchmark/PART/           sample_N_0.wav (consistent), sample_N_1.wav: as SALMon
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from eval.benchmarks.layouts import MINI_FILE
from eval.mini import consistency, sentences, stories, words
from eval.mini.voices import RATE, Synthesiser, choose, find, same_length
from eval.results import schema
from ttt_jax.errors import InputError
from ttt_jax.utils.files import new_folder, write_atomically
from ttt_jax.utils.paths import local

NAME = "mini"
LEAST = 4
"""Pairs that are needed, so that no speaker has more than half of them."""

_NOTICE = """These recordings are a mini benchmark: small, for trying things, never to be named as the official one.

lexical, syntactic, sSC, tSC, salmon_benchmark/gender_consistency: synthetic speech of {synthesiser} {version}; words,
sentences and stories are of the project ttt_jax, under its licence (Apache-2.0).

salmon_benchmark/speaker_consistency: excerpts of real recordings, two of them joined in each file; sources.csv names
them. Changes made: cut to {seconds:g} s, faded at both ends, set to one level, joined with silence between them.
  en_us, es_mx   recorded by Allison Smith (http://www.theivrvoice.com), CC-BY-SA-3.0
  fr_ca          recorded by June Wallack (http://www.junewallack.com), CC-BY-SA-3.0
  it_it          recorded by Carlo Flora (http://www.carloflora.com), CC-BY-3.0
  ru_ru          provided by Maxim Topal (http://www.ivrvoice.ru), CC-BY-3.0
  en_librivox    recorded by a LibriVox volunteer, public domain
The joined files stand under CC-BY-SA-3.0 (https://creativecommons.org/licenses/by-sa/3.0/), which all of these allow
(CC-BY-3.0: https://creativecommons.org/licenses/by/3.0/). Full notices and legal texts: corpus/voices of ttt_jax.
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Make small benchmarks that need nothing from outside, for `swuggy`, `sblimp`, `storycloze`, `salmon`, `suite`.

    Needs flite or espeak-ng. See docs/evaluation/mini.md.
    """

    out: str
    """Folder for the benchmarks; new or empty."""
    pairs: int = 40
    """Words, sentences, and pairs of each part of SALMon; words and sentences in every voice.
    At least 4."""
    stories: int = 24
    """Stories, in the first voice."""
    seed: int = 0
    """Seed of all random draws."""
    synthesiser: Literal["flite", "espeak-ng"] | None = None
    """Program that speaks; unset: the first that is installed."""
    voices: str | None = None
    """Voices of the program, joined by commas; unset: four."""
    compact: bool = False
    """Write wav files of 4 bits a sample (IMA ADPCM), a quarter of the size."""

    def __post_init__(self) -> None:
        if self.pairs < LEAST:
            raise InputError(f"--pairs {self.pairs} is too few: give {LEAST} or more.")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed} is negative: give 0 or more.")


@dataclasses.dataclass(frozen=True)
class MiniSet:
    """The content of mini.json."""

    COMMAND: ClassVar[str] = "python -m eval make-mini"
    FORMAT: ClassVar[int] = 1

    name: str
    """Always mini: results are labelled by it."""
    seed: int
    synthesiser: str
    version: str
    voices: tuple[str, ...]
    rate: int
    """Samples a second."""
    encoding: str
    """libsndfile's name: PCM_16 or IMA_ADPCM."""
    pairs: dict[str, int]
    """By part; those of words and sentences in all voices."""
    seconds: dict[str, tuple[float, float]]
    """Mean length of right and wrong recordings, by part; without the silence that makes a pair equally long."""


def main(options: Options) -> int:
    """Makes the benchmarks; returns the exit code. Raises `InputError`, and then leaves nothing behind."""
    made = make(options)
    print(f"{made.synthesiser} {made.version}, voices {', '.join(made.voices)}, seed {made.seed}: {options.out}")
    for part, count in made.pairs.items():
        right, wrong = made.seconds[part]
        print(f"mini {part}: {count} pairs, {right:.2f} s right and {wrong:.2f} s wrong on average")
    if "salmon_benchmark/gender_consistency" not in made.pairs:
        print("no gender_consistency: the voices are of one gender")
    print("These are mini benchmarks: their scores say nothing about the official ones.")
    return 0


def make(options: Options) -> MiniSet:
    """Writes all of the benchmarks or nothing; returns the content of mini.json. Raises `InputError`."""
    synthesiser = find(options.synthesiser)
    voices = choose(synthesiser, options.voices)
    chosen_words = words.draw(options.seed, options.pairs)
    chosen_sentences = sentences.draw(options.seed, options.pairs)
    chosen_stories = stories.draw(options.seed, options.stories)
    with new_folder(local(options.out)) as folder:
        write = _Writer(folder, "IMA_ADPCM" if options.compact else "PCM_16")
        lexical(write, synthesiser, voices, chosen_words, options.seed)
        syntactic(write, synthesiser, voices, chosen_sentences, options.seed)
        storycloze(write, synthesiser, voices[0], chosen_stories)
        speakers(write, options.seed, options.pairs)
        for i, (right, wrong) in enumerate(consistency.gender_pairs(synthesiser, voices, chosen_sentences)):
            write.pair("salmon_benchmark/gender_consistency", f"sample_{i}_0", f"sample_{i}_1", right, wrong)
        version = synthesiser.version()
        notice = _NOTICE.format(synthesiser=synthesiser.NAME, version=version, seconds=consistency.SECONDS)
        write_atomically(folder / "NOTICE", notice.encode())
        means = {part: tuple(np.round(np.mean(seconds, 0), 3).tolist()) for part, seconds in write.seconds.items()}
        pairs = {part: len(seconds) for part, seconds in write.seconds.items()}
        about = (NAME, options.seed, synthesiser.NAME, version, tuple(voices), RATE, write.encoding, pairs, means)
        made = MiniSet(*about)
        schema.write(folder, made, {}, MINI_FILE)
    return made


class _Writer:
    """Writes recordings and tables, and keeps the lengths of pairs, in seconds, by part."""

    def __init__(self, folder: Path, encoding: str):
        self._folder = folder
        self.encoding = encoding
        self.seconds: dict[str, list[tuple[float, float]]] = {}

    def pair(self, part: str, right: str, wrong: str, *audio: np.ndarray, even: bool = False) -> None:
        """Writes a right and a wrong recording, float32 [samples], to PART; `even` makes them equally long."""
        self.seconds.setdefault(part, []).append(tuple(len(samples) / RATE for samples in audio))
        for name, samples in zip((right, wrong), same_length(*audio) if even else audio, strict=True):
            self._wav(self._folder / part / f"{name}.wav", samples)

    def _wav(self, path: Path, audio: np.ndarray) -> None:
        import soundfile

        path.parent.mkdir(parents=True, exist_ok=True)
        samples = np.round(audio * 32767).astype(np.int16)
        soundfile.write(path, samples, RATE, subtype=self.encoding, format="WAV")

    def table(self, path: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes a csv file."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        write_atomically(self._folder / path, text.getvalue().encode())


def _opaque(*key: object) -> str:
    """Returns a name that tells nothing, as those of the official files, the same for the same key."""
    return hashlib.sha256("/".join(map(str, key)).encode()).hexdigest()[:20]


def lexical(
    write: _Writer, synthesiser: Synthesiser, voices: Sequence[str], pairs: Sequence[words.WordPair], seed: int
) -> None:
    """Writes words and non-words: both spoken from phones, and both of a pair equally long."""
    rows = []
    for id, (word, nonword) in enumerate(pairs):
        for voice in voices:
            names = [_opaque("lexical", seed, voice, id, correct) for correct in (1, 0)]
            audio = [synthesiser.say(phones, voice) for phones in (word.phones, nonword)]
            write.pair("lexical/dev", *names, *audio, even=True)
            length = len(word.phones)
            rows.append((names[0], id, voice, word.frequency, word.text, " ".join(word.phones), length, 1))
            rows.append((names[1], id, voice, "", "", " ".join(nonword), length, 0))
    columns = ("filename", "id", "voice", "frequency", "word", "phones", "length", "correct")
    write.table("lexical/dev/gold.csv", columns, rows)


def syntactic(
    write: _Writer, synthesiser: Synthesiser, voices: Sequence[str], pairs: Sequence[sentences.SentencePair], seed: int
) -> None:
    """Writes grammatical and ungrammatical sentences, both of a pair equally long."""
    rows = []
    for pair in pairs:
        for voice in voices:
            key = (pair.type, pair.subtype, pair.id)
            names = [_opaque("syntactic", seed, voice, *key, correct) for correct in (1, 0)]
            audio = [synthesiser.say(text, voice) for text in (pair.right, pair.wrong)]
            write.pair("syntactic/dev", *names, *audio, even=True)
            for name, text, correct in zip(names, (pair.right, pair.wrong), (1, 0), strict=True):
                rows.append((name, pair.id, voice, pair.type, pair.subtype, text, correct))
    columns = ("filename", "id", "voice", "type", "subtype", "transcription", "correct")
    write.table("syntactic/dev/gold.csv", columns, rows)


def storycloze(write: _Writer, synthesiser: Synthesiser, voice: str, chosen: Sequence[stories.Story]) -> None:
    """Writes stories; the start and the ending are spoken apart, so that the start of both of a pair is the same."""
    for n, story in enumerate(chosen):
        start = synthesiser.say(story.start, voice)
        right, wrong, topic = (synthesiser.say(text, voice) for text in (story.right, story.wrong, story.topic))
        names = f"{n}_{story.id}_correct", f"{n}_{story.id}_incorrect"
        for part, ending in (("sSC", wrong), ("tSC", topic)):
            whole = (np.concatenate([start, end]) for end in (right, ending))
            write.pair(part, *names, *whole)


def speakers(write: _Writer, seed: int, count: int) -> None:
    """Writes pairs of real speakers, and sources.csv."""
    rows = []
    for i, (pair, right, wrong) in enumerate(consistency.speaker_pairs(seed, count)):
        write.pair("salmon_benchmark/speaker_consistency", f"sample_{i}_0", f"sample_{i}_1", right, wrong)
        rows.append((i, *(value for part in pair for value in (part.speaker, part.path, part.start))))
    columns = [f"{part}_{value}" for part in ("first", "same", "other") for value in ("speaker", "path", "seconds")]
    write.table("sources.csv", ("sample", *columns), rows)
