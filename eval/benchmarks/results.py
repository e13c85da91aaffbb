"""The results of benchmarks of pairs: results.json, and pairs.csv with a row per pair and view. Imports no jax."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from eval.benchmarks import official
from eval.benchmarks.pairs import Task
from eval.benchmarks.rules import NORMS, RULES, Text, Voice
from eval.benchmarks.scored import Scored, View
from eval.results import schema
from eval.results.schema import CheckpointInfo, Skipped
from eval.stats.estimates import Estimate
from eval.streaming.weighting import WEIGHTINGS
from ttt_jax.utils.files import write_atomically

PAIRS = "pairs.csv"
COLUMNS = ("task", "split", "key", "item", *View._fields, "right", "wrong", "outcome")
"""Columns of pairs.csv beside "label_NAME" for each label, and "right RULE" and "wrong RULE" for each rule."""

RULE_MEANINGS = {
    f"{weighting} {norm}": f"{meaning}; {'divided by the number of' if norm == 'mean' else 'summed over the'} frames"
    for weighting, meaning in WEIGHTINGS.items()
    for norm in NORMS
}
"""By name of the rule: the codebooks that count, and what is done with the frames."""

NOTES = {
    "estimates": "accuracy from 0 to 1: mean over items of the mean over the item's pairs, with a 95 % interval"
    " (Wilson's, with the effective number of items) and the number of items n; null was not measured",
    "pairs": "a pair scores 1 if its right side is likelier, 0.5 if both are equally likely, else 0; a pair with a side"
    " that was not scored (failed) counts nowhere. Every recording is read from a fresh state",
    "accuracies": "over all items, by rule (the official `all`)",
    "in_vocab": "over the words with a frequency band other than oov, by rule; empty for other tasks",
    "by": "under the headline rule, by label and value; std: standard deviation of the items' scores there",
    "comparisons": "each view against the first on the pairs that both scored, under the headline rule. difference: the"
    " view's accuracy minus the first's, 95 % percentile bootstrap over items; p: exact two-sided sign test over items,"
    " McNemar's where an item is one pair; adjusted: by Holm over all comparisons here",
    "means": "unweighted mean over the parts of a benchmark, interval by MOVER",
}
"""What the numbers in results.json are."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Every choice that moves a score."""

    rule: str
    """Headline rule, one of `RULES`."""
    data: str
    """The folder that --data gave."""
    split: str
    """That --split gave; "" without: dev where it exists, else test. Each task names its own."""
    limit: int | None
    """Most items of a task, drawn by `seed`; None: all."""
    seed: int
    """Of the subset and of the bootstrap."""
    texts: tuple[Text, ...]
    """What the model reads in the text stream."""
    voices: tuple[Voice, ...]
    """Streams that speak the recordings."""
    arms: dict[str, str]
    """Meaning of each arm by name, in the order of reports."""
    codec: dict[str, Any]
    """Name and digest."""
    flush_frames: int
    """Frames of silence after a recording, so that its delayed codes come."""
    rules: dict[str, str] = dataclasses.field(default_factory=lambda: dict(RULE_MEANINGS))
    """Meaning of every rule by name."""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further choices that move scores."""


@dataclasses.dataclass(frozen=True)
class ViewResults:
    """The accuracies of a task in one view; `NOTES` explains them."""

    checkpoint: str
    arm: str
    text: Text
    voice: Voice
    accuracies: dict[str, Estimate]
    """By rule."""
    in_vocab: dict[str, Estimate]
    """By rule; empty for tasks that are not of words."""
    by: dict[str, dict[str, Estimate]]
    """By label and value."""
    std: dict[str, dict[str, float]]
    """By label and value; NaN of one item."""
    scored: int
    """Pairs that count under the headline rule."""
    ties: int
    """Of them those that score 0.5."""
    failed: int
    """Pairs with a side that was not scored."""

    @property
    def view(self) -> View:
        """What it is told apart by."""
        return View(self.checkpoint, self.arm, self.text, self.voice)


def titled(name: str, split: str) -> str:
    """Returns a task's name, with the split if there is one."""
    return f"{name} ({split})" if split else name


@dataclasses.dataclass(frozen=True)
class TaskResults:
    """The results of one task."""

    name: str
    split: str
    about: dict[str, Any]
    """`eval.benchmarks.pairs.Task.about`."""
    pairs: int
    items: int
    problems: list[Skipped]
    """Items that make no pair and recordings of pairs that were not scored, and why; a pair comes again for each
    recording and view."""
    views: list[ViewResults]
    """The first is the base of the comparisons."""

    @property
    def title(self) -> str:
        """Its name, with the split if there is one."""
        return titled(self.name, self.split)

    @property
    def unused(self) -> int:
        """Number of items and pairs with a problem."""
        return len({problem.name for problem in self.problems})


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A view against the first one, on the same pairs of a task; `NOTES` explains the numbers."""

    task: str
    split: str
    base: View
    view: View
    pairs: int
    """Pairs that both scored."""
    left_out: int
    """Pairs that one of them did not score."""
    base_accuracy: float
    accuracy: float
    difference: Estimate
    better: int
    """Items on which the view scores more than the base."""
    worse: int
    p: float
    """1 without items on which they differ; NaN without items."""
    adjusted: float

    @property
    def title(self) -> str:
        """The task's name, with the split if there is one."""
        return titled(self.task, self.split)

    @property
    def discordant(self) -> int:
        """Items on which the two differ."""
        return self.better + self.worse


