"""Grammatical and ungrammatical sentences of the mini benchmark, from templates of our own."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from ttt_jax.errors import InputError

_TRIES = 200
"""Draws in a row of sentences that were there before, after which a template counts as used up."""


class SentencePair(NamedTuple):
    """Two sentences with equally many words."""

    type: str
    subtype: str
    id: int
    """From 0, in its subtype."""
    right: str
    wrong: str


# Singular and plural.
_PEOPLE = [
    *[("teacher", "teachers"), ("doctor", "doctors"), ("farmer", "farmers"), ("singer", "singers")],
    *[("neighbor", "neighbors"), ("driver", "drivers"), ("painter", "painters"), ("student", "students")],
]
_THINGS = [
    *[("letter", "letters"), ("window", "windows"), ("basket", "baskets"), ("picture", "pictures")],
    *[("table", "tables"), ("blanket", "blankets"), ("bottle", "bottles"), ("mirror", "mirrors")],
]
_PLACES = ["near the river", "behind the school", "from the village", "at the corner", "in the kitchen"]
_ADJECTIVES = ["old", "small", "heavy", "clean", "broken", "green"]
_DOES = [("sleeps", "sleep"), ("laughs", "laugh"), ("waits", "wait"), ("works", "work"), ("sings", "sing")]
_HAS_DONE = ["slept", "laughed", "waited", "complained", "travelled", "danced"]
_HURT = ["saw", "hurt", "blamed", "washed", "praised", "warned"]
_WOMEN = ["Anna", "Mary", "Susan", "Linda", "Emma"]
_MEN = ["Peter", "David", "Robert", "Daniel", "Henry"]
_LIKES = [("likes", "like"), ("knows", "know"), ("visits", "visit"), ("trusts", "trust")]
# Past and participle that differ.
_IRREGULAR = [
    *[("broke", "broken", "cup"), ("wrote", "written", "letter"), ("drove", "driven", "car")],
    *[("ate", "eaten", "apple"), ("took", "taken", "map"), ("drew", "drawn", "horse"), ("chose", "chosen", "song")],
    *[("stole", "stolen", "bicycle"), ("wore", "worn", "coat"), ("threw", "thrown", "ball")],
]

_TRANSITIVE = ["found", "bought", "took", "wore", "repaired", "carried", "borrowed", "needed"]
"""Verbs that need an object."""
_OBJECTS = ["ring", "coat", "clock", "ladder", "box", "watch", "boots", "umbrella"]


def _either(plural: bool, pair: tuple[str, str]) -> tuple[str, str]:
    """Returns the form that agrees with the number, then the other."""
    return (pair[1], pair[0]) if plural else pair


def _capital(text: str) -> str:
    return text[0].upper() + text[1:] + "."


Texts = tuple[str, str]
"""Grammatical and ungrammatical. Templates get random draws and a flag that turns what is right by half."""


def _agreement_simple(rng: random.Random, turned: bool) -> Texts:
    noun = rng.choice(_PEOPLE)[turned]
    right, wrong = _either(turned, rng.choice(_DOES))
    when = rng.choice(["every day", "in the morning", "after dinner", "all night"])
    return f"the {noun} {right} {when}", f"the {noun} {wrong} {when}"


def _agreement_attractor(rng: random.Random, turned: bool) -> Texts:
    noun, attractor = rng.choice(_THINGS)[turned], rng.choice(_PEOPLE)[not turned]
    right, wrong = _either(turned, ("is", "are"))
    rest = rng.choice(_ADJECTIVES)
    return f"the {noun} of the {attractor} {right} {rest}", f"the {noun} of the {attractor} {wrong} {rest}"


def _relative(rng: random.Random, plural: bool, first: str, second: str) -> str:
    """Returns a noun with a relative clause whose noun has the other number."""
    noun, other = rng.sample(_PEOPLE, 2)
    return f"{first} {noun[plural]} that {second} {other[not plural]} {rng.choice(_LIKES)[not plural]}"


def _agreement_relative(rng: random.Random, turned: bool) -> Texts:
    start = _relative(rng, turned, "the", "the")
    right, wrong = _either(turned, rng.choice(_DOES))
    return f"{start} {right}", f"{start} {wrong}"


def _anaphor_gender(rng: random.Random, turned: bool) -> Texts:
    right, wrong = _either(turned, ("herself", "himself"))
    start = f"{rng.choice(_MEN if turned else _WOMEN)} {rng.choice(_HURT)}"
    return f"{start} {right}", f"{start} {wrong}"


def _anaphor_number(rng: random.Random, turned: bool) -> Texts:
    noun = rng.choice([("boy", "boys"), ("man", "men"), ("king", "kings"), ("uncle", "uncles")])[turned]
    right, wrong = _either(turned, ("himself", "themselves"))
    start = f"the {noun} {rng.choice(_PLACES)} {rng.choice(_HURT)}"
    return f"{start} {right}", f"{start} {wrong}"


def _determiner(rng: random.Random, turned: bool, adjective: str) -> Texts:
    determiner = rng.choice([("this", "these"), ("that", "those")])[turned]
    right, wrong = _either(turned, rng.choice(_THINGS))
    start = f"{rng.choice(_WOMEN + _MEN)} {rng.choice(['found', 'sold', 'liked', 'painted'])} {determiner}{adjective}"
    return f"{start} {right}", f"{start} {wrong}"


def _determiner_noun(rng: random.Random, turned: bool) -> Texts:
    return _determiner(rng, turned, "")


def _determiner_adjective(rng: random.Random, turned: bool) -> Texts:
    return _determiner(rng, turned, f" {rng.choice(_ADJECTIVES)}")


def _npi_determiner(rng: random.Random, turned: bool) -> Texts:
    noun, place = rng.choice(_PEOPLE)[turned], rng.choice(_PLACES)
    rest = f"{noun} {place} {'have' if turned else 'has'} ever {rng.choice(_HAS_DONE)}"
    return f"no {rest}", f"the {rest}"


def _npi_scope(rng: random.Random, turned: bool) -> Texts:
    start = _relative(rng, turned, "{}", "{}")
    text = f"{start} {'have' if turned else 'has'} ever {rng.choice(_HAS_DONE)}"
    return text.format("no", "the"), text.format("the", "no")


def _irregular(rng: random.Random, turned: bool) -> Texts:
    """The past alone, or, turned, the participle behind "has"."""
    past, participle, thing = rng.choice(_IRREGULAR)
    right, wrong = _either(turned, (past, participle))
    start, end = f"the {rng.choice(_PEOPLE)[0]}", f"the {thing}"
    if turned:
        start = f"{start} has"
    return f"{start} {right} {end}", f"{start} {wrong} {end}"


def _irregular_plural(rng: random.Random, turned: bool) -> Texts:
    plural, wrong, does = rng.choice(
        [
            *[("children", "childs", "played"), ("men", "mans", "talked"), ("women", "womans", "laughed")],
            *[("mice", "mouses", "squeaked"), ("geese", "gooses", "slept"), ("teeth", "tooths", "ached")],
            *[("feet", "foots", "hurt"), ("knives", "knifes", "shone"), ("leaves", "leafs", "fell")],
        ]
    )
    start = rng.choice(["many", "several", "all", "two", "the other"])
    end = f"{does} {rng.choice(['all day', 'again', 'last week', 'at noon'])}"
    return f"{start} {plural} {end}", f"{start} {wrong} {end}"


def _filler_gap(rng: random.Random, turned: bool) -> Texts:
    """A gap needs "what"; turned, an object needs "that"."""
    verb, thing = rng.choice(_TRANSITIVE), rng.choice(_OBJECTS)
    right, wrong = _either(turned, ("what", "that"))
    start, end = f"{rng.choice(_WOMEN + _MEN)} knows", f"the {rng.choice(_PEOPLE)[0]} {verb}"
    if turned:
        end = f"{end} the {thing}"
    return f"{start} {right} {end}", f"{start} {wrong} {end}"


def _filler_gap_relative(rng: random.Random, turned: bool) -> Texts:
    """`_filler_gap` across a relative clause."""
    verb, thing = rng.choice(_TRANSITIVE), rng.choice(_OBJECTS)
    right, wrong = _either(turned, ("what", "that"))
    who = f"the {rng.choice(_PEOPLE)[0]} who {rng.choice(_LIKES)[0]} {rng.choice(_WOMEN + _MEN)}"
    start, end = f"{rng.choice(['I', 'we', 'they'])} know", f"{who} {verb}"
    if turned:
        end = f"{end} the {thing}"
    return f"{start} {right} {end}", f"{start} {wrong} {end}"


TEMPLATES: dict[tuple[str, str], Callable[[random.Random, bool], Texts]] = {
    ("subject_verb_agreement", "simple"): _agreement_simple,
    ("anaphor_agreement", "gender"): _anaphor_gender,
    ("determiner_noun_agreement", "plain"): _determiner_noun,
    ("npi_licensing", "determiner"): _npi_determiner,
    ("irregular_forms", "verb"): _irregular,
    ("filler_gap", "object"): _filler_gap,
    ("subject_verb_agreement", "attractor"): _agreement_attractor,
    ("anaphor_agreement", "number"): _anaphor_number,
    ("determiner_noun_agreement", "adjective"): _determiner_adjective,
    ("npi_licensing", "scope"): _npi_scope,
    ("irregular_forms", "plural"): _irregular_plural,
    ("filler_gap", "relative_clause"): _filler_gap_relative,
    ("subject_verb_agreement", "relative_clause"): _agreement_relative,
}
"""By type and subtype, in the order in which they take turns."""


def draw(seed: int, count: int) -> list[SentencePair]:
    """Returns `count` pairs, the templates in turn; no sentence comes twice.

    What is right alternates by id (singular and plural, women and men), so that no form is always the right one.
    Raises `InputError` if the templates do not have so many.
    """
    pairs: list[SentencePair] = []
    taken: set[str] = set()
    for n in range(count):
        (kind, subtype), template = list(TEMPLATES.items())[n % len(TEMPLATES)]
        id = n // len(TEMPLATES)
        rng = random.Random(f"{seed} {kind} {subtype} {id}")
        for _ in range(_TRIES):
            right, wrong = map(_capital, template(rng, bool(id % 2)))
            if not taken & {right, wrong}:
                break
        else:
            raise InputError(f"--pairs {count} is more than there are sentences: give {n} or fewer.")
        taken |= {right, wrong}
        pairs.append(SentencePair(kind, subtype, id, right, wrong))
    return pairs
