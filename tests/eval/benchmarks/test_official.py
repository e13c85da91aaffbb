"""What pairs score and how they average, against numbers computed by hand."""

import numpy as np

from eval.benchmarks import official
from tests.helpers.scored_pairs import words


def test_a_tie_is_a_half_and_what_was_not_scored_is_no_outcome():
    nan = np.nan
    right = np.array([2.0, 1.0, 1.0, nan, 1.0, nan, -np.inf])
    wrong = np.array([1.0, 1.0, 2.0, 1.0, nan, nan, -np.inf])
    np.testing.assert_array_equal(official.outcomes(right, wrong), [1, 0.5, 0, nan, nan, nan, 0.5])


def test_swapped_sides_give_one_minus_the_outcome():
    rng = np.random.default_rng(0)
    right, wrong = rng.integers(0, 4, (2, 500)).astype(float)
    right[:20] = np.nan
    outcomes = official.outcomes(right, wrong)
    np.testing.assert_array_equal(official.outcomes(wrong, right), 1 - outcomes)
    assert {0, 0.5, 1} == set(outcomes[20:])


def test_an_item_is_the_mean_of_its_scored_pairs():
    item, count = official.index(["b", "a", "b", "c", "a", "b"])
    assert (item.tolist(), count) == ([0, 1, 0, 2, 1, 0], 3)
    scores = np.array([1.0, np.nan, 0.5, np.nan, 0.0, 0.0])
    np.testing.assert_array_equal(official.item_means(scores, item, count), [0.5, 0, np.nan])


def test_the_vocabulary_is_every_band_but_oov():
    task = words(50)
    task.pairs[0].labels["frequency"] = ""  # a word without a frequency is in no band
    known = official.in_vocabulary(task)
    assert not known[0]
    for pair, here in zip(task.pairs[1:], known[1:], strict=True):
        assert here == (pair.labels["frequency"] in ("1-5", "6-20", "21-100", ">100"))
    assert official.in_vocabulary(task._replace(labels=("voice",))) is None
