"""Words and non-words of the mini benchmark: one phone of a word exchanged, within English phonotactics."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ttt_jax.errors import InputError

Phones = tuple[str, ...]
"""ARPAbet; vowels end in a digit: 1 main stress, 2 second stress, 0 none."""

_HERE = Path(__file__).parent
_KINDS = {
    "stop": "P B T D K G CH JH",
    "fricative": "F V TH DH S Z SH ZH HH",
    "nasal": "M N NG",
    "approximant": "L R W Y",
    "vowel": "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW",
}
KIND = {phone: kind for kind, phones in _KINDS.items() for phone in phones.split()}
"""Class of each phone. A phone is exchanged for one of its class, so length and syllables stay."""
_ALIKE = [
    *[{"P", "B"}, {"T", "D"}, {"K", "G"}, {"CH", "JH"}, {"F", "V"}, {"TH", "DH"}, {"S", "Z"}, {"SH", "ZH"}],
    *[{"F", "TH"}, {"M", "N"}, {"M", "NG"}, {"N", "NG"}, {"AA", "AO"}, {"AE", "EH"}, {"EH", "IH"}],
]
"""Phones that synthesisers hardly keep apart: never exchanged for each other."""
_NEAREST = 3
"""Candidates to choose from by chance: those whose phones are most nearly as common as the word's."""


class Word(NamedTuple):
    """A line of words.txt."""

    text: str
    frequency: int
    """One number for each official band, ours and coarse: 300, 50, 10, 3, or 0 for out of vocabulary."""
    phones: Phones


class WordPair(NamedTuple):
    """A word and its non-word."""

    word: Word
    nonword: Phones


def read_words() -> list[Word]:
    """Returns the words of words.txt."""
    lines = [line.split() for line in (_HERE / "words.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    return [Word(text, int(frequency), tuple(phones)) for text, frequency, *phones in lines]


def read_avoided() -> frozenset[Phones]:
    """Returns phones without stress of real words that the exchange of a phone would give (avoid.txt)."""
    lines = (_HERE / "avoid.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(tuple(line.split()[1:]) for line in lines if line[0] != "#")


def bare(phones: Phones) -> Phones:
    """Returns phones without stress."""
    return tuple(phone.rstrip("012") for phone in phones)


def bigrams(phones: Phones) -> Iterator[tuple[str, str]]:
    """Yields neighbours, without stress; "#" stands before the first phone and behind the last."""
    marked = ("#", *bare(phones), "#")
    return zip(marked, marked[1:], strict=False)


def classes(phones: Phones) -> Iterator[tuple[str, ...]]:
    """Yields the classes of three neighbours; "#" as in `bigrams`."""
    marked = ("#", *(KIND[phone] for phone in bare(phones)), "#")
    return zip(marked, marked[1:], marked[2:], strict=False)


class Phonotactics:
    """How often neighbours occur in a list of words."""

    def __init__(self, words: list[Word]):
        self._bigrams = Counter(pair for word in words for pair in bigrams(word.phones))
        self._classes = Counter(three for word in words for three in classes(word.phones))

    def allows(self, phones: Phones, without: Phones) -> bool:
        """Whether all neighbours occur in the words; those that `without` lacks, thus in others."""
        return all(pair in self._bigrams for pair in bigrams(phones)) and all(
            three in self._classes for three in classes(phones)
        )

    def commonness(self, phones: Phones, without: Phones) -> float:
        """Returns the mean log(1 + occurrences) of the neighbours in the words other than `without`."""
        own = Counter(bigrams(without))
        logs = [math.log1p(self._bigrams[pair] - own[pair]) for pair in bigrams(phones)]
        return sum(logs) / len(logs)


def candidates(word: Word, table: Phonotactics, real: frozenset[Phones]) -> list[Phones]:
    """Returns non-words: one stressed vowel or consonant exchanged, phonotactics allowed, not among `real`."""
    found = []
    for at, phone in enumerate(word.phones):
        stress = phone.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        if stress == "0":  # unstressed vowels are too much alike
            continue
        old = bare((phone,))[0]
        if KIND[old] == "stop" and not _is_clear(bare(word.phones), at):
            continue
        for new, kind in KIND.items():
            if kind != KIND[old] or new == old or {new, old} in _ALIKE:
                continue
            nonword = (*word.phones[:at], new + stress, *word.phones[at + 1 :])
            if bare(nonword) not in real and table.allows(nonword, word.phones):
                found.append(nonword)
    return found


def _is_clear(phones: Phones, at: int) -> bool:
    """Whether a stop is well heard: before a vowel or an approximant, and not behind S."""
    return KIND.get("".join(phones[at + 1 : at + 2])) in ("vowel", "approximant") and phones[at - 1 : at] != ("S",)


def draw(seed: int, count: int) -> list[WordPair]:
    """Returns `count` pairs, the frequency bands in turn; no word and no non-word comes twice.

    Raises `InputError` if there are fewer words.
    """
    words, rng = read_words(), random.Random(f"{seed} words")
    if count > len(words):
        raise InputError(f"--pairs {count} is more than the {len(words)} words there are: give {len(words)} or fewer.")
    table, real = Phonotactics(words), read_avoided() | {bare(word.phones) for word in words}
    bands: dict[int, list[Word]] = {}
    for word in rng.sample(words, len(words)):
        bands.setdefault(word.frequency, []).append(word)
    ordered = sorted((turn, frequency, word) for frequency, band in bands.items() for turn, word in enumerate(band))
    pairs, taken = [], set()
    for _, _, word in ordered[:count]:
        own = table.commonness(word.phones, word.phones)
        choice = [phones for phones in candidates(word, table, real) if bare(phones) not in taken]
        choice.sort(key=lambda phones: abs(table.commonness(phones, word.phones) - own))
        pairs.append(WordPair(word, rng.choice(choice[:_NEAREST])))
        taken.add(bare(pairs[-1].nonword))
    return pairs
