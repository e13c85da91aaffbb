"""Made-up tasks of pairs and their scores, for tests of what follows scoring."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from eval.benchmarks.pairs import Pair, Task
from eval.benchmarks.results import BenchmarkResults, Setting
from eval.benchmarks.rules import DEFAULT, RULES
from eval.benchmarks.scored import Scored, View
from eval.benchmarks.summary import compare, means, summarise
from eval.results.schema import CheckpointInfo, Skipped

BANDS = ("oov", "1-5", "6-20", "21-100", ">100")
PERSIST, OFF = (View("base", arm, "absent", "moshi") for arm in ("persist", "off"))


def words(items: int, voices: int = 2, name: str = "swuggy", seed: int = 0) -> Task:
    """A lexical task: of every third word the last voice is missing."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(items):
        labels = {"frequency": BANDS[rng.integers(5)], "length": str(rng.integers(3, 12))}
        for v in range(voices - (i % 3 == 2 and voices > 1)):
            voice = "ABCDEF"[v]
            sides = (Path(f"{voice}{i}{side}.wav") for side in "rw")
            pairs.append(Pair(f"{voice}/{i}", *sides, str(i), labels | {"voice": voice}))
    order = rng.permutation(len(pairs))  # as in a gold.csv: an item's voices do not stand together
    return Task(name, "dev", [pairs[i] for i in order], ("frequency", "length", "voice"), [], {"items": items})


def flat(name: str, pairs: int, split: str = "") -> Task:
    """A task in which every pair is an item."""
    made = [Pair(str(i), Path(f"{i}r.wav"), Path(f"{i}w.wav"), str(i), {}) for i in range(pairs)]
    return Task(name, split, made, (), [], {})


def scored(right: np.ndarray, wrong: np.ndarray, rules: tuple[str, ...] = (DEFAULT,)) -> Scored:
    """The same scores under the `rules`."""
    return Scored({rule: right.astype(float) for rule in rules}, {rule: wrong.astype(float) for rule in rules})


def from_outcomes(outcomes: np.ndarray, rules: tuple[str, ...] = (DEFAULT,)) -> Scored:
    """Scores that make pairs of these outcomes: 1, 0.5, 0; NaN fails."""
    return scored(outcomes - 0.5, np.zeros(len(outcomes)), rules)


def random_outcomes(task: Task, seed: int, failed: float = 0.1, ties: float = 0.1) -> np.ndarray:
    """Outcomes of a scorer that guesses, of which shares fail or tie."""
    rng = np.random.default_rng(seed)
    outcomes = rng.integers(0, 2, len(task.pairs)).astype(float)
    draw = rng.random(len(outcomes))
    return np.where(draw < failed, np.nan, np.where(draw < failed + ties, 0.5, outcomes))


def results() -> BenchmarkResults:
    """Two views of words, sentences and two parts of a benchmark, one of which `OFF` did not score at all."""
    listed = [words(40), flat("sblimp", 60, "dev"), flat("salmon/gender", 30), flat("salmon/rir", 20)]
    listed[1] = listed[1]._replace(problems=[Skipped("12", "its wrong side is missing")])
    tasks = []
    for i, task in enumerate(listed):
        scores = {
            view: from_outcomes(random_outcomes(task, 10 * i + j, failed=1.0 if (i, j) == (3, 1) else 0.1), RULES)
            for j, view in enumerate((PERSIST, OFF))
        }
        tasks.append((task, scores))
    summaries = [summarise(task, scores, DEFAULT) for task, scores in tasks]
    arms = {"persist": "memory kept", "off": "gates closed"}
    setting = Setting(DEFAULT, "/data/zr", "dev", 100, 0, ("absent",), ("moshi",), arms, {"name": "mimi"}, 1)
    checkpoints = [CheckpointInfo("base", (64,), (1,))]
    return BenchmarkResults(setting, checkpoints, summaries, compare(tasks, DEFAULT), means(summaries))
