"""The results of `python -m eval compare` as tables for a terminal and as a Markdown report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval.compare.analysis import Analysis
from eval.compare.experiment import BEYOND, BOUND_NAMES, LATER, REGIONS, WINDOW, Experiment
from eval.stats.estimates import Estimate, interval
from eval.stats.paired import ALPHA
from eval.stats.verdict import p_cell
from eval.streaming.weighting import WEIGHTINGS
from ttt_jax.config import FRAME_RATE
from ttt_jax.utils.files import write_atomically

FILE = "report.md"

Row = Sequence[str]

NOTES = (
    "The unit is the file, or the speaker where the manifest names speakers, never the frame: frames of one recording"
    " are not independent. n counts units. Intervals are Student's t.",
    "p of t and of TOST are Holm-adjusted within a region, over the comparisons with the first condition. No clear"
    " difference is not equivalence: only TOST says that there is (nearly) none.",
    "n: d_z and n: TOST are the units that would find the effect, or establish equivalence if there is no difference,"
    " with a power of 80 %, two-sided at 0.05 for all comparisons together.",
    "A reset clears the fast weights, not attention's KV cache: for as long as attention reaches, it passes on what"
    " memory contributed before.",
    "Of several checkpoints (seeds), p-values of the combined difference speak of new files for these seeds; the row"
    " over seeds has the seed as its unit and speaks of new seeds for these files.",
    "`python -m eval compare --again FOLDER` does the statistics again from `losses.npz`, with another `--margin` or"
    " `--threshold`. All numbers and verdicts are explained in docs/evaluation/compare.md.",
)
"""How to read the report."""


class Table(NamedTuple):
    """A table of the report; cells are texts."""

    title: str
    note: str
    """What the numbers are."""
    heads: Row
    rows: list[Row]

    def aligned(self) -> str:
        """Returns title and columns for a terminal; words aligned left, numbers right."""
        widths = [max(map(len, column)) for column in zip(self.heads, *self.rows, strict=True)]
        words = [any(cell[:1].isalpha() for cell in column) for column in zip(*self.rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if left else cell.rjust(width)
                for cell, width, left in zip(row, widths, words, strict=True)
            ).rstrip()
            for row in [self.heads, *self.rows]
        ]
        return "\n".join([self.title, *lines])

    def markdown(self) -> str:
        """Returns title, note and table in Markdown."""
        rows = [self.heads, ["---"] * len(self.heads), *self.rows]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n\n".join([f"## {self.title}", self.note, "\n".join(lines)])


def table(experiment: Experiment, analysis: Analysis) -> str:
    """Returns the results for a terminal; the verdicts are the last lines."""
    tables = [_losses(experiment, analysis), *_comparisons(experiment, analysis)]
    head = [_head(experiment, analysis), *(f"{region}: {words}" for region, words in _regions(experiment).items())]
    verdicts = [_first_chunk(analysis), *_verdicts(experiment, analysis)]
    return "\n\n".join(["\n".join(head), *(table.aligned() for table in tables), "\n".join(verdicts)])


def write(folder: Path, experiment: Experiment, analysis: Analysis, about: dict[str, Any]) -> Path:
    """Writes the Markdown report to `folder`, at once or not at all; returns its path."""
    path = folder / FILE
    write_atomically(path, (markdown(experiment, analysis, about) + "\n").encode("utf-8", "backslashreplace"))
    return path


def markdown(experiment: Experiment, analysis: Analysis, about: dict[str, Any]) -> str:
    """Returns the report: question, verdicts, setting, tables, figures, how to read it."""
    sections = [
        "# Does memory help?",
        f"Is the loss under **{experiment.conditions[0].name}** lower than under the other conditions, on the same"
        " files, from the second chunk on?",
        "## Verdict",
        _bullets([*_verdicts(experiment, analysis), _first_chunk(analysis)]),
        "## Setting",
        _bullets(_setting(experiment, analysis, about)),
        _losses(experiment, analysis).markdown(),
        "![Loss by chunk](loss_by_chunk.png)",
        *(table.markdown() for table in _gap(experiment, analysis)),
        *(table.markdown() for table in _comparisons(experiment, analysis)),
        "![Differences](differences.png)",
    ]
    if experiment.skipped:
        sections += ["## Left out", _bullets([f"{file.name}: {file.reason}" for file in experiment.skipped])]
    return "\n\n".join([*sections, "## How to read this", _bullets(NOTES)])


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _head(experiment: Experiment, analysis: Analysis) -> str:
    files, unit = len(experiment.files), experiment.unit
    minutes = sum(file.frames for file in experiment.files) / FRAME_RATE / 60
    units = "" if unit == "files" else f" of {analysis.units} {unit}"
    parts = [
        f"{files} file{'s' * (files > 1)}{units} ({minutes:.1f} minutes)",
        *([f"{len(experiment.skipped)} left out"] if experiment.skipped else []),
        f"chunks of {experiment.setting.chunk} frames",
        f"codebooks weighted {experiment.setting.weighting}",
    ]
    return ", ".join(parts)


def _regions(experiment: Experiment) -> dict[str, str]:
    """Returns the frames of each part of the files, in words."""
    setting, longest = experiment.setting, experiment.longest
    meanings = {
        LATER: "",
        WINDOW: f" (the longest attention window is {setting.window:,} frames)",
        BEYOND: f" (attention of all layers together reaches {setting.reach:,} frames back: without memory nothing"
        " can know more)",
    }
    return {
        region: f"frames from {start:,} on{meanings[region]}"
        + (f"; the longest file has {longest:,}" if longest <= start else "")
        for region, (start, _) in setting.regions.items()
    }


def _shown_regions(experiment: Experiment) -> list[str]:
    """Returns the regions that are not the same frames as an earlier one."""
    spans = list(experiment.setting.regions.values())
    return [region for i, region in enumerate(REGIONS) if spans[i] not in spans[:i]]


def _losses(experiment: Experiment, analysis: Analysis) -> Table:
    regions = _shown_regions(experiment)
    rows = []
    for condition in experiment.conditions:
        first, *more = condition.checkpoints
        label = f"{first} and {len(more)} more" if more else first
        means = analysis.losses[condition.name].regions
        rows.append([condition.name, condition.arm, label, *(interval(means[region], 4) for region in regions)])
    for name, bound in analysis.bounds.items():
        rows.append([BOUND_NAMES[name], "", "", *(interval(bound.regions[region], 4) for region in regions)])
    note = "Nats per token, mean [95 % interval, Student's t]; seeds are averaged first."
    return Table(
        "Conditions", note, ["condition", "arm", "checkpoint", *(f"loss {region}" for region in regions)], rows
    )


def _gap(experiment: Experiment, analysis: Analysis) -> list[Table]:
    """Returns a table of the shares of the best possible gain on a controlled task that conditions reach.

    Chunks that attention can see from the start are left out: there is next to no gap.
    """
    if not _has_gap(analysis):
        return []
    conditions = analysis.losses.values()
    rows = [
        [region, *(_percent(losses.closed[region]) for losses in conditions)] for region in _shown_regions(experiment)
    ]
    if len(experiment.conditions[0].checkpoints) > 1:
        seeds = [[_number(100 * seed.mean, "+z.1f") for seed in losses.closed_by_seed] for losses in conditions]
        rows.append(["each seed, there", *map(", ".join, seeds)])
    for i, (start, end) in enumerate(experiment.chunks):
        if end > experiment.setting.regions[BEYOND][0]:
            rows.append([f"chunk from {start:,}", *(_percent(losses.closed_by_chunk[i]) for losses in conditions)])
    note = "Share of the gap between the best loss without memory beyond attention and the best with all, % [95 %]."
    return [Table("Share of the gap", note, ["frames", *analysis.losses], rows)]


def _comparisons(experiment: Experiment, analysis: Analysis) -> list[Table]:
    """Returns the tables of regions, trends and seeds that have rows."""
    tables = [_compared(experiment, analysis, region) for region in _shown_regions(experiment)]
    tables += [_trend(analysis), _seeds(experiment, analysis)]
    return [table for table in tables if table.rows]


def _compared(experiment: Experiment, analysis: Analysis, region: str) -> Table:
    first, setting = experiment.conditions[0].name, experiment.setting
    heads = [f"minus {first}", "n", "nats [95 %]", "% of loss", "d_z", "above 0", "p: t", "Holm"]
    heads += [f"TOST {setting.margin:g}", "Holm", "90 % interval", "n: d_z", "n: TOST"]
    rows, verdicts = [], []
    for comparison in analysis.comparisons:
        compared = comparison.regions[region]
        paired, tost = compared.paired, compared.paired.equivalence
        if not paired.n:
            continue
        rows.append(
            [
                comparison.name,
                str(paired.n),
                interval(paired, 4, signed=True),
                _number(100 * paired.relative, "+z.2f") if paired.reference >= setting.margin else "-",
                _number(paired.dz, "+z.2f"),
                f"{100 * paired.above:.0f} %",
                *map(p_cell, (paired.p, compared.holm, tost.p, compared.holm_equivalence)),
                f"[{tost.low:+z.4f}, {tost.high:+z.4f}]" if paired.n > 1 else "-",
                *map(_units, (paired.units_for_effect, paired.units_for_equivalence)),
            ]
        )
        if compared.verdict and region != LATER:
            verdicts.append(compared.verdict.text)
    note = f"Loss minus that of {first}, by the same file, averaged over seeds: above 0 {first} is better."
    title = f"{region[0].upper()}{region[1:]}, frames from {setting.regions[region][0]:,} on"
    return Table(title, "\n\n".join([note, *([_bullets(verdicts)] if verdicts else [])]), heads, rows)


def _trend(analysis: Analysis) -> Table:
    trends = {comparison.name: comparison.trend for comparison in analysis.comparisons}
    rows = [
        [name, str(trend.n), interval(trend, 6, signed=True), p_cell(trend.p)]
        for name, trend in trends.items()
        if trend.n
    ]
    note = "Slope of the difference over chunks after the first, nats per chunk; above 0 the benefit grows."
    return Table("Trend", note, ["condition", "n", "nats per chunk [95 %]", "p"], rows)


def _seeds(experiment: Experiment, analysis: Analysis) -> Table:
    rows = []
    for comparison, condition in zip(analysis.comparisons, experiment.conditions[1:], strict=True):
        compared = comparison.regions[LATER]
        for checkpoint, seed in zip(condition.checkpoints, compared.seeds, strict=False):
            nats = interval(seed.test, 4, signed=True)
            rows.append([comparison.name, checkpoint, nats, p_cell(seed.test.p), p_cell(seed.holm)])
        if compared.seeds and compared.paired.n:
            over, means = compared.over_seeds, [seed.test.mean for seed in compared.seeds]
            label = f"over {len(means)} seeds, {sum(mean > 0 for mean in means)} above 0"
            rows.append([comparison.name, label, interval(over, 4, signed=True), p_cell(over.p), ""])
    heads = ["condition", "seed", "nats [95 %]", "p: t", "Holm"]
    return Table("Seeds", "Each seed alone, after the first chunk.", heads, rows)


def _first_chunk(analysis: Analysis) -> str:
    first = analysis.first_chunk
    if not first.pairs:
        return "First chunk: not checked, persist and reset of the same checkpoint were not both run."
    sentence = f"First chunk: persist and reset differ by at most {first.largest:.2g} nats"
    return f"{sentence} ({first.where}; allowed {first.tolerance:g}): {'BROKEN' if first.broken else 'as it must be'}."


def _verdicts(experiment: Experiment, analysis: Analysis) -> list[str]:
    """Returns the verdicts of the primary region and beyond attention, and the best possible gain from memory."""
    if analysis.first_chunk.broken:
        return [analysis.first_chunk.broken]
    sentences = [comparison.regions[LATER].verdict.text for comparison in analysis.comparisons]
    if BEYOND in _shown_regions(experiment):
        beyond = [comparison.regions[BEYOND] for comparison in analysis.comparisons]
        sentences += [f"Beyond the attention window: {one.verdict.text}" for one in beyond if one.paired.n]
    if _has_gap(analysis):
        ideal, memoryless = (analysis.bounds[name].regions[BEYOND].mean for name in BOUND_NAMES)
        shares = ", ".join(f"{name} {_percent(losses.closed[BEYOND])}" for name, losses in analysis.losses.items())
        sentences.append(
            f"Memory from beyond attention is worth {memoryless - ideal:.4f} nats at best; of that each takes, in %:"
            f" {shares}."
        )
    return sentences


def _setting(experiment: Experiment, analysis: Analysis, about: dict[str, Any]) -> list[str]:
    setting = experiment.setting
    lines = [
        _head(experiment, analysis),
        f"Codebooks weighted {setting.weighting}: {WEIGHTINGS[setting.weighting]}; the text is no part of the loss",
        *(f"{region[0].upper()}{region[1:]}: {words}" for region, words in _regions(experiment).items()),
        f"Margin of equivalence {setting.margin:g} nats, effect asked for {setting.threshold:g} % of the loss, error"
        f" rate {ALPHA:g}",
    ]
    for name, value in setting.about.items():
        value = value.get("name") if isinstance(value, dict) else value  # a digest stands beside
        lines += [f"{name[0].upper()}{name[1:]}: `{value}`"] if value else []
    for info in experiment.checkpoints:
        facts = {"step": info.about.get("step"), "seed": info.seed}
        words = "".join(f", {name} {value}" for name, value in facts.items() if value is not None)
        lines.append(f"Checkpoint `{info.name}`: `{info.about.get('path', '')}`{words}")
    if machine := about.get("evaluated_with"):
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        lines.append(f"{versions}, on {machine['device']}")
    if cost := about.get("cost"):
        lines.append(f"Took {cost['seconds']:.0f} s and at most {cost['peak_gigabytes']:.1f} GB of memory")
    return lines


def _has_gap(analysis: Analysis) -> bool:
    """Returns whether memory can lower the loss at best; False where that is unknown."""
    return any(share.n for losses in analysis.losses.values() for share in losses.closed.values())


def _number(value: float, form: str) -> str:
    """Returns a number as a cell; "-" where there is none."""
    return f"{value:{form}}" if math.isfinite(value) else "-"


def _percent(share: Estimate) -> str:
    """Returns a share with its interval in percent as a cell."""
    return interval(Estimate(100 * share.mean, 100 * share.low, 100 * share.high, share.n), 1, signed=True)


def _units(units: float) -> str:
    """Returns a number of units as a cell."""
    return "> 1 million" if math.isinf(units) else _number(units, ",.0f")
