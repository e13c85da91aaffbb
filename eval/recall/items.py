"""Items of spoken recall: what is played first, what fills the gap, what is played then. Imports no jax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from eval.inputs.dataset import EvalFile
from eval.recall.pools import Pool
from eval.recall.results import HEARD, WHO, Dropped
from ttt_jax.config import FRAME_RATE

LEAD_IN = 50
"""Least frames before the first playing, so that it never meets a fresh state."""
CALL = 125
"""Frames of a call of the model, and between the resets of the arm reset. The lead-in is as long as it takes to begin
the second playing with a call: a reset then falls there, and all gaps share one compiled program."""
TRIES = 50
"""Draws after which an item that does not fit is given up."""


class Item(NamedTuple):
    """Streams that differ in the first playing, and the same again with the roles of the excerpts changed."""

    kind: str
    gap: int
    """Frames between the playings."""
    number: int
    """Counts the items of a kind and gap."""
    unit: str
    """The speaker; in `WHO` the one who returns."""
    excerpts: tuple[str, ...]
    """Where what is played first comes from, as FILE@FRAME."""
    lead_in: np.ndarray
    """Tokens, int32 [17, T], as all that follows."""
    firsts: tuple[np.ndarray, np.ndarray]
    filler: np.ndarray
    seconds: tuple[np.ndarray, ...]
    """What is played then: `seconds[i]` belongs to `firsts[i]`. One only in `WHO` with two speakers."""

    @property
    def start(self) -> int:
        """First frame of the second playing."""
        return self.lead_in.shape[1] + self.firsts[0].shape[1] + self.filler.shape[1]

    def streams(self) -> list[np.ndarray]:
        """Returns the stream of every first with every second playing, in this order."""
        return [
            np.concatenate([self.lead_in, first, self.filler, second], 1)
            for first in self.firsts
            for second in self.seconds
        ]


def before(gap: int, excerpt: int) -> int:
    """Returns the frames of the lead-in."""
    return LEAD_IN + -(LEAD_IN + excerpt + gap) % CALL


def build(
    files: Sequence[EvalFile], kinds: Sequence[str], excerpt: int, gaps: Sequence[int], count: int, seed: int
) -> tuple[list[Item], list[Dropped]]:
    """Returns items of every kind and gap, and the gaps that the files cannot fill without repeating.

    The speakers take turns. The k-th item of a speaker has the same excerpts at every gap, and a larger `count` begins
    with the items of a smaller one.

    Args:
      excerpt: frames of an excerpt; gaps: frames; count: items of a kind and gap.
    """
    groups = list(dict.fromkeys(file.group for file in files))
    pools = [Pool(group, [file for file in files if file.group == group], excerpt) for group in groups]
    named = [pool for pool in pools if pool.named]
    items, dropped = [], []
    for kind, of_kind, make in ((HEARD, pools, _heard_before), (WHO, named, _who_is_it)):
        for gap in gaps if kind in kinds else ():
            if reason := _lacking(kind, of_kind, gap, excerpt):
                dropped.append(Dropped(kind, gap, reason))
                continue
            made = _of_gap(make, of_kind, gap, count, seed)
            items += made
            if not made:
                dropped.append(Dropped(kind, gap, "no filler without a repetition of the excerpts was found"))
    return items, dropped


def _lacking(kind: str, pools: Sequence[Pool], gap: int, excerpt: int) -> str | None:
    """Returns why no item of this kind and gap can be made; None if one can."""
    if kind == WHO and len(pools) < 2:
        there = f"only {pools[0].unit} is named" if pools else "none is named"
        return f'two speakers or better three are needed, {there} ("speaker" in the manifest)'
    able = [pool for pool in pools if len(pool.starts) and np.ptp(pool.starts) >= excerpt]
    if not able:
        return (
            f"no speaker has two excerpts of {excerpt / FRAME_RATE:g} s in which half of the frames change their"
            " semantic code"
        )
    if kind == HEARD:
        filling, need = able, before(gap, excerpt) + gap + 2 * excerpt
    else:
        filling = [pool for pool in pools if able != [pool]]
        need = before(gap, excerpt) + gap + (excerpt if len(pools) == 2 else 0)
    longest = max(filling, key=lambda pool: pool.length)
    if longest.length < need:
        return (
            f"{need / FRAME_RATE:.0f} s of one speaker are needed, but the most is {longest.length / FRAME_RATE:.0f} s"
            f" ({longest.unit})"
        )
    return None


def _of_gap(make: Callable[..., Item | None], pools: Sequence[Pool], gap: int, count: int, seed: int) -> list[Item]:
    """Returns up to `count` items; speakers that cannot give one are passed over."""
    items, turns, able = [], 0, list(range(len(pools)))
    while len(items) < count and able:
        for speaker in list(able):
            if len(items) == count:
                break
            rng = np.random.default_rng((seed, speaker, turns))
            for _ in range(TRIES):
                # A generator for each try: the excerpts do not depend on what the gap takes.
                if (item := make(pools, speaker, gap, len(items), rng.spawn(1)[0])) is not None:
                    items.append(item)
                    break
            else:
                able.remove(speaker)
        turns += 1
    return items


def _heard_before(pools: Sequence[Pool], speaker: int, gap: int, number: int, rng: np.random.Generator) -> Item | None:
    pool = pools[speaker]
    lead = before(gap, pool.excerpt)
    if pool.length < lead + gap + 2 * pool.excerpt or (starts := pool.draw(rng)) is None:
        return None
    if (fill := pool.fill(lead + gap, starts, rng)) is None:
        return None
    a, b = (pool.cut(start) for start in starts)
    places = tuple(map(pool.place, starts))
    return Item(HEARD, gap, number, pool.unit, places, fill[:, :lead], (a, b), fill[:, lead:], (a, b))


def _who_is_it(pools: Sequence[Pool], speaker: int, gap: int, number: int, rng: np.random.Generator) -> Item | None:
    """The returning speaker S, S of a third speaker U as control, and between them T; with two speakers U is T."""
    pool = pools[speaker]
    lead = before(gap, pool.excerpt)
    if (own := pool.draw(rng)) is None:
        return None
    others = [pools[i] for i in rng.permutation(len(pools)) if i != speaker]
    control = others[0]
    between = next((other for other in others[1:] if other.length >= lead + gap), others[0])
    two = between is control
    if (theirs := control.draw(rng, 1 if two else 2)) is None or (two and len(others) > 1):
        return None
    if (fill := between.fill(lead + gap, theirs if two else (), rng)) is None:
        return None
    return Item(
        WHO,
        gap,
        number,
        pool.unit,
        (pool.place(own[0]), control.place(theirs[0])),
        fill[:, :lead],
        (pool.cut(own[0]), control.cut(theirs[0])),
        fill[:, lead:],
        (pool.cut(own[1]),) if two else (pool.cut(own[1]), control.cut(theirs[1])),
    )
