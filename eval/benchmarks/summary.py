"""From the scores of pairs to accuracies with intervals, comparisons and means. Imports no jax."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from eval.benchmarks import official
from eval.benchmarks.pairs import Task
from eval.benchmarks.results import Comparison, Mean, TaskResults, Tasks, ViewResults
from eval.benchmarks.scored import Scored, View
from eval.stats import proportions
from eval.stats.estimates import Estimate
from eval.stats.paired import ALPHA, holm
from eval.stats.verdict import BETTER, UNDECIDED, WORSE


class _Items:
    """The items of some pairs of a task, and scores by item."""

    def __init__(self, task: Task, chosen: np.ndarray | None = None) -> None:
        """Of the pairs `chosen`, bool [n]; None: of all."""
        self.chosen = np.ones(len(task.pairs), bool) if chosen is None else chosen
        names = [pair.item for pair, here in zip(task.pairs, self.chosen, strict=True) if here]
        self.number, self.count = official.index(names)

    def means(self, scores: np.ndarray) -> np.ndarray:
        """Returns each item's score from the outcomes of all pairs, [n] -> [items]; NaN was not scored."""
        return official.item_means(scores[self.chosen], self.number, self.count)

    def accuracy(self, scores: np.ndarray) -> tuple[Estimate, float]:
        """Returns the accuracy, and the standard deviation of the items' scores (NaN of one item)."""
        items = self.means(scores)
        items = items[~np.isnan(items)]
        pairs = int((~np.isnan(scores[self.chosen])).sum())
        return proportions.accuracy(items, pairs), float(items.std(ddof=1)) if len(items) > 1 else np.nan


def summarise(task: Task, scores: Mapping[View, Scored], rule: str) -> TaskResults:
    """Returns the accuracies of a task in every view: by all rules, and by label under the headline `rule`.

    An item counts by those of its pairs that were scored; `Estimate.n` counts items of which at least one was.
    """
    whole, vocabulary = _Items(task), official.in_vocabulary(task)
    words = _Items(task, vocabulary) if vocabulary is not None else None
    groups = {label: _groups(task, label) for label in task.labels}
    views = []
    for view, scored in scores.items():
        by_rule = {name: official.outcomes(scored.right[name], scored.wrong[name]) for name in scored.right}
        head = by_rule[rule]
        failed = int(np.isnan(head).sum())
        by = {
            label: {value: items.accuracy(head) for value, items in values.items()} for label, values in groups.items()
        }
        views.append(
            ViewResults(
                *view,
                accuracies={name: whole.accuracy(outcomes)[0] for name, outcomes in by_rule.items()},
                in_vocab={name: words.accuracy(outcomes)[0] for name, outcomes in by_rule.items()} if words else {},
                by={label: {value: found[0] for value, found in values.items()} for label, values in by.items()},
                std={label: {value: found[1] for value, found in values.items()} for label, values in by.items()},
                scored=len(head) - failed,
                ties=int((head == 0.5).sum()),
                failed=failed,
            )
        )
    return TaskResults(task.name, task.split, task.about, len(task.pairs), whole.count, list(task.problems), views)


def _groups(task: Task, label: str) -> dict[str, _Items]:
    """Returns the items of the pairs that carry each value of a label, values in the order of numbers, else letters."""
    values = [pair.labels.get(label, "") for pair in task.pairs]
    number, _ = official.index(values)
    groups = {value: number == i for i, value in enumerate(dict.fromkeys(values)) if value}
    return {value: _Items(task, groups[value]) for value in sorted(groups, key=_order)}


def _order(value: str) -> tuple[int, str]:
    first = re.search("[0-9]+", value)  # 6-20 is before 21-100, and oov before both
    return int(first[0]) if first else -1, value


def compare(tasks: Tasks, rule: str, seed: int = 0) -> list[Comparison]:
    """Compares every view of every task with the task's first view, on the pairs that both scored.

    All comparisons are one family for Holm's adjustment. `seed` draws the bootstrap.
    """
    found = []
    for task, scores in tasks:
        items = _Items(task)
        outcomes = {view: official.outcomes(own.right[rule], own.wrong[rule]) for view, own in scores.items()}
        base, *others = outcomes
        for view in others:
            both = ~(np.isnan(outcomes[base]) | np.isnan(outcomes[view]))
            first, second = (items.means(np.where(both, outcomes[name], np.nan)) for name in (base, view))
            there = ~np.isnan(first)
            first, second = first[there], second[there]
            test = proportions.compare(second, first, seed)
            accuracies = (float(side.mean()) if len(side) else np.nan for side in (first, second))
            pairs = int(both.sum())
            found.append(
                Comparison(task.name, task.split, base, view, pairs, len(both) - pairs, *accuracies, *test, np.nan)
            )
    adjusted = holm([comparison.p for comparison in found])
    return [dataclasses.replace(comparison, adjusted=float(p)) for comparison, p in zip(found, adjusted, strict=True)]


def verdict(comparison: Comparison) -> str:
    """Returns whether the view is better than the base: `BETTER`, `WORSE` or `UNDECIDED`.

    It is one of the first two if the adjusted p is below 0.05 and accuracy and number of items point the same way.
    """
    clear = comparison.adjusted < ALPHA
    if clear and comparison.better > comparison.worse and comparison.difference.mean > 0:
        return BETTER
    return WORSE if clear and comparison.better < comparison.worse and comparison.difference.mean < 0 else UNDECIDED


def means(tasks: Sequence[TaskResults]) -> list[Mean]:
    """Returns the mean over the parts of each benchmark of several (tasks named BENCHMARK/PART), by view."""
    families: dict[tuple[str, str], list[TaskResults]] = {}
    for task in tasks:
        if "/" in task.name:
            families.setdefault((task.name.split("/")[0], task.split), []).append(task)
    return [
        Mean(name, split, [part.name for part in parts], view, _mean_by_rule(found))
        for (name, split), parts in families.items()
        if len(parts) > 1
        for view in dict.fromkeys(view.view for part in parts for view in part.views)
        if len(found := [own for part in parts for own in part.views if own.view == view]) == len(parts)
    ]


def _mean_by_rule(views: Sequence[ViewResults]) -> dict[str, Estimate]:
    return {rule: proportions.mean_of([view.accuracies[rule] for view in views]) for rule in views[0].accuracies}
