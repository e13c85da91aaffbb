"""Accuracies and comparisons of made-up tasks, against computations of their own and answers that are known."""

from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from eval.benchmarks import summary
from eval.benchmarks.pairs import Pair, Task
from eval.benchmarks.results import Comparison
from eval.benchmarks.rules import DEFAULT, RULES
from eval.benchmarks.scored import Scored, View
from eval.stats.estimates import Estimate
from eval.stats.paired import holm
from tests.helpers.scored_pairs import OFF, PERSIST, flat, from_outcomes, random_outcomes, scored, words


def mean(values):
    return sum(values, Fraction(0)) / len(values) if values else None


def reference(task, scores, keep=lambda pair: True):
    """Accuracy and number of items, in fractions, by the words of the official rule."""
    by_item = defaultdict(list)
    for pair, right, wrong in zip(task.pairs, scores.right[DEFAULT], scores.wrong[DEFAULT], strict=True):
        if keep(pair) and right == right and wrong == wrong:
            by_item[pair.item].append(Fraction(1 if right > wrong else 0) if right != wrong else Fraction(1, 2))
    return mean([mean(pairs) for pairs in by_item.values()]), len(by_item)


def only(task, scores):
    (view,) = summary.summarise(task, {PERSIST: scores}, DEFAULT).views
    return view


def test_words_in_several_voices_by_hand():
    nan = np.nan
    rows = [  # voice, word, band, what the pair scores
        ("A", "w1", "1-5", 1),
        ("A", "w2", "oov", 0),
        ("A", "w3", ">100", 0.5),
        ("A", "w4", "oov", 1),
        ("A", "w5", "1-5", nan),
        ("B", "w1", "1-5", 0.5),
        ("B", "w2", "oov", 1),
        ("B", "w3", ">100", 0.5),
        ("B", "w4", "oov", nan),
        ("C", "w3", ">100", 1),
    ]
    pairs = [
        Pair(f"{voice}/{word}", None, None, word, {"voice": voice, "frequency": band}) for voice, word, band, _ in rows
    ]
    task = Task("swuggy", "dev", pairs, ("frequency", "voice"), [], {})
    found = only(task, from_outcomes(np.array([row[-1] for row in rows], float)))
    assert found.accuracies[DEFAULT].mean == pytest.approx((3 / 4 + 1 / 2 + 2 / 3 + 1) / 4, abs=1e-15)
    assert found.accuracies[DEFAULT].n == 4  # of w5 nothing was scored
    assert found.in_vocab[DEFAULT].mean == pytest.approx((3 / 4 + 2 / 3) / 2, abs=1e-15)
    assert found.in_vocab[DEFAULT].n == 2
    assert (found.scored, found.ties, found.failed) == (8, 3, 2)
    assert list(found.by["frequency"]) == ["oov", "1-5", ">100"]
    assert {voice: (value.mean, value.n) for voice, value in found.by["voice"].items()} == {
        "A": (2.5 / 4, 4),
        "B": (2 / 3, 3),
        "C": (1, 1),
    }
    assert found.by["frequency"]["oov"].mean == (1 / 2 + 1) / 2
    assert found.std["frequency"]["oov"] == pytest.approx(np.std([1 / 2, 1], ddof=1))
    assert np.isnan(found.std["voice"]["C"])


@pytest.mark.parametrize("seed", range(4))
def test_the_official_averages_of_any_words(seed):
    task = words(120, 4, seed=seed)
    scores = from_outcomes(random_outcomes(task, seed, failed=0.3))
    found = only(task, scores)

    def same(value, expected):
        assert (pytest.approx(value.mean, abs=1e-14), value.n) == (float(expected[0]), expected[1])

    same(found.accuracies[DEFAULT], reference(task, scores))
    for label in task.labels:
        for name, value in found.by[label].items():
            same(value, reference(task, scores, lambda pair: pair.labels[label] == name))  # noqa: B023
    # in_vocab by the official words: frequency bands but oov, weighted by their items.
    bands = [value for name, value in found.by["frequency"].items() if name != "oov"]
    weighted = sum(value.n * value.mean for value in bands) / sum(value.n for value in bands)
    assert found.in_vocab[DEFAULT].mean == pytest.approx(weighted, abs=1e-14)
    assert weighted != pytest.approx(found.accuracies[DEFAULT].mean, abs=1e-6)
    voice = mean([Fraction(x).limit_denominator() for x in (value.mean for value in found.by["voice"].values())])
    assert float(voice) != pytest.approx(found.accuracies[DEFAULT].mean, abs=1e-6)  # voices first is another number


