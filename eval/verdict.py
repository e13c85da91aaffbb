"""What a comparison of `python -m eval persistence` comes to, in words: the decision tree of docs/evaluation.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from eval import paired
from eval.paired import ALPHA, Paired

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

FIRM = 6
"""Units from which their spread is known well enough to say how many more would decide."""


class Rule(NamedTuple):
    """What verdicts are given by."""

    margin: float
    """Of equivalence, nats."""
    threshold: float
    """Effect worth having, percent of the loss."""
    family: int
    """Comparisons that p-values are adjusted for."""
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

    Tests over files say nothing of other seeds: where several were trained, all must point the same way.

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
    same = bool(p_equivalent < ALPHA) and all(abs(mean) < rule.margin for mean in seeds)
    if p < ALPHA and all(mean * found.mean > 0 for mean in seeds):
        return _clear(found, p, same, rule, names)
    if same:
        within = f"the difference of {found.mean:+z.4f} nats lies within {rule.margin:g} either way"
        text = f"{one} and {other} are equivalent: {within}, {p_words(p_equivalent)}."
        return Verdict(EQUIVALENT, text, equivalent=True)
    if seeds and min(p, p_equivalent) < ALPHA:
        each = ", ".join(f"{mean:+z.4f}" for mean in seeds)
        text = f"{one} against {other}: undecided, the seeds disagree ({each} nats): train more of them."
        return Verdict(UNDECIDED, text, math.inf)
    return _undecided(found, p, rule, names)


def _clear(found: Paired, p: float, same: bool, rule: Rule, names: tuple[str, str]) -> Verdict:
    """Of a difference that is no chance."""
    one, other = names
    size = f"{abs(found.mean):.4f} nats ({100 * abs(found.relative):.2f} %), {p_words(p)}"
    little = f" By less than the margin of {rule.margin:g} nats, though: equivalent for practical purposes." * same
    if found.mean < 0:
        return Verdict(WORSE, f"{one} is worse than {other}: by {size}.{little}", equivalent=same)
    if 100 * found.relative >= rule.threshold:
        text = f"{one} is better than {other}: by {size}, at least the {rule.threshold:g} % asked for.{little}"
        return Verdict(BETTER, text, equivalent=same)
    text = f"{one} is clearly better than {other}, by {size}, but less than the {rule.threshold:g} % asked for.{little}"
    return Verdict(BELOW, text, equivalent=same)


def _undecided(found: Paired, p: float, rule: Rule, names: tuple[str, str]) -> Verdict:
    """How many units would tell."""
    found_by, equal_by = (
        # A way that these units have tried in vain is none.
        units if math.isfinite(units) and units > found.n else math.inf
        for units in (
            paired.needed(found.dz, ALPHA / rule.family),
            paired.needed_equivalence(found.sd, rule.margin, ALPHA / rule.family),
        )
    )
    if abs(found.mean) >= rule.margin and math.isfinite(found_by):
        equal_by = math.inf  # nothing speaks for equivalence
    ways = [
        (found_by, "find a difference of this size"),
        (equal_by, f"establish equivalence within {rule.margin:g} nats, if there is none"),
    ]
    ways = sorted(way for way in ways if math.isfinite(way[0]))
    seen = f"{found.mean:+z.4f} nats ({100 * found.relative:+z.2f} %), {p_words(p)}, over {found.n} {rule.unit}"
    start = f"{names[0]} against {names[1]}: undecided, {seen}"
    if not ways:
        return Verdict(UNDECIDED, f"{start}; no number of {rule.unit} can be given that would decide.", math.inf)
    least, way = ways[0]
    more = "".join(f" ({units:,.0f} would {other_way})" for units, other_way in ways[1:])
    guess = f", a guess from {found.n}" if found.n < FIRM else ""
    return Verdict(UNDECIDED, f"{start}; about {least:,.0f} {rule.unit} would {way}{more}{guess}.", least)


def advise(said: Verdict, unit: str) -> Verdict:
    """The verdict on persist against reset, with what to do; units are called `unit`, in the plural."""
    if said.kind != UNDECIDED:
        return said._replace(text=f"{said.text} {ADVICE[EQUIVALENT if said.equivalent else said.kind]}")
    enough = said.units is not None and math.isfinite(said.units)
    return said._replace(text=f"{said.text} Keep looking{f' with {said.units:.0f} {unit}' if enough else ''}.")


def p_words(p: float) -> str:
    """A p-value for people."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.0995 else f"p = {p:.2f}"
