"""Verdicts of `python -m eval compare` in words: the decision tree of docs/evaluation/compare.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.stats import paired
from eval.stats.paired import ALPHA, Paired

BETTER, BELOW, WORSE = "better", "better, below the threshold", "worse"
EQUIVALENT, UNDECIDED = "equivalent", "undecided"

ADVICE = {
    BETTER: "Use the persistent state: its complexity is justified.",
    BELOW: "The persistent state helps, but less than its complexity was to be worth.",
    EQUIVALENT: "Reset per chunk: it is simpler.",
    WORSE: "Reset per chunk: persistence hurts.",
}
"""Advice for persist against reset, by verdict."""

MARGIN, THRESHOLD = 0.02, 10.0
"""Default margin of equivalence in nats, and default effect worth having in percent of the loss."""

FIRM = 6
"""Fewest units whose spread is known well enough to plan with, and fewest seeds that are tested rather than counted."""
NOTHING = 5e-5
"""Nats; a smaller difference prints as 0.0000 and is only rounding in float32."""


class Rule(NamedTuple):
    """Margin of equivalence (nats), effect worth having (percent of the loss), name of the units (plural)."""

    margin: float
    threshold: float
    unit: str


class Verdict(NamedTuple):
    """The verdict on a comparison."""

    kind: str
    """`BETTER`, `BELOW`, `WORSE`, `EQUIVALENT` or `UNDECIDED`."""
    text: str
    """One or two sentences."""
    units: float | None = None
    """If undecided: units that would decide; inf if no number would."""
    equivalent: bool = False
    """Whether the difference lies within the margin, clear or not."""


def verdict(
    comparison: Paired, p: float, p_equivalent: float, rule: Rule, names: tuple[str, str], seeds: Sequence[float] = ()
) -> Verdict:
    """Returns the verdict on a comparison.

    Tests over files do not generalise to other seeds. Of several seeds all must point the same way or lie within the
    margin; of `FIRM` or more, a test of their means must show it.

    Args:
      comparison: statistics of the comparison; p, p_equivalent: of the paired t and of the equivalence test, adjusted.
      names: of the condition under test and of the other; seeds: mean difference of each seed, if there are several.
    """
    tested, other = names
    if comparison.n < 2:
        why = (
            f"one {rule.unit.removesuffix('s')} cannot be tested ({comparison.mean:+.4f} nats)"
            if comparison.n
            else "no file is so long, or has anything to score there"
        )
        return Verdict(UNDECIDED, f"{tested} against {other}: undecided, {why}.", math.inf)
    means, firm = np.array(seeds), len(seeds) >= FIRM
    clear = p < ALPHA and abs(comparison.mean) >= NOTHING
    seeds_point = paired.t_test(means) < ALPHA if firm else (means * comparison.mean > 0).all()
    seeds_lie_within = paired.equivalence(means, rule.margin).p < ALPHA if firm else (abs(means) < rule.margin).all()
    same = bool(p_equivalent < ALPHA and seeds_lie_within)
    if clear and seeds_point:
        kind, text = _clear(comparison, p, same, rule, names)
    elif same:
        within = f"the difference of {comparison.mean:+z.4f} nats lies within {rule.margin:g} either way"
        but = f" ({p_words(p)} over these {rule.unit}, but not over the seeds)" if clear else ""
        kind, text = EQUIVALENT, f"{tested} and {other} are equivalent: {within}, TOST {p_words(p_equivalent)}{but}."
    elif seeds and (clear or p_equivalent < ALPHA):
        each = ", ".join(f"{mean:+z.4f}" for mean in seeds)
        apart = clear or means.min() < 0 < means.max()
        why = "the seeds disagree" if apart else f"the seeds do not lie within {rule.margin:g} as their mean does"
        text = f"{tested} against {other}: undecided, {why} ({each} nats): train more of them."
        return Verdict(UNDECIDED, text, math.inf)
    else:
        return _undecided(comparison, p, rule, names)
    equivalent = same and abs(comparison.mean) < rule.margin
    return Verdict(kind, text + _caveat(kind, equivalent, means, rule.margin), equivalent=equivalent)


def _clear(comparison: Paired, p: float, same: bool, rule: Rule, names: tuple[str, str]) -> tuple[str, str]:
    """Returns kind and text of the verdict on a clear difference."""
    tested, other = names
    size = f"{abs(comparison.mean):.4f} nats{_percent(abs(comparison.relative), comparison, rule, '.2f')}, {p_words(p)}"
    kind, than = (WORSE, "worse") if comparison.mean < 0 else (BELOW, "better")
    if abs(comparison.mean) < rule.margin:
        little = f"by less than the margin of {rule.margin:g} nats{': equivalent for practical purposes' * same}"
        return kind, f"{tested} is clearly {than} than {other}, by {size}, but {little}."
    if kind == WORSE:
        return WORSE, f"{tested} is worse than {other}: by {size}."
    least = f"the {rule.threshold:g} % asked for"
    if 100 * comparison.relative >= rule.threshold:
        return BETTER, f"{tested} is better than {other}: by {size}, at least {least}."
    return BELOW, f"{tested} is clearly better than {other}, by {size}, but less than {least}."


def _caveat(kind: str, equivalent: bool, seeds: np.ndarray, margin: float) -> str:
    """Returns a sentence if the verdict holds for these seeds but is not shown for new ones; means of seeds [n]."""
    if len(seeds) < 2:
        return ""
    p, interval, not_shown = float(paired.t_test(seeds)), paired.equivalence(seeds, margin), []
    if kind != EQUIVALENT and p >= ALPHA:
        not_shown.append(p_words(p))
    if equivalent and interval.p >= ALPHA:
        not_shown.append(f"the 90 % interval [{interval.low:+z.4f}, {interval.high:+z.4f}] leaves the margin")
    return f" For these {len(seeds)} seeds: with the seed as unit {' and '.join(not_shown)}." if not_shown else ""


def _undecided(comparison: Paired, p: float, rule: Rule, names: tuple[str, str]) -> Verdict:
    """Returns the verdict undecided, with the number of units that would decide."""
    for_effect, for_equivalence = (
        units if math.isfinite(units) and units > comparison.n else math.inf  # so many units did not decide
        for units in (comparison.units_for_effect, comparison.units_for_equivalence)
    )
    if abs(comparison.mean) >= rule.margin:
        for_equivalence = math.inf  # nothing points to equivalence
    ways = [
        (for_effect, "find a difference of this size"),
        (for_equivalence, f"establish equivalence within {rule.margin:g} nats, if there is none"),
    ]
    ways = sorted(way for way in ways if math.isfinite(way[0]))
    size = f"{comparison.mean:+z.4f} nats{_percent(comparison.relative, comparison, rule, '+z.2f')}"
    start = f"{names[0]} against {names[1]}: undecided, {size}, {p_words(p)}, over {comparison.n} {rule.unit}"
    if not ways:
        return Verdict(UNDECIDED, f"{start}; no number of {rule.unit} can be given that would decide.", math.inf)
    least, way = ways[0]
    more = "".join(f" ({units:,.0f} would {other_way})" for units, other_way in ways[1:])
    guess = f", a guess from {comparison.n}" if comparison.n < FIRM else ""
    return Verdict(UNDECIDED, f"{start}; about {least:,.0f} {rule.unit} would {way}{more}{guess}.", least)


def _percent(share: float, comparison: Paired, rule: Rule, form: str) -> str:
    """Returns a share of the loss in words, or nothing if the loss itself is below the margin."""
    return f" ({100 * share:{form}} %)" if comparison.reference >= rule.margin else ""


def advise(result: Verdict, unit: str) -> Verdict:
    """Returns the verdict on persist against reset with advice; `unit`: name of the units, in the plural."""
    if result.kind != UNDECIDED:
        return result._replace(text=f"{result.text} {ADVICE[EQUIVALENT if result.equivalent else result.kind]}")
    enough = result.units is not None and math.isfinite(result.units)
    return result._replace(text=f"{result.text} Keep looking{f' with {result.units:.0f} {unit}' if enough else ''}.")


def p_words(p: float) -> str:
    """Returns a p-value in words."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.0995 else f"p = {p:.2f}"


def p_cell(p: float) -> str:
    """Returns a p-value for a column of them; "-" of none."""
    return "-" if math.isnan(p) else p_words(p).removeprefix("p ").removeprefix("= ")
