"""The figure of benchmarks of pairs: accuracies with intervals by task and view. Imports no jax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.benchmarks.results import BenchmarkResults
from eval.benchmarks.scored import View
from eval.benchmarks.table import CHANCE, checkpoint_names, cut, view_names
from eval.results.figures import CHECKPOINTS, KINDS, legend, pyplot, save
from eval.stats.estimates import Estimate

NAME = "accuracy"
FILES = tuple(f"{NAME}.{kind}" for kind in KINDS)
MARKERS = "osD^v"
"""Of views; a new one where the colours begin again."""


def draw(results: BenchmarkResults, folder: Path) -> list[Path]:
    """Writes accuracy.png and accuracy.pdf to `folder`; returns the paths. Published numbers are not drawn."""
    return save(figure(results), folder, NAME)


def figure(results: BenchmarkResults) -> Any:
    """Returns a figure with a row for each task, in which every view is a dot with its 95 % interval."""
    rows, names = _rows(results), view_names(results)
    step = 0.8 / max(1, len(names))
    height = 1.6 + len(rows) * max(0.4, 0.16 * len(names)) + 0.2 * len(names)
    drawn, axis = pyplot().subplots(figsize=(8, height), layout="constrained")
    axis.axvline(100 * CHANCE, color="#6B6B6B", ls="--", lw=1)
    for i, (view, name) in enumerate(names.items()):
        found = [
            (row + (i - (len(names) - 1) / 2) * step, by[view]) for row, by in enumerate(rows.values()) if view in by
        ]
        found = [(at, value) for at, value in found if value.n]
        means = [100 * value.mean for _, value in found]
        axis.errorbar(
            means,
            [at for at, _ in found],
            xerr=[
                [mean - 100 * value.low for mean, (_, value) in zip(means, found, strict=True)],
                [100 * value.high - mean for mean, (_, value) in zip(means, found, strict=True)],
            ],
            fmt=MARKERS[i // len(CHECKPOINTS) % len(MARKERS)],
            color=CHECKPOINTS[i % len(CHECKPOINTS)],
            markersize=5,
            capsize=2,
            lw=1.2,
            label=cut(name, 60),
        )
    if len(results.checkpoints) == 1:  # the legend names several
        axis.set_title(f"{checkpoint_names(results)}, {cut(results.setting.data, 40)}", fontsize=10, loc="left")
    else:
        axis.set_title(cut(results.setting.data, 60), fontsize=10, loc="left")
    axis.set_yticks(range(len(rows)), [cut(name, 40) for name in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(f"accuracy in %, rule {results.setting.rule}\n95 % intervals over items; dashed: chance")
    axis.grid(axis="x", alpha=0.25)
    legend(drawn, [axis], 1 if max(map(len, names.values()), default=0) > 30 else 3)
    return drawn


def _rows(results: BenchmarkResults) -> dict[str, dict[View, Estimate]]:
    """Returns the accuracies of each row by view, under the headline rule."""
    rule, rows = results.setting.rule, {}
    for task in results.tasks:
        rows[task.title] = {own.view: own.accuracies[rule] for own in task.views}
        known = {own.view: own.in_vocab[rule] for own in task.views if own.in_vocab}
        rows |= {f"{task.title}, in_vocab": known} if known else {}
    for mean in results.means:
        rows.setdefault(mean.title, {})[mean.view] = mean.accuracies[rule]
    return rows