def test_an_oracle_is_right_and_its_opposite_wrong():
    task = words(30, 3)
    right, wrong = np.ones(len(task.pairs)), np.zeros(len(task.pairs))
    best, worst = only(task, scored(right, wrong)), only(task, scored(wrong, right))
    assert best.accuracies[DEFAULT].mean == best.in_vocab[DEFAULT].mean == best.accuracies[DEFAULT].high == 1
    assert all(value.mean == 1 for values in best.by.values() for value in values.values())
    assert 0.85 < best.accuracies[DEFAULT].low < 0.95  # 30 items are not proof
    assert worst.accuracies[DEFAULT].mean == worst.accuracies[DEFAULT].low == 0


def test_swapping_right_and_wrong_gives_one_minus_the_accuracy():
    task = flat("sblimp", 256)
    scores = from_outcomes(random_outcomes(task, 5, failed=0))
    found, swapped = only(task, scores), only(task, Scored(scores.wrong, scores.right))
    assert swapped.accuracies[DEFAULT].mean == 1 - found.accuracies[DEFAULT].mean != 0.5  # 256ths are exact
    task = words(301, 3)
    scores = from_outcomes(random_outcomes(task, 3))
    found, swapped = only(task, scores), only(task, Scored(scores.wrong, scores.right))
    for name in ("accuracies", "in_vocab"):
        own, other = getattr(found, name)[DEFAULT], getattr(swapped, name)[DEFAULT]
        expected = (1 - own.mean, 1 - own.high, 1 - own.low, own.n)
        assert other == pytest.approx(expected, abs=1e-14)


def test_the_interval_of_a_guess_covers_a_half():
    task = words(60, 3)
    covered = 0
    for seed in range(1000):
        value = only(task._replace(labels=()), from_outcomes(random_outcomes(task, seed, ties=0.05))).accuracies[
            DEFAULT
        ]
        covered += value.low <= 0.5 <= value.high
    assert 920 <= covered <= 980


def test_voices_that_agree_are_no_evidence_of_their_own():
    task = words(200, 4)
    by_item = np.random.default_rng(0).integers(0, 2, 200)
    agreeing = np.array([by_item[int(pair.item)] for pair in task.pairs], float)
    one = flat("x", 200)
    alone = only(one, from_outcomes(by_item.astype(float))).accuracies[DEFAULT]
    assert only(task, from_outcomes(agreeing)).accuracies[DEFAULT] == pytest.approx(alone)
    apart = only(task, from_outcomes(random_outcomes(task, 1, failed=0, ties=0))).accuracies[DEFAULT]
    assert apart.high - apart.low < 0.6 * (alone.high - alone.low)


def test_what_failed_is_left_out_and_counted():
    task = flat("sblimp", 10)
    outcomes = np.array([1, 1, 1, 1, 0.5, np.nan, np.nan, np.nan, np.nan, np.nan])
    found = only(task, from_outcomes(outcomes))
    assert found.accuracies[DEFAULT].mean == 4.5 / 5
    assert (found.accuracies[DEFAULT].n, found.scored, found.ties, found.failed) == (5, 5, 1, 5)
    nothing = only(words(6), from_outcomes(np.full(len(words(6).pairs), np.nan)))
    values = [nothing.accuracies[DEFAULT], nothing.in_vocab[DEFAULT], nothing.by["voice"]["A"]]
    assert all(value.n == 0 and np.isnan(value.mean) and np.isnan(value.low) for value in values)
    assert (nothing.scored, nothing.ties) == (0, 0)


def test_rules_are_told_apart():
    task = flat("sblimp", 20)
    ones, zeros = np.ones(20), np.zeros(20)
    scores = Scored({rule: ones for rule in RULES}, {rule: zeros for rule in RULES} | {RULES[3]: 2 * ones})
    found = only(task, scores)
    assert {rule for rule, value in found.accuracies.items() if value.mean == 0} == {RULES[3]}
    assert set(found.accuracies) == set(RULES)


def test_labels_are_in_the_order_of_numbers():
    task = words(300)
    found = only(task, from_outcomes(random_outcomes(task, 0, failed=0)))
    assert list(found.by["frequency"]) == ["oov", "1-5", "6-20", "21-100", ">100"]
    assert list(found.by["length"]) == [str(length) for length in range(3, 12)]


def test_a_comparison_is_mcnemars_on_the_pairs_that_both_scored():
    task = flat("sblimp", 200)
    rng = np.random.default_rng(2)
    first, second = (rng.random(200) < 0.5).astype(float), (rng.random(200) < 0.7).astype(float)
    first[:7], second[5:11] = np.nan, np.nan
    scores = {PERSIST: from_outcomes(first), OFF: from_outcomes(second)}
    (found,) = summary.compare([(task, scores)], DEFAULT)
    b, c = (int((x[11:] > y[11:]).sum()) for x, y in ((second, first), (first, second)))
    assert (found.base, found.view, found.pairs, found.left_out) == (PERSIST, OFF, 189, 11)
    assert (found.better, found.worse, found.discordant) == (b, c, b + c)
    assert found.p == pytest.approx(stats.binomtest(b, b + c, 0.5).pvalue)
    assert found.base_accuracy == pytest.approx(first[11:].mean())
    assert found.difference.mean == pytest.approx(second[11:].mean() - first[11:].mean())
    assert found.difference.mean == pytest.approx(found.accuracy - found.base_accuracy)
    assert found.difference.low < found.difference.mean < found.difference.high
    (again,) = summary.compare([(task, {OFF: scores[OFF], PERSIST: scores[PERSIST]})], DEFAULT)
    assert again.p == found.p
    assert again.difference.mean == -found.difference.mean


