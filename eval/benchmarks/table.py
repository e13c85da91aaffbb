"""The results of benchmarks of pairs as a table for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from eval.benchmarks.results import BenchmarkResults, ViewResults
from eval.benchmarks.rules import DEFAULT
from eval.benchmarks.scored import View
from eval.benchmarks.summary import verdict
from eval.stats.estimates import Estimate
from eval.stats.verdict import p_cell

WIDTH = 120
TASK, INTERVAL = 32, 22
"""Most characters of a task's name, and columns of a number with its interval."""
CHANCE = 0.5


def table(results: BenchmarkResults) -> str:
    """Returns the results for a terminal, at most `WIDTH` characters wide: the setting, a row for each task and view,
    how views compare, and what could not be used."""
    blocks = [_wrapped(_head(results)), _accuracies(results), _comparisons(results), _wrapped(_problems(results))]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks if block)


def view_names(results: BenchmarkResults) -> dict[View, str]:
    """Returns a name for each view: what tells it apart from the others; its checkpoint and arm if it is the only
    one."""
    views = list(dict.fromkeys(view.view for task in results.tasks for view in task.views))
    told = [field for field in View._fields if len({getattr(view, field) for view in views}) > 1]
    fields = told or ["checkpoint", "arm"]
    before = {"text": "text ", "voice": "voice "}
    return {view: ", ".join(before.get(name, "") + getattr(view, name) for name in fields) for view in views}


def checkpoint_names(results: BenchmarkResults) -> str:
    """Returns the names of the checkpoints with their steps, joined by commas."""
    named = [(info.name, info.about.get("step")) for info in results.checkpoints]
    return ", ".join(cut(name, 60) + ("" if step is None else f" (step {step})") for name, step in named)


def cut(name: str, width: int) -> str:
    """Returns `name` in at most `width` characters: of a longer one the beginning and the end."""
    if len(name) <= width:
        return name
    end = (width - 3) // 2
    return f"{name[: width - 3 - end]}...{name[-end:]}"


def percent(value: Estimate) -> str:
    """Returns an accuracy in percent with its interval, marked if that contains chance; "-" of no items."""
    if not value.n:
        return "-"
    mark = " *" if value.low <= CHANCE <= value.high else ""
    return f"{100 * value.mean:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]{mark}"


def _wrapped(lines: Sequence[str]) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="    ")]


def _head(results: BenchmarkResults) -> list[str]:
    setting = results.setting
    subset = "" if setting.limit is None else f", at most {setting.limit} items a task (seed {setting.seed})"
    codec = f", codec {setting.codec['name']}" if "name" in setting.codec else ""
    other = "" if setting.rule == DEFAULT else f" (not the rule of Moshi's paper, {DEFAULT})"
    width = max(map(len, setting.arms), default=0)
    return [
        f"{_count(len(results.tasks), 'tasks')} of {cut(setting.data, 60)}{subset}{codec}",
        f"checkpoint{'s' * (len(results.checkpoints) > 1)} {checkpoint_names(results)}",
        f"rule {setting.rule}{other}: {setting.rules[setting.rule]}",
        f"text {' and '.join(setting.texts)}; voice {' and '.join(setting.voices)};"
        " every recording is read from a fresh state",
        *(f"  {arm:<{width}}  {meaning}" for arm, meaning in setting.arms.items()),
        "accuracy in % [95 % interval over items]; chance is 50 %, and * marks intervals that contain it",
    ]


def _count(number: int, nouns: str) -> str:
    return f"{number:,} {nouns.removesuffix('s') if number == 1 else nouns}"


def _accuracies(results: BenchmarkResults) -> list[str]:
    rule, names = results.setting.rule, view_names(results)
    rows = [("task", "view", "accuracy", "items", "pairs", "ties", "failed")]
    for task in results.tasks:
        rows += [_row(task.title, names[own.view], own.accuracies[rule], own) for own in task.views]
        known = [own for own in task.views if own.in_vocab]
        rows += [_row(f"{task.title}, in_vocab", names[own.view], own.in_vocab[rule]) for own in known]
    for mean in results.means:
        rows.append(_row(mean.title, names[mean.view], mean.accuracies[rule]))
    return _lines(rows, (8, 9, 7, 8))


def _row(task: str, view: str, accuracy: Estimate, counts: ViewResults | None = None) -> tuple[str, ...]:
    numbers = (counts.scored, counts.ties, counts.failed) if counts else ()
    cells = [f"{number:,}" for number in (accuracy.n, *numbers)]
    return (task, view, percent(accuracy), *cells, *[""] * (4 - len(cells)))


def _comparisons(results: BenchmarkResults) -> list[str]:
    if not results.comparisons:
        return []
    names = view_names(results)
    bases = dict.fromkeys(names[comparison.base] for comparison in results.comparisons)
    rows = [("task", "view", "points", "better", "worse", "p", "Holm", "")]
    for comparison in results.comparisons:
        size = comparison.difference
        # Where no item differs the bootstrap has nothing to draw from: [0, 0] would look certain.
        bounds = f" [{100 * size.low:+z.1f}, {100 * size.high:+z.1f}]" if comparison.discordant else ""
        points = f"{100 * size.mean:+z.1f}{bounds}" if size.n else "-"
        ps = [p_cell(p) for p in (comparison.p, comparison.adjusted)]
        counts = (f"{comparison.better:,}", f"{comparison.worse:,}")
        rows.append((comparison.title, names[comparison.view], points, *counts, *ps, verdict(comparison)))
    against, out = " or ".join(bases), sum(comparison.left_out for comparison in results.comparisons)
    start = [
        f"compared with {cut(against, 40)} on the same pairs: accuracy minus its, in points"
        " [95 %, bootstrap over items];",
        "better, worse: items; p: exact sign test over items (McNemar); Holm: p adjusted for"
        f" {_count(len(results.comparisons), 'comparisons')}",
    ]
    if out:
        start.append(f"pairs left out because one of the two was not scored: {out:,}, counted in every comparison anew")
    return _wrapped(start) + _lines(rows, (8, 7, 9, 9, 11))


def _problems(results: BenchmarkResults) -> list[str]:
    return [
        f"{task.title}: {task.unused:,} not used (results.json names all), such as {task.problems[0].name}:"
        f" {task.problems[0].reason}"
        for task in results.tasks
        if task.problems
    ]


def _lines(rows: Sequence[tuple[str, ...]], widths: Sequence[int]) -> list[str]:
    """Returns rows of a task, a view, a number with its interval, and further cells, which are as wide as `widths`.

    The first two columns are as wide as their longest name; names for which there is no room are cut.
    """
    task = min(TASK, max(len(row[0]) for row in rows))
    view = min(WIDTH - task - INTERVAL - sum(widths) - 4, max(len(row[1]) for row in rows))
    return [
        f"{cut(name, task):<{task}}  {cut(own, view):<{view}}  {value:<{INTERVAL}}"
        + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, own, value, *cells in rows
    ]
