"""The official scores of benchmarks of pairs: what a pair scores, how pairs average, and what the numbers are called.

Rules of ZeroSpeech 2021 (arXiv 2011.11588), of spoken StoryCloze (arXiv 2305.13009) and of SALMon (arXiv 2409.07437).
All of them are one: the mean over items of the mean over the item's pairs, where an item is a word or a sentence in
all its voices, or one pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.benchmarks.pairs import Task

FREQUENCY, OOV = "frequency", "oov"
"""Label of sWUGGY's words, and its value for words that the reference corpus does not have."""
FLAT = {"swuggy": "swuggy", "sblimp": "sblimp", "sstorycloze": "sstory", "tstorycloze": "tstory"}
"""By task: how the keys of the original's results begin. Made-up (mini-) tasks have none."""


def outcomes(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Returns what pairs score, [n] and [n] -> float64 [n]: 1 if right is likelier, 0.5 if equal, 0 if not.

    NaN where a side was not scored: such a pair counts nowhere, above all not as 0.
    """
    score = np.where(right > wrong, 1.0, np.where(right == wrong, 0.5, 0.0))
    return np.where(np.isnan(right) | np.isnan(wrong), np.nan, score)


def index(names: Sequence[str]) -> tuple[np.ndarray, int]:
    """Returns the number of each name in the order of first appearance, int [n], and how many names there are."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64), len(numbers)


def item_means(scores: np.ndarray, item: np.ndarray, items: int) -> np.ndarray:
    """Returns the mean score of each item's pairs without NaN, [n] -> [items]; NaN where all are.

    Args:
      scores: `outcomes`; item: number of each pair's item, int [n]; items: how many there are.
    """
    there = ~np.isnan(scores)
    count = np.bincount(item[there], minlength=items)
    total = np.bincount(item[there], scores[there], minlength=items)  # halves add up without rounding
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def in_vocabulary(task: Task) -> np.ndarray | None:
    """Returns which pairs are of words that the reference corpus has, bool [n]; None of tasks that are not of words.

    sWUGGY's official `in_vocab` weights the frequency bands by their words, which is the mean over these words.
    """
    if FREQUENCY not in task.labels:
        return None
    return np.array([pair.labels.get(FREQUENCY, "") not in ("", OOV) for pair in task.pairs], bool)
