"""Pairs of the mini SALMon: a recording that goes on in the same voice against one that changes it.

Speakers are real ones, from the held-out files of the embedded corpus; genders are voices of the synthesiser.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.mini.sentences import SentencePair
from eval.mini.voices import RATE, Synthesiser, level, same_length
from ttt_jax.data.audio.reader import read_audio
from ttt_jax.data.corpus import EMBEDDED
from ttt_jax.errors import InputError

SECONDS = 2.0
"""Length of an excerpt."""

_GAP = RATE // 5
"""Silence between the two parts, samples."""
_LOUD, _VOICED = 10 ** (-35 / 20), 0.6
"""An excerpt is used if this share of its 10 ms frames lies within 35 dB of its loudest."""
_SWAPS = 20
"""Exchanges of foreign excerpts for each pair."""


class Excerpt(NamedTuple):
    """A part of a recording."""

    voice: str
    """Folder in corpus/voices."""
    speaker: str
    path: str
    """Relative to corpus/."""
    start: float
    """Seconds."""


class SpeakerPair(NamedTuple):
    """The first part, the second by the same speaker, the second by another."""

    first: Excerpt
    same: Excerpt
    other: Excerpt


def _excerpts() -> dict[str, list[tuple[Excerpt, np.ndarray]]]:
    """Returns excerpts by voice, float32 [samples]: as many as fit into each prompt from its start."""
    manifest = EMBEDDED / "heldout.jsonl"
    found: dict[str, list[tuple[Excerpt, np.ndarray]]] = {}
    for line in manifest.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        path = manifest.parent / entry["path"]
        audio = read_audio(path, RATE)[0]
        length = round(SECONDS * RATE)
        for prompt in json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["prompts"]:
            for n in range(int(prompt["seconds"] / SECONDS)):
                start = prompt["start"] + n * SECONDS
                part = audio[round(start * RATE) :][:length]
                if len(part) == length and _voiced(part):
                    excerpt = Excerpt(entry["voice"], entry["speaker"], entry["path"], round(start, 2))
                    found.setdefault(entry["voice"], []).append((excerpt, part))
    return found


def _voiced(part: np.ndarray) -> bool:
    frames = part[: len(part) // 160 * 160].reshape(-1, 160)
    energy = np.sqrt((frames**2).mean(1))
    return bool(np.mean(energy > energy.max() * _LOUD) >= _VOICED)


def speaker_pairs(seed: int, count: int) -> list[tuple[SpeakerPair, np.ndarray, np.ndarray]]:
    """Returns `count` pairs with the recordings that stay and that change, float32 [samples], equally long.

    Voices take turns. The foreign second parts are the second parts of other pairs, each once: what comes second says
    nothing without what came first. No excerpt comes twice otherwise. Raises `InputError` if there is too little
    speech.
    """
    rng = random.Random(f"{seed} speakers")
    pools = {voice: rng.sample(found, len(found)) for voice, found in sorted(_excerpts().items())}
    firsts, lasts = [], []
    while len(firsts) < count:
        usable = [voice for voice, pool in pools.items() if len(pool) >= 2]
        for voice in usable[: count - len(firsts)]:
            firsts.append(pools[voice].pop())
            lasts.append(pools[voice].pop())
        if not usable:
            raise InputError(
                f"--pairs {count} is more than the {len(firsts)} pairs of excerpts that the embedded voices give: give"
                f" {len(firsts)} or fewer."
            )
    order = _foreign([excerpt.speaker for excerpt, _ in lasts], rng)
    pairs = []
    for i, (first, start) in enumerate(firsts):
        (same, right), (other, wrong) = lasts[i], lasts[order[i]]
        pairs.append((SpeakerPair(first, same, other), _join(start, right), _join(start, wrong)))
    return pairs


def _foreign(speakers: Sequence[str], rng: random.Random) -> list[int]:
    """Returns a permutation that gives each pair the second part of another speaker."""
    by_speaker = sorted(range(len(speakers)), key=lambda i: speakers[i])
    most = max(speakers.count(speaker) for speaker in set(speakers))
    order = [0] * len(speakers)
    for at, i in enumerate(by_speaker):  # a turn by the largest group meets no speaker again if none has over half
        order[i] = by_speaker[(at + most) % len(speakers)]
    if any(speakers[i] == speakers[order[i]] for i in range(len(speakers))):
        raise InputError(f"--pairs {len(speakers)} gives one speaker more than half of the pairs: give 4 or more.")
    for _ in range(_SWAPS * len(speakers)):
        i, k = rng.randrange(len(speakers)), rng.randrange(len(speakers))
        if speakers[i] != speakers[order[k]] and speakers[k] != speakers[order[i]]:
            order[i], order[k] = order[k], order[i]
    return order


def _join(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns two parts at one level with a gap between them."""
    return np.concatenate([_even(first), np.zeros(_GAP, np.float32), _even(second)])


def _even(part: np.ndarray) -> np.ndarray:
    """Returns a part at the level of `tidy`, 10 ms faded at either end, its length kept."""
    ramp = np.minimum(1.0, np.arange(len(part), dtype=np.float32) / 160)
    return level(part * ramp * ramp[::-1])


def gender_pairs(
    synthesiser: Synthesiser, voices: Sequence[str], sentences: Sequence[SentencePair]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns recordings of two sentences: in one voice, and with the second in a voice of the other gender.

    All pairs of a woman and a man take turns, in both orders. Empty if `voices` are of one gender.
    """
    genders = synthesiser.VOICES
    women, men = ([voice for voice in voices if genders[voice] == gender] for gender in "fm")
    changes = [pair for one in women for other in men for pair in ((one, other), (other, one))]
    if not changes:
        return []
    pairs = []
    for i, first in enumerate(sentences):
        voice, other = changes[i % len(changes)]
        second = sentences[(i + 1) % len(sentences)]
        start = synthesiser.say(first.right, voice)
        same, foreign = (synthesiser.say(second.right, by) for by in (voice, other))
        same, foreign = same_length(same, foreign)
        pairs.append((np.concatenate([start, same]), np.concatenate([start, foreign])))
    return pairs
