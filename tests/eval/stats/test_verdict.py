"""Verdicts on paired differences: every branch, margins, families, seeds."""

import numpy as np
import pytest

from eval.stats import paired
from eval.stats.paired import ALPHA
from eval.stats.verdict import BELOW, BETTER, EQUIVALENT, FIRM, UNDECIDED, WORSE, Rule, advise, verdict


def judged(d, reference=3.0, threshold=10.0, margin=0.02, family=1, seeds=()):
    """The verdict on differences in a family of equal ones."""
    result = paired.compare(np.array(d, float), reference, margin, ALPHA / family)
    p, same = (min(1.0, family * p) for p in (result.p, result.equivalence.p))
    return verdict(result, p, same, Rule(margin, threshold, "files"), ("persist", "reset"), seeds)


SPREAD = np.array([-1.5, -1, -0.5, 0, 0, 0.5, 1, 1.5]) * 0.01


@pytest.mark.parametrize(
    ("d", "kind", "text", "advice"),
    [
        (0.4 + SPREAD, BETTER, "is better than reset: by 0.4000 nats (13.33 %), p < 0.001", "Use the persistent state"),
        (0.3 + SPREAD, BETTER, "at least the 10 %", "Use the persistent state"),
        (0.29 + SPREAD, BELOW, "clearly better than reset, by 0.2900 nats (9.67 %)", "less than its complexity"),
        (0.013 + SPREAD, BELOW, "equivalent for practical purposes", "it is simpler"),
        (-0.29 + SPREAD, WORSE, "worse than reset: by 0.2900 nats (9.67 %)", "persistence hurts"),
        (-0.4 + SPREAD, WORSE, "worse than reset", "persistence hurts"),
        (-0.013 + SPREAD, WORSE, "equivalent for practical purposes", "it is simpler"),
        (0.001 + SPREAD, EQUIVALENT, "are equivalent: the difference of +0.0010 nats", "it is simpler"),
        (0.015 + 3 * SPREAD, UNDECIDED, "files would establish equivalence within 0.02", "Keep looking with"),
        (0.05 + 8 * SPREAD, UNDECIDED, "files would find a difference of this size", "Keep looking with"),
        (0.021 + 3 * SPREAD, UNDECIDED, "files would find a difference of this size.", "Keep looking with"),
        (
            0.0103 + 3.77 * np.tile(SPREAD, 4),
            UNDECIDED,
            "files would find a difference of this size.",
            "Keep looking with",
        ),
        ([0.3], UNDECIDED, "one file cannot be tested", "Keep looking."),
        ([], UNDECIDED, "no file is so long", "Keep looking."),
    ],
)
def test_every_verdict(d, kind, text, advice):
    result = judged(d)
    assert result.kind == kind
    assert text in result.text
    assert advice not in result.text
    assert advice in advise(result, "files").text
    assert ("equivalent for practical" in result.text) == (advice == "it is simpler" and kind != EQUIVALENT)


def test_threshold_margin_and_family_count():
    assert judged(0.29 + SPREAD, threshold=9).kind == BETTER
    assert judged(0.001 + SPREAD, margin=0.001).kind == UNDECIDED
    assert judged(0.011 + SPREAD).kind == BELOW
    assert judged(0.011 + SPREAD, family=5).kind != BELOW
    d = 0.05 + 8 * SPREAD
    few, many = judged(d), judged(d, family=3)
    assert few.units == paired.needed(paired.power_of, paired.hedges(d))
    assert many.units == paired.needed(paired.power_of, paired.hedges(d), 0.05 / 3) > few.units
    assert f"{few.units:.0f} files" in few.text


def test_next_to_nothing_is_neither_clear_nor_a_share():
    nothing = judged(1e-6 * (1 + SPREAD), reference=1e-6)
    assert nothing.kind == EQUIVALENT
    assert "asked for" not in nothing.text
    assert judged(1e-4 * (1 + SPREAD), reference=1e-4).kind == BELOW
    little = judged(0.0192 + SPREAD / 4, reference=0.0185)
    assert (little.kind, little.equivalent) == (BELOW, False)
    assert "by 0.0192 nats, p < 0.001, but by less than the margin of 0.02 nats." in little.text
    assert "(100.00 %)" in judged(2.7 + SPREAD, reference=2.7).text


@pytest.mark.parametrize(
    ("d", "seeds", "kind", "text"),
    [
        # For a clear difference few seeds must all point one way; of many, the mean.
        (0.4 + SPREAD, (0.8, -0.1, 0.5), UNDECIDED, "the seeds disagree (+0.8000, -0.1000, +0.5000 nats)"),
        (0.4 + SPREAD, (0.4,) * 5 + (-0.1,), BETTER, "asked for."),
        (0.4 + SPREAD, (0.8, -0.5) * 4, UNDECIDED, "the seeds disagree"),
        # For equivalence few must all lie within the margin; of many, the mean.
        (SPREAD / 8, (0.021, 0.001, 0.001), UNDECIDED, "the seeds do not lie within 0.02 as their mean does"),
        (SPREAD / 8, (0.021, 0.001, 0.001, 0.0, 0.0, 0.0), EQUIVALENT, "TOST p < 0.001."),
        (SPREAD / 8, (0.05, -0.05) * 3, UNDECIDED, "the seeds disagree"),
        (
            0.005 + SPREAD / 8,
            (0.015, -0.005, 0.005),
            EQUIVALENT,
            "(p < 0.001 over these files, but not over the seeds).",
        ),
    ],
)
def test_seeds_decide_too(d, seeds, kind, text):
    result = judged(d, seeds=seeds)
    assert result.kind == kind
    assert text in result.text


@pytest.mark.parametrize(
    ("d", "seeds", "text"),
    [
        (0.4 + SPREAD, (0.8, 0.3, 0.1), "p = 0.19"),
        (0.4 + SPREAD, (0.19, 0.5, 0.81), "p = 0.11."),
        (0.4 + SPREAD, (0.26, 0.5, 0.74), "p = 0.069."),
        (0.4 + SPREAD, (0.32, 0.5, 0.68), ""),  # p = 0.041
        (-0.4 + SPREAD, (-0.8, -0.3, -0.1), "p = 0.19"),
        (SPREAD, (0.0025, 0.0106, -0.0176), "the 90 % interval [-0.0260, +0.0230] leaves the margin"),
        (SPREAD, (0.001, 0.002, -0.001), ""),
        (0.005 + SPREAD / 8, (0.0001, 0.0002, 0.0147), "p = 0.41."),
        (0.01 + SPREAD / 2, (0.001, 0.019, 0.01), "p = 0.19 and the 90 % interval"),
    ],
)
def test_a_verdict_that_holds_for_these_seeds_alone_names_it(d, seeds, text):
    result = judged(d, seeds=seeds).text
    assert (f"For these {len(seeds)} seeds: with the seed as unit {text}" in result) == bool(text)
    assert ("For these" in result) == bool(text)


def test_two_units_far_apart_from_zero_promise_no_equivalence():
    assert "no number of files can be given" in judged([0.1, 0.12]).text


@pytest.mark.parametrize("n", [3, FIRM - 1, FIRM])
def test_of_few_units_the_number_that_would_decide_is_called_a_guess(n):
    text = judged(0.05 + np.resize([-0.1, 0.1, 0.02], n)).text
    assert "files would" in text
    assert (f"a guess from {n}." in text) == (n < FIRM)