class Mean(NamedTuple):
    """Mean over the parts of a benchmark in one view."""

    name: str
    """What the names of its tasks share, such as salmon."""
    split: str
    tasks: list[str]
    view: View
    accuracies: dict[str, Estimate]
    """By rule; n counts the items of all tasks. NaN if a task has no score."""

    @property
    def title(self) -> str:
        """What it is the mean of."""
        return f"{titled(self.name, self.split)}, mean of {len(self.tasks)}"


@dataclasses.dataclass(frozen=True)
class BenchmarkResults:
    """The content of results.json."""

    COMMAND: ClassVar[str] = "python -m eval suite"
    FORMAT: ClassVar[int] = 1

    setting: Setting
    checkpoints: list[CheckpointInfo]
    tasks: list[TaskResults]
    comparisons: list[Comparison]
    means: list[Mean]

    @property
    def flat(self) -> dict[str, float | int]:
        """What the original called its results, of the first view: swuggy_accuracy (0 to 1), swuggy_samples (pairs),
        and so on; only of tasks that were run, the first split of each."""
        keys: dict[str, float | int] = {}
        for task in self.tasks:
            name = official.FLAT.get(task.name)
            if name and task.views and f"{name}_accuracy" not in keys:
                first = task.views[0]
                accuracy = first.accuracies[self.setting.rule].mean
                keys |= {f"{name}_accuracy": accuracy, f"{name}_samples": first.scored}
        return keys


def write(folder: Path, results: BenchmarkResults, about: dict[str, Any]) -> Path:
    """Writes results.json to `folder` as `eval.results.schema.write`; returns its path."""
    return schema.write(folder, results, {**about, **results.flat, "notes": NOTES})


def read(folder: Path) -> BenchmarkResults:
    """Returns the results that `write` wrote to `folder`. Raises `InputError` as `eval.results.schema.read`."""
    return schema.read(folder, BenchmarkResults)


Tasks = Sequence[tuple[Task, Mapping[View, Scored]]]
"""Tasks with the scores of their pairs by view, in the order of reports."""


def write_pairs(folder: Path, tasks: Tasks, rule: str) -> Path:
    """Writes pairs.csv to `folder`, at once or not at all; returns its path.

    A row is a pair in a view: its scores under the headline `rule`, what it scores (1, 0.5, 0), and its scores under
    all rules. Scores are exact; an empty cell was not scored, or is a label that the task does not have.
    """
    path = folder / PAIRS
    write_atomically(path, _blocks(_rows(tasks, rule)))
    return path


def _rows(tasks: Tasks, rule: str) -> Iterator[Sequence[Any]]:
    labels = list(dict.fromkeys(name for task, _ in tasks for name in task.labels))
    sides = [f"{side} {name}" for name in RULES for side in ("right", "wrong")]
    start, end = COLUMNS[:4], COLUMNS[4:]
    yield [*start, *(f"label_{name}" for name in labels), *end, *sides]
    for task, scores in tasks:
        known = [
            (task.name, task.split, pair.key, pair.item, *(pair.labels.get(name, "") for name in labels))
            for pair in task.pairs
        ]
        for view, scored in scores.items():
            score = official.outcomes(scored.right[rule], scored.wrong[rule])
            columns = [_cells(side[name]) for name in RULES for side in scored]
            head = zip(_cells(scored.right[rule]), _cells(scored.wrong[rule]), _cells(score, ".1g"), strict=True)
            for pair, own, others in zip(known, head, zip(*columns, strict=True), strict=True):
                yield (*pair, *view, *own, *others)


def _cells(values: np.ndarray, form: str = "") -> list[str]:
    return ["" if value != value else format(value, form) for value in values.tolist()]  # NaN is not itself


def _blocks(rows: Iterable[Sequence[Any]], characters: int = 1 << 20) -> Iterator[memoryview]:
    """Yields the rows as CSV in UTF-8, in blocks of about so many characters, so that no table lies in memory."""
    block = io.StringIO()
    writer = csv.writer(block, lineterminator="\n")
    for row in rows:
        writer.writerow(row)
        if block.tell() > characters:
            yield memoryview(block.getvalue().encode("utf-8", "backslashreplace"))
            block.seek(0)
            block.truncate()
    yield memoryview(block.getvalue().encode("utf-8", "backslashreplace"))
