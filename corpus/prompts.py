"""Prompts of the corpus: reading packages, cleaning transcripts, sharing prompts out to files."""

from __future__ import annotations

import difflib
import gzip
import random
import re
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpus.align import HOP, RATE, voiced_frames

DIGITS = {
    "en": "zero one two three four five six seven eight nine",
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve",
    "fr": "zéro un deux trois quatre cinq six sept huit neuf",
    "it": "zero uno due tre quattro cinque sei sette otto nove",
    "ru": "ноль один два три четыре пять шесть семь восемь девять",
}
MISSPELLED = {
    "indentified": "identified",
    "represenatives": "representatives",
    "umute": "unmute",
    "witheld": "withheld",
}
MIN_SECONDS, MAX_SECONDS = 1.5, 20.0
MIN_WORDS = 4
LETTERS_PER_SECOND = (6.0, 26.0)  # outside this range the transcript is wrong
SIMILAR = 0.6  # share of equal words in order from which two prompts count as the same text
_MARGIN = (6, 10)  # frames of 10 ms kept before and after the speech of a prompt
_SKIP = re.compile(r"(silence|letters|phonetic|digits)/|beep|.*2tone$|tt-monkeys$")
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*'?(?:[.,!?](?!\.))?")


@dataclass(frozen=True)
class Prompt:
    """One recorded prompt: name in its package, words as spoken, float32 [samples] at 16 kHz trimmed to the speech."""

    name: str
    words: tuple[str, ...]
    audio: np.ndarray

    @property
    def seconds(self) -> float:
        """Length of the trimmed audio."""
        return len(self.audio) / RATE

    @property
    def text(self) -> list[str]:
        """The words without case and punctuation, for comparing prompts."""
        return [re.sub(r"[^\w']", "", word.lower()) for word in self.words]


def clean_words(text: str, language: str) -> tuple[str, ...]:
    """Returns a transcript's words with their punctuation, single digits spelled out; empty if it is not plain speech.

    Not plain: remarks in brackets, key names as signs (* #), numbers of several digits, abbreviations, addresses, two
    entries run together, characters lost in the package (Italian "pu?"), Latin letters in a Russian text.
    """
    text = text.replace("’", "'")
    if re.search(r"[^\w\s.,;:!?…'\"“”«»–-]|_|\d\w|[^\W\d]\d|\b[^\W\d_a-zа-яё]{2,}\b|www|\w-[\w-]+:", text):
        return ()
    if (language == "it" and "?" in text) or (language == "ru" and re.search("[A-Za-z]", text)):
        return ()
    spelled = DIGITS[language].split()
    text = re.sub(r"\d", lambda digit: spelled[int(digit.group())], text)
    text = re.sub("|".join(MISSPELLED), lambda word: MISSPELLED[word.group()], text)
    return tuple(_WORD.findall(text))


def trim(audio: np.ndarray) -> np.ndarray:
    """Returns the audio from just before its first to just after its last voiced frame."""
    voiced = np.flatnonzero(voiced_frames(audio))
    return audio[max(0, voiced[0] - _MARGIN[0]) * HOP : (voiced[-1] + 1 + _MARGIN[1]) * HOP]


def read_asterisk(root: Path, language: str) -> list[Prompt]:
    """Returns the usable prompts of one unpacked language: plain sentences whose length fits their text."""
    import G722

    packed = next(root.glob("usr/share/doc/*/core-sounds-*.txt.gz")).read_bytes()
    transcript = gzip.decompress(packed).decode("utf-8-sig")
    texts = dict(line.split(":", 1) for line in transcript.splitlines() if ":" in line and not line.startswith(";"))
    folder = next(path for path in (root / "usr/share/asterisk/sounds").iterdir() if path.is_dir())
    prompts = []
    for path in sorted(folder.rglob("*.g722")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        words = clean_words(texts.get(name, "").strip(), language)
        if len(words) < MIN_WORDS or _SKIP.match(name):
            continue
        samples = np.asarray(G722.G722(RATE, 64000).decode(path.read_bytes()))
        prompt = Prompt(name, words, trim(samples.astype(np.float32) / 32768))
        rate = sum(map(len, prompt.text)) / (voiced_frames(prompt.audio).sum() * HOP / RATE)
        low, high = LETTERS_PER_SECOND
        if MIN_SECONDS <= prompt.seconds <= MAX_SECONDS and low <= rate <= high:
            prompts.append(prompt)
    return prompts


def read_librivox(root: Path) -> list[Prompt]:
    """Returns the five sentences of pocketsphinx's test data in reading order."""
    folder = next(root.glob("usr/share/pocketsphinx/test/data/librivox"))
    prompts = []
    for line in sorted((folder / "transcription").read_text().splitlines(), key=lambda line: line.split()[-1]):
        text, name = re.fullmatch(r"<s> (.*) </s> \((.*)\)", line).groups()
        with wave.open(str(folder / f"{name}.wav")) as sound:
            assert (sound.getframerate(), sound.getnchannels()) == (RATE, 1)
            samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
        prompts.append(Prompt(name, tuple(text.split()), trim(samples.astype(np.float32) / 32768)))
    return prompts


def drop_similar(prompts: list[Prompt]) -> list[Prompt]:
    """Returns the prompts, longest first, without those that nearly repeat the words of a longer one."""
    longest: list[Prompt] = []
    for prompt in sorted(prompts, key=lambda p: (-p.seconds, p.name)):
        if not any(alike(prompt.text, other.text) for other in longest):
            longest.append(prompt)
    return longest


def alike(words: list[str], others: list[str]) -> bool:
    """Returns whether two texts share so many words in order that one must not be held out from the other."""
    matcher = difflib.SequenceMatcher(None, words, others, autojunk=False)
    return matcher.real_quick_ratio() >= SIMILAR and matcher.ratio() >= SIMILAR


def share_out(
    prompts: list[Prompt], seconds: float, heldout_seconds: float, train_files: int, gap: float, seed: int
) -> tuple[list[Prompt], list[list[Prompt]]]:
    """Returns (prompts held out, prompts of each training file), drawn from the longest prompts up to `seconds`.

    Lengths count `gap` seconds after each prompt. Training prompts go to the file that is shortest so far.
    """
    chosen, total = [], 0.0
    for prompt in prompts:
        if total >= seconds:
            break
        chosen.append(prompt)
        total += prompt.seconds + gap
    if total < seconds:
        raise SystemExit(f"only {total:.0f} s of usable prompts, {seconds:.0f} s wanted")
    random.Random(seed).shuffle(chosen)
    heldout, length = [], 0.0
    while length < heldout_seconds:
        heldout.append(chosen.pop())
        length += heldout[-1].seconds + gap
    files: list[list[Prompt]] = [[] for _ in range(train_files)]
    lengths = [0.0] * train_files
    for prompt in chosen:
        shortest = lengths.index(min(lengths))
        files[shortest].append(prompt)
        lengths[shortest] += prompt.seconds + gap
    return heldout, files
