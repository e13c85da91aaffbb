"""What a comparison of `python -m eval compare` comes to, in words: the decision tree of docs/evaluation.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.stats import paired
from eval.stats.paired import ALPHA, Paired

BETTER, BELOW, WORSE, EQUIVALENT, UNDECIDED = (
    "better",
    "better, below the threshold",
    "worse",
    "equivalent",
    "undecided",
)

ADVICE = {
    BETTER: "Use the persistent state: its complexity is justified.",
    BELOW: "The persistent state helps, but less than its complexity was to be worth.",
    EQUIVALENT: "Reset per chunk: it is simpler.",
    WORSE: "Reset per chunk: persistence hurts.",
}
"""What to do where persist is compared with reset."""

MARGIN, THRESHOLD = 0.02, 10.0
"""Default margin of equivalence in nats, and default effect worth having in percent of the loss."""

FIRM = 6
"""Units from which their spread is known well enough to say how many more would decide; seeds from which a test of them decides."""
NOTHING = 5e-5
"""Nats: less is told as 0.0000 and is no more than rounding in float32."""


class Rule(NamedTuple):
    """What verdicts are given by."""

    margin: float
    """Of equivalence, nats."""
    threshold: float
    """Effect worth having, percent of the loss."""
    unit: str
    """What the units are, in the plural."""


class Verdict(NamedTuple):
    """What a comparison comes to."""

    kind: str
    """One of `BETTER`, `BELOW`, `WORSE`, `EQUIVALENT`, `UNDECIDED`."""
    text: str
    """The same in a sentence or two."""
    units: float | None = None
    """Undecided: units that would decide; inf where no number would."""
    equivalent: bool = False
    """Whether the difference lies within the margin, be it clear or not."""


def verdict(
    found: Paired, p: float, p_equivalent: float, rule: Rule, names: tuple[str, str], seeds: Sequence[float] = ()
) -> Verdict:
    """What a comparison comes to, in words.

    Tests over files say nothing of other seeds: where several were trained, all must point the same way, or be within the margin; of
    `FIRM` or more, their mean.

    Args:
      found: the comparison; p, p_equivalent: of the paired t and of the equivalence test, adjusted; names: of the condition under test
        and of the other; seeds: mean difference of each, if there are several.
    """
    one, other = names
    if found.n < 2:
        why = (
            f"one {rule.unit.removesuffix('s')} cannot be tested ({found.mean:+.4f} nats)"
            if found.n
            else "no file is so long, or has anything to score there"
        )
        return Verdict(UNDECIDED, f"{one} against {other}: undecided, {why}.", math.inf)
    means = np.array(seeds)
    clear = p < ALPHA and abs(found.mean) >= NOTHING
    same = bool(p_equivalent < ALPHA) and _within(means, rule.margin)
    if clear and _point(means, found.mean):
        said = _clear(found, p, same, rule, names)
    elif same:
        within = f"the difference of {found.mean:+z.4f} nats lies within {rule.margin:g} either way"
        but = f" ({p_words(p)} over these {rule.unit}, but not over the seeds)" if clear else ""
        text = f"{one} and {other} are equivalent: {within}, TOST {p_words(p_equivalent)}{but}."
        said = Verdict(EQUIVALENT, text, equivalent=True)
    elif seeds and (clear or p_equivalent < ALPHA):
        each = ", ".join(f"{mean:+z.4f}" for mean in seeds)
        apart = clear or means.min() < 0 < means.max()
        why = "the seeds disagree" if apart else f"the seeds do not lie within {rule.margin:g} as their mean does"
        return Verdict(
            UNDECIDED, f"{one} against {other}: undecided, {why} ({each} nats): train more of them.", math.inf
        )
    else:
        return _undecided(found, p, rule, names)
    return said._replace(text=said.text + _over_seeds(said, means, rule.margin))


def _point(seeds: np.ndarray, mean: float) -> bool:
    """Whether means of seeds [n] bear out the direction of the whole."""
    return bool((seeds * mean > 0).all()) if len(seeds) < FIRM else bool(paired.t_test(seeds) < ALPHA)


def _within(seeds: np.ndarray, margin: float) -> bool:
    """Whether means of seeds [n] bear out that the whole lies within the margin."""
    return bool((abs(seeds) < margin).all()) if len(seeds) < FIRM else bool(paired.equivalence(seeds, margin).p < ALPHA)


def _clear(found: Paired, p: float, same: bool, rule: Rule, names: tuple[str, str]) -> Verdict:
    """Of a difference that is no chance."""
    one, other = names
    size = f"{abs(found.mean):.4f} nats{_percent(abs(found.relative), found, rule, '.2f')}, {p_words(p)}"
    kind, than = (WORSE, "worse") if found.mean < 0 else (BELOW, "better")
    if abs(found.mean) < rule.margin:
        little = f"by less than the margin of {rule.margin:g} nats{': equivalent for practical purposes' * same}"
        return Verdict(kind, f"{one} is clearly {than} than {other}, by {size}, but {little}.", equivalent=same)
    if kind == WORSE:
        return Verdict(WORSE, f"{one} is worse than {other}: by {size}.")
    asked = f"the {rule.threshold:g} % asked for"
    if 100 * found.relative >= rule.threshold:
        return Verdict(BETTER, f"{one} is better than {other}: by {size}, at least {asked}.")
    return Verdict(BELOW, f"{one} is clearly better than {other}, by {size}, but less than {asked}.")


def _over_seeds(said: Verdict, seeds: np.ndarray, margin: float) -> str:
    """Where what holds for the seeds at hand is not shown for new ones; means of seeds [n]."""
    if len(seeds) < 2:
        return ""
    p, same, not_shown = float(paired.t_test(seeds)), paired.equivalence(seeds, margin), []
    if said.kind != EQUIVALENT and p >= ALPHA:
        not_shown.append(p_words(p))
    if said.equivalent and same.p >= ALPHA:
        not_shown.append(f"the 90 % interval [{same.low:+z.4f}, {same.high:+z.4f}] leaves the margin")
    return f" For these {len(seeds)} seeds: with the seed as unit {' and '.join(not_shown)}." if not_shown else ""


def _undecided(found: Paired, p: float, rule: Rule, names: tuple[str, str]) -> Verdict:
    """How many units would tell."""
    found_by, equal_by = (
        # A way that these units have tried in vain is none.
        units if math.isfinite(units) and units > found.n else math.inf
        for units in (found.power.for_effect, found.power.for_equivalence)
    )
    if abs(found.mean) >= rule.margin:
        equal_by = math.inf  # nothing speaks for equivalence
    ways = [
        (found_by, "find a difference of this size"),
        (equal_by, f"establish equivalence within {rule.margin:g} nats, if there is none"),
    ]
    ways = sorted(way for way in ways if math.isfinite(way[0]))
    seen = f"{found.mean:+z.4f} nats{_percent(found.relative, found, rule, '+z.2f')}, {p_words(p)}, over {found.n} {rule.unit}"
    start = f"{names[0]} against {names[1]}: undecided, {seen}"
    if not ways:
        return Verdict(UNDECIDED, f"{start}; no number of {rule.unit} can be given that would decide.", math.inf)
    least, way = ways[0]
    more = "".join(f" ({units:,.0f} would {other_way})" for units, other_way in ways[1:])
    guess = f", a guess from {found.n}" if found.n < FIRM else ""
    return Verdict(UNDECIDED, f"{start}; about {least:,.0f} {rule.unit} would {way}{more}{guess}.", least)


def _percent(share: float, found: Paired, rule: Rule, form: str) -> str:
    """A share of the loss, unless that is itself next to nothing."""
    return f" ({100 * share:{form}} %)" if found.reference >= rule.margin else ""


def advise(said: Verdict, unit: str) -> Verdict:
    """The verdict on persist against reset, with what to do; units are called `unit`, in the plural."""
    if said.kind != UNDECIDED:
        return said._replace(text=f"{said.text} {ADVICE[EQUIVALENT if said.equivalent else said.kind]}")
    enough = said.units is not None and math.isfinite(said.units)
    return said._replace(text=f"{said.text} Keep looking{f' with {said.units:.0f} {unit}' if enough else ''}.")


def p_words(p: float) -> str:
    """A p-value for people."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.0995 else f"p = {p:.2f}"
