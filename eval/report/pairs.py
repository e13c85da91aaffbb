"""Section on benchmarks of pairs (`python -m eval suite` and its parts)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from eval.benchmarks.layouts import MINI_PREFIX
from eval.benchmarks.results import RULE_MEANINGS, Comparison, TaskResults, ViewResults
from eval.benchmarks.scored import View
from eval.report import published
from eval.report.collect import PAIRS, Source
from eval.report.parts import Cell, Figure, Note, Section, Table, curve, estimate, number, p_value, words
from eval.report.runs import Runs, subset
from eval.results.figures import CHECKPOINTS, COLOURS
from eval.stats.estimates import Estimate


class Bar(NamedTuple):
    """An accuracy of a task in a view."""

    task: str
    view: View
    accuracy: Estimate
    run: str


def sections(runs: Runs, sources: Sequence[Source]) -> list[Section]:
    """Returns the section, if any results belong to it."""
    sources = [source for source in sources if source.command == PAIRS]
    if not sources:
        return []
    groups: dict[tuple[bool, str, str], list[Bar]] = defaultdict(list)
    for source in sources:
        rule = source.results.setting.rule
        for task in source.results.tasks:
            bars = [_bar(runs, source, task.title, view.view, view.accuracies[rule]) for view in task.views]
            groups[task.name.startswith(MINI_PREFIX), rule, subset(source)] += bars
        for mean in source.results.means:
            bar = _bar(runs, source, mean.title, mean.view, mean.accuracies[rule])
            groups[mean.name.startswith(MINI_PREFIX), rule, subset(source)].append(bar)
    blocks: list[Figure | Table | Note] = [_figure(runs, *key, bars) for key, bars in groups.items() if bars]
    blocks += [_table(runs, source) for source in sources]
    blocks += [table for source in sources if (table := _comparisons(runs, source))]
    blocks += [published.table(), Note(published.NOTE)]
    lead = (
        "Of two recordings, does the model find the right one more likely? Accuracy over items, with 95 % intervals;"
        " 50 % is chance. Tasks that begin with mini- are small sets of synthetic speech made by this project: they are"
        " not the official benchmarks, and their numbers compare with each other only."
    )
    return [Section("benchmarks", "Benchmarks", lead, blocks)]


def _bar(runs: Runs, source: Source, title: str, view: View, accuracy: Estimate) -> Bar:
    run = runs.of(source, view.checkpoint)
    return Bar(title, view._replace(checkpoint=run.name), accuracy, run.key)


def _figure(runs: Runs, mini: bool, rule: str, items: str, bars: list[Bar]) -> Figure:
    """Returns the accuracies of one kind of tasks as bars: a group for each task, a colour for each view."""
    views = list(dict.fromkeys(bar.view for bar in bars))
    of_arms = len({view.arm for view in views}) == len(views)  # then arms have the colours of all figures
    told = [name for name in View._fields if len({getattr(view, name) for view in views}) > 1] or ["checkpoint", "arm"]
    series = []
    for i, view in enumerate(views):
        own = {bar.task: bar for bar in bars if bar.view == view and bar.accuracy.n}
        if own:
            name = ", ".join(str(getattr(view, field)) for field in told)
            run = next(iter(own.values())).run
            estimates = [bar.accuracy for bar in own.values()]
            colour = COLOURS.get(view.arm, CHECKPOINTS[-1]) if of_arms else CHECKPOINTS[i % len(CHECKPOINTS)]
            series.append(curve(name, list(own), estimates, 100, colour=colour, run=run))
    caption = (
        f"{'Mini tasks of synthetic speech, not the official ones' if mini else 'Official tasks'}; {items}; rule"
        f" {rule}: {RULE_MEANINGS.get(rule, rule)}."
    )
    title = f"{'Mini tasks: accuracy' if mini else 'Accuracy'}, {items}"
    if "checkpoint" not in told:  # else the legend names it
        title += f": {views[0].checkpoint}"
    keys = frozenset(bar.run for bar in bars)
    return Figure(title, caption, "", "accuracy, %", series, keys, "bars", [(50, "chance")], from_zero=True)


def _table(runs: Runs, source: Source) -> Table:
    setting = source.results.setting
    rows = [_row(runs, source, task, view, setting.rule) for task in source.results.tasks for view in task.views]
    heads = ("Task", "Run", "Arm", "Text", "Voice", "Accuracy, %", "In vocabulary, %", "Items", "Pairs", "Ties")
    heads = (*heads, "Failed", "No pair")
    caption = f"{subset(source)}; rule {setting.rule}; codec {setting.codec.get('name')}."
    keys = frozenset(runs.of(source, info.name).key for info in source.checkpoints)
    return Table(f"Accuracies: {setting.data}", caption, heads, rows, keys)


def _row(runs: Runs, source: Source, task: TaskResults, view: ViewResults, rule: str) -> tuple[Cell, ...]:
    return (
        Cell(task.title),
        Cell(runs.of(source, view.checkpoint).name),
        Cell(view.arm),
        Cell(view.text),
        Cell(view.voice),
        estimate(view.accuracies[rule], 1, scale=100),
        estimate(view.in_vocab[rule], 1, scale=100) if rule in view.in_vocab else words(None),
        number(view.accuracies[rule].n, "d"),
        number(view.scored, "d"),
        number(view.ties, "d"),
        number(view.failed, "d"),
        number(task.about.get("problems"), "d"),
    )


def _difference(entry: Comparison) -> Estimate:
    """Returns the difference, without bounds where no item differs: the bootstrap then has nothing to draw from."""
    return entry.difference if entry.discordant else entry.difference._replace(low=math.nan, high=math.nan)


def _comparisons(runs: Runs, source: Source) -> Table | None:
    def name(view: View) -> str:
        return ", ".join((runs.of(source, view.checkpoint).name, view.arm, view.text, view.voice))

    rows = [
        (
            Cell(entry.title),
            Cell(name(entry.view)),
            Cell(name(entry.base)),
            estimate(_difference(entry), 1, signed=True, scale=100),
            number(entry.better, "d"),
            number(entry.worse, "d"),
            p_value(entry.p),
            p_value(entry.adjusted),
        )
        for entry in source.results.comparisons
    ]
    if not rows:
        return None
    heads = ("Task", "View", "Against", "Difference, points", "Items better", "Items worse", "p", "p (Holm)")
    caption = (
        "Each view against the first on the pairs that both scored: bootstrap interval, exact sign test over items."
    )
    keys = frozenset(runs.of(source, info.name).key for info in source.checkpoints)
    return Table(f"Comparisons: {source.results.setting.data}", caption, heads, rows, keys)