def test_a_comparison_of_several_voices_counts_items():
    pairs = [Pair(f"{v}{i}", None, None, str(i), {}) for i in range(4) for v in "ABC"]
    task = Task("swuggy", "dev", pairs, (), [], {})
    first = np.array([0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0, 0], float)
    second = np.array([1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1, np.nan], float)
    # Item means 0, 1, 1/3 and 1/2 against 2/3, 2/3, 1/3 and 1: of the last item only two voices are compared.
    (found,) = summary.compare([(task, {PERSIST: from_outcomes(first), OFF: from_outcomes(second)})], DEFAULT)
    assert (found.better, found.worse, found.pairs, found.difference.n) == (2, 1, 11, 4)
    assert found.difference.mean == pytest.approx((2 / 3 - 1 / 3 + 0 + 1 / 2) / 4)
    assert found.p == pytest.approx(stats.binomtest(2, 3, 0.5).pvalue)


def test_all_comparisons_are_one_family():
    other = View("other", "off", "absent", "moshi")
    tasks = []
    for i in range(3):
        task = flat(f"t{i}", 150)
        better = random_outcomes(task, 50 + i)
        worse = np.where(np.arange(150) % (i + 3) == 0, 0, better)
        tasks.append((task, {PERSIST: from_outcomes(better), OFF: from_outcomes(worse), other: from_outcomes(better)}))
    empty = flat("t3", 5)
    tasks.append((empty, {PERSIST: from_outcomes(np.ones(5)), OFF: from_outcomes(np.full(5, np.nan))}))
    found = summary.compare(tasks, DEFAULT)
    assert [(own.task, own.view) for own in found[:3]] == [("t0", OFF), ("t0", other), ("t1", OFF)]
    np.testing.assert_array_equal([own.adjusted for own in found], holm([own.p for own in found]))
    assert [own.p for own in found[1:6:2]] == [1, 1, 1]
    assert np.isnan(found[-1].p)
    assert found[-1].difference.n == 0
    assert [summary.verdict(own) for own in found] == ["worse", "undecided"] * 3 + ["undecided"]
    assert 0 < found[0].p < found[0].adjusted


@pytest.mark.parametrize(
    ("adjusted", "better", "worse", "mean", "expected"),
    [
        (0.049, 30, 10, 0.1, "better"),
        (0.049, 10, 30, -0.1, "worse"),
        (0.051, 30, 10, 0.1, "undecided"),
        (0.051, 10, 30, -0.1, "undecided"),
        (0.001, 30, 10, -0.01, "undecided"),  # more items are better, but the worse ones lose more
        (0.001, 10, 30, 0.01, "undecided"),
        (float("nan"), 0, 0, float("nan"), "undecided"),
    ],
)
def test_a_verdict_needs_clear_numbers_that_point_one_way(adjusted, better, worse, mean, expected):
    size = Estimate(mean, mean - 0.05, mean + 0.05, 100)
    own = Comparison("t", "", PERSIST, OFF, 100, 0, 0.5, 0.6, size, better, worse, adjusted / 3, adjusted)
    assert summary.verdict(own) == expected


def test_the_mean_over_the_parts_of_a_benchmark():
    tasks = [flat("salmon/a", 100), flat("salmon/b", 50), flat("sblimp", 30), flat("mini-salmon/a", 10)]
    outcomes = [random_outcomes(task, i, failed=0) for i, task in enumerate(tasks)]
    results = [
        summary.summarise(task, {PERSIST: from_outcomes(own)}, DEFAULT)
        for task, own in zip(tasks, outcomes, strict=True)
    ]
    (found,) = summary.means(results)
    assert (found.name, found.tasks, found.view) == ("salmon", ["salmon/a", "salmon/b"], PERSIST)
    value = found.accuracies[DEFAULT]
    assert value.mean == pytest.approx((outcomes[0].mean() + outcomes[1].mean()) / 2)
    assert value.n == 150
    nothing = summary.summarise(tasks[1], {PERSIST: from_outcomes(np.full(50, np.nan))}, DEFAULT)
    (found,) = summary.means([results[0], nothing])
    assert found.accuracies[DEFAULT].n == 0
    assert np.isnan(found.accuracies[DEFAULT].mean)
    other = summary.summarise(tasks[1], {OFF: from_outcomes(outcomes[1])}, DEFAULT)
    assert summary.means([results[0], other]) == []
