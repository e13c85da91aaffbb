"""The results of `python -m eval compare` as a table for a terminal and as a Markdown report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.compare.analysis import Analysis, Comparison
from eval.compare.experiment import BEYOND, BOUND_NAMES, LATER, REGIONS, WINDOW, Experiment
from eval.stats.estimates import interval
from eval.stats.paired import ALPHA, Interval, Paired, Power, Slope
from eval.stats.verdict import p_words
from eval.streaming.weighting import WEIGHTINGS
from ttt_jax.config import FRAME_RATE
from ttt_jax.utils.files import write_atomically

FILE = "report.md"

Row = Sequence[str]


def table(experiment: Experiment, analysis: Analysis) -> str:
    """Returns the results for a terminal; the verdicts are the last lines."""
    blocks = [
        [_head(experiment, analysis), *(f"{region}: {words}" for region, words in _regions(experiment).items())],
        _aligned(*_conditions(experiment, analysis)),
        *([_gap(experiment, analysis)] if _has_gap(analysis) else []),
    ]
    for region in _shown_regions(experiment):
        if any(one.regions[region].paired.n for one in analysis.comparisons):
            blocks.append([_title(experiment, region), *_aligned(*_compared(experiment, analysis, region))])
    for title, rows in (
        ("power, in units: 80 %, two-sided at 0.05 for all comparisons together", _power(experiment, analysis)),
        ("trend of the difference over chunks, nats per chunk (above 0: the benefit grows)", _trend(analysis)),
        ("by seed, after the first chunk", _seeds(experiment, analysis)),
    ):
        if rows[1]:
            blocks.append([title, *_aligned(*rows)])
    blocks.append([_first_chunk(analysis), *_sentences(experiment, analysis)])
    return "\n\n".join("\n".join(block) for block in blocks)


def write(folder: Path, experiment: Experiment, analysis: Analysis, about: dict[str, Any]) -> Path:
    """Writes the Markdown report to `folder`, at once or not at all; returns its path."""
    path = folder / FILE
    write_atomically(path, (markdown(experiment, analysis, about) + "\n").encode("utf-8", "backslashreplace"))
    return path


def markdown(experiment: Experiment, analysis: Analysis, about: dict[str, Any]) -> str:
    """Returns the report: question, verdicts, setting, tables, figures, how to read it."""
    first, unit = experiment.conditions[0].name, experiment.unit
    sections = [
        "# Does memory help?",
        f"Is the loss under **{first}** lower than under the other conditions, on the same files, from the second"
        " chunk on?",
        "## Verdict",
        "\n".join(f"- {line}" for line in [*_sentences(experiment, analysis), _first_chunk(analysis)]),
        "## Setting",
        "\n".join(f"- {line}" for line in _setting(experiment, analysis, about)),
        "## Conditions",
        "Nats per token, mean [95 % interval, Student's t]; seeds are averaged first.",
        _pipes(*_conditions(experiment, analysis)),
        "![Loss by chunk](loss_by_chunk.png)",
    ]
    if _has_gap(analysis):
        title, table_ = _gap(experiment, analysis, plain=False)
        sections += [
            "## Share of the gap",
            f"{title[0].upper()}{title[1:]}.",
            table_,
            "By chunk, beyond the attention window:",
            _gap_by_chunk(experiment, analysis),
        ]
    sections += [
        "## Comparisons",
        f"Loss of each condition minus that of {first}, by the same file, averaged over seeds: above 0 {first} is"
        " better.",
        "![Differences](differences.png)",
    ]
    for region in REGIONS:
        sections.append(f"### {_title(experiment, region)}")
        if region not in _shown_regions(experiment):
            sections.append("The same frames as above.")
            continue
        if any(one.regions[region].paired.n for one in analysis.comparisons):
            sections.append(_pipes(*_compared(experiment, analysis, region)))
        else:
            sections.append("No file is so long.")
        verdicts = [one.regions[region].verdict for one in analysis.comparisons]
        if region != LATER and all(verdicts):
            sections.append("\n".join(f"- {one.text}" for one in verdicts))
    for title, words, rows in (
        (
            "Power",
            f"How many {unit} would tell, were differences and spread what they were here, and the chance that these"
            " had; 0.05 for all comparisons together.",
            _power(experiment, analysis),
        ),
        ("Trend", "Slope of the difference over chunks after the first, nats per chunk.", _trend(analysis)),
        ("Seeds", "Each seed alone, after the first chunk.", _seeds(experiment, analysis)),
    ):
        if rows[1]:
            sections += [f"## {title}", words, _pipes(*rows)]
    if experiment.skipped:
        sections += ["## Left out", "\n".join(f"- {file.name}: {file.reason}" for file in experiment.skipped)]
    sections += ["## How to read this", "\n".join(f"- {line}" for line in _notes(experiment))]
    return "\n\n".join(sections)


def _head(experiment: Experiment, analysis: Analysis) -> str:
    setting, files = experiment.setting, len(experiment.files)
    minutes = sum(file.frames for file in experiment.files) / FRAME_RATE / 60
    parts = [
        f"{files} file{'s' * (files > 1)}"
        + ("" if experiment.unit == "files" else f" of {analysis.units} {experiment.unit}")
        + f" ({minutes:.1f} minutes)",
        *([f"{len(experiment.skipped)} left out"] if experiment.skipped else []),
        f"chunks of {setting.chunk} frames",
        f"codebooks weighted {setting.weighting}",
    ]
    return ", ".join(parts)


def _regions(experiment: Experiment) -> dict[str, str]:
    """Returns what each part of the files is, in words."""
    setting, starts = experiment.setting, experiment.setting.starts
    longest = max(file.frames for file in experiment.files)
    meanings = {
        LATER: "",
        WINDOW: f" (the longest attention window is {setting.window:,} frames)",
        BEYOND: f" (attention of all layers together reaches {setting.reach:,} frames back: without memory nothing"
        " can know more)",
    }
    return {
        region: f"frames from {starts[region]:,} on{meaning}"
        + (f"; the longest file has {longest:,}" if longest <= starts[region] else "")
        for region, meaning in meanings.items()
    }


def _shown_regions(experiment: Experiment) -> list[str]:
    """Returns the regions that are not the same frames as an earlier one."""
    starts = experiment.setting.starts
    return [region for i, region in enumerate(REGIONS) if starts[region] not in [starts[one] for one in REGIONS[:i]]]


def _title(experiment: Experiment, region: str) -> str:
    return f"{region}, frames from {experiment.setting.starts[region]:,} on"


def _conditions(experiment: Experiment, analysis: Analysis) -> tuple[Row, list[Row]]:
    rows = []
    for one in experiment.conditions:
        found, seeds = analysis.losses[one.name], len(one.checkpoints)
        label = one.checkpoints[0] if seeds == 1 else f"{one.checkpoints[0]} and {seeds - 1} more"
        rows.append(
            [one.name, one.arm, label, *(interval(found.regions[region], 4) for region in _shown_regions(experiment))]
        )
    for name, found in analysis.bounds_by_region.items():
        rows.append([BOUND_NAMES[name], "", "", *(interval(found[region], 4) for region in _shown_regions(experiment))])
    return ["condition", "arm", "checkpoint", *(f"loss {region}" for region in _shown_regions(experiment))], rows


def _compared(experiment: Experiment, analysis: Analysis, region: str) -> tuple[Row, list[Row]]:
    heads = [
        f"minus {experiment.conditions[0].name}",
        "n",
        "nats [95 % BCa]",
        "% of loss",
        "d_z",
        "above 0",
        "p: t",
        "Holm",
        "Wilcoxon",
        "sign-flip",
        f"TOST {experiment.setting.margin:g}",
        "Holm",
        "90 % interval",
    ]
    rows = []
    for one in analysis.comparisons:
        compared = one.regions[region]
        found, same = compared.paired, compared.paired.equivalence
        rows.append(
            [
                one.name,
                str(found.n),
                _with_bounds(Interval(found.mean, found.low, found.high)),
                _relative(found, experiment),
                _number(found.dz, "+z.2f"),
                _number(100 * found.above, ".0f", " %"),
                *(_p(p) for p in (found.p.t, compared.holm, found.p.wilcoxon, found.p.sign_flip)),
                *(_p(p) for p in (same.p, compared.holm_equivalence)),
                "-" if math.isnan(same.low) else f"[{same.low:+z.4f}, {same.high:+z.4f}]",
            ]
        )
    return heads, rows


def _power(experiment: Experiment, analysis: Analysis) -> tuple[Row, list[Row]]:
    setting = experiment.setting
    heads = [
        "condition",
        f"{experiment.unit} now",
        "to find this effect",
        f"to establish equivalence within {setting.margin:g}",
        f"power now for {setting.threshold:g} %",
    ]

    def row(one: Comparison) -> Row:
        found = one.regions[LATER].paired
        power: Power = found.power
        return [
            one.name,
            str(found.n),
            _count(power.for_effect),
            _count(power.for_equivalence),
            _number(100 * power.of_threshold, ".0f", " %") if _has_size(found, experiment) else "-",
        ]

    return heads, [row(one) for one in analysis.comparisons]


def _trend(analysis: Analysis) -> tuple[Row, list[Row]]:
    def row(one: Comparison) -> Row:
        trend: Slope = one.trend
        return [one.name, str(trend.n), _with_bounds(Interval(trend.mean, trend.low, trend.high), 6), _p(trend.p)]

    some = [row(one) for one in analysis.comparisons if one.trend.n]
    return ["condition", "n", "nats per chunk [95 %]", "p"], some


def _seeds(experiment: Experiment, analysis: Analysis) -> tuple[Row, list[Row]]:
    rows = []
    for one, condition in zip(analysis.comparisons, experiment.conditions[1:], strict=True):
        found = one.regions[LATER]
        for checkpoint, seed in zip(condition.checkpoints, found.seeds, strict=False):
            bounds = _with_bounds(Interval(seed.paired.mean, seed.paired.low, seed.paired.high))
            relative = _relative(seed.paired, experiment)
            rows.append([one.name, checkpoint, bounds, "", relative, _p(seed.paired.p.t), _p(seed.holm)])
        if found.seeds and found.paired.n:
            means = [seed.paired.mean for seed in found.seeds]
            over = found.over_seeds
            label = f"over {len(means)} seeds, {sum(mean > 0 for mean in means)} above 0"
            bounds = _with_bounds(Interval(over.mean, over.low, over.high))
            reached = f"{min(means):+z.4f} to {max(means):+z.4f}"
            rows.append([one.name, label, bounds, reached, "", _p(over.p), ""])
    return ["condition", "seed", "nats [95 %]", "range", "% of loss", "p: t", "Holm"], rows


def _has_gap(analysis: Analysis) -> bool:
    """Returns whether memory can lower the loss at best; False where that is unknown."""
    return any(math.isfinite(one.mean) for losses in analysis.losses.values() for one in losses.closed.values())


def _gap(experiment: Experiment, analysis: Analysis, plain: bool = True) -> list[str]:
    """Returns how much of the best possible gain on a controlled task each condition reaches."""
    regions = _shown_regions(experiment)
    several = any(len(one.checkpoints) > 1 for one in experiment.conditions)
    heads = ["condition", *regions, *(["each seed, there"] if several else [])]
    rows = []
    for one in experiment.conditions:
        losses = analysis.losses[one.name]
        row = [one.name, *(_percent(losses.closed[region]) for region in regions)]
        if several:
            row.append(", ".join(_number(100 * seed.mean, "+z.1f") for seed in losses.closed_by_seed))
        rows.append(row)
    title = (
        "share of the gap closed between the best loss without memory beyond attention and the best with all, %"
        " [95 % BCa]"
    )
    return [title, *(_aligned(heads, rows) if plain else [_pipes(heads, rows)])]


def _gap_by_chunk(experiment: Experiment, analysis: Analysis) -> str:
    """Returns the share of the gap that each condition closes, by chunk; while attention reaches the start, there is
    next to no gap."""
    closed = [analysis.losses[one.name].closed_by_chunk for one in experiment.conditions]
    rows = [
        [f"from {start:,}", *(_percent(shares) for shares in chunk)]
        for (start, end), *chunk in zip(experiment.chunks, *closed, strict=True)
        if end > experiment.setting.starts[BEYOND]
    ]
    return _pipes(["frames", *(one.name for one in experiment.conditions)], rows)


def _first_chunk(analysis: Analysis) -> str:
    found = analysis.first_chunk
    if not found.pairs:
        return "First chunk: not checked, persist and reset of the same checkpoint were not both run."
    sentence = f"First chunk: persist and reset differ by at most {found.largest:.2g} nats"
    return f"{sentence} ({found.where}; allowed {found.tolerance:g}): {'BROKEN' if found.broken else 'as it must be'}."


def _sentences(experiment: Experiment, analysis: Analysis) -> list[str]:
    """Returns the verdicts: of the primary region, then beyond attention."""
    if analysis.first_chunk.broken:
        return [analysis.first_chunk.broken]
    verdicts = [one.regions[LATER].verdict.text for one in analysis.comparisons]
    beyond = [
        f"Beyond the attention window: {one.regions[BEYOND].verdict.text}"
        for one in analysis.comparisons
        if one.regions[BEYOND].paired.n and BEYOND in _shown_regions(experiment)
    ]
    return verdicts + beyond + _worth(experiment, analysis)


def _worth(experiment: Experiment, analysis: Analysis) -> list[str]:
    """Returns the best possible gain from memory and the share that every condition reaches, in a sentence."""
    if not _has_gap(analysis):
        return []
    best = [analysis.bounds_by_region[name][BEYOND].mean for name in ("memoryless", "ideal")]
    takes = ", ".join(
        f"{one.name} {_percent(analysis.losses[one.name].closed[BEYOND])}" for one in experiment.conditions
    )
    return [
        f"Memory from beyond attention is worth {best[0] - best[1]:.4f} nats at best; of that each takes, in %:"
        f" {takes}."
    ]


def _setting(experiment: Experiment, analysis: Analysis, about: dict[str, Any]) -> list[str]:
    setting = experiment.setting
    lines = [
        _head(experiment, analysis),
        f"Codebooks weighted {setting.weighting}: {WEIGHTINGS[setting.weighting]}; the text is no part of the loss",
        *(f"{region[0].upper()}{region[1:]}: {words}" for region, words in _regions(experiment).items()),
        f"Margin of equivalence {setting.margin:g} nats, effect asked for {setting.threshold:g} % of the loss, error"
        f" rate {ALPHA:g}",
        *(f"{name[0].upper()}{name[1:]}: `{_name(value)}`" for name, value in setting.about.items() if _name(value)),
    ]
    for one in experiment.checkpoints:
        facts = {"step": one.about.get("step"), "seed": one.seed}
        parts = [f"{name} {value}" for name, value in facts.items() if value is not None]
        where = f"`{one.name}`: `{one.about.get('path', '')}`"
        lines.append(f"Checkpoint {where}{', ' * bool(parts)}{', '.join(parts)}")
    if with_ := about.get("evaluated_with"):
        versions = ", ".join(f"{name} {version}" for name, version in with_["versions"].items())
        lines.append(f"{versions}, on {with_['device']}")
    if spent := about.get("cost"):
        lines.append(f"Took {spent['seconds']:.0f} s and at most {spent['peak_gigabytes']:.1f} GB of memory")
    return lines


def _notes(experiment: Experiment) -> list[str]:
    setting, unit = experiment.setting, experiment.unit
    return [
        f"The unit is the {unit.removesuffix('s')}, never the frame: frames of one recording are not independent. n"
        f" counts {unit}.",
        "**Better**: Holm-adjusted p of the paired t below 0.05 and an effect of at least the percentage asked for."
        " **Worse**: p below 0.05 the other way. Either by less than the margin is reported as such. **Equivalent**:"
        " two one-sided tests (TOST, Holm-adjusted) put the difference within the margin, and p is not below 0.05 or"
        " the seeds point both ways. **Undecided**: none of these; the number of units is the one that has a power"
        " of 80 %.",
        "No clear difference is not equivalence: a few noisy files show nothing either way. Only TOST says that"
        " there is (nearly) none.",
        f"{setting.threshold:g} % of a cross-entropy is much; look at the nats, too: e to the difference is the ratio"
        " of perplexities.",
        "Holm: within a region, over the comparisons with the first condition; p of t and of TOST each. Wilcoxon,"
        " sign-flip and the columns p: t and TOST are as they come. With few units the signed ranks and the"
        " sign-flip test cannot reach 0.05 (below 6), and BCa intervals are too narrow (below ten or so): go by p of"
        " t.",
        "The first chunk is left out of every comparison: persist and reset are the same there by construction,"
        " which is checked.",
        "A reset clears the fast weights, not attention's KV cache: for as long as attention reaches, it passes on"
        " what memory contributed before.",
        "Where several checkpoints (seeds) stand for a condition, files vary and seeds vary: the p-values of the"
        " combined difference speak of new files for these seeds; the row over seeds has the seed as its unit and"
        " speaks of new seeds for these files.",
        "`losses.npz` holds the loss of every file, chunk, condition and seed: `python -m eval compare --again"
        " FOLDER` does the statistics again, with another `--margin` or `--threshold`.",
    ]


def _name(value: Any) -> Any:
    """Returns a name, which stands for itself or beside a digest."""
    return value.get("name") if isinstance(value, dict) else value


def _p(p: float) -> str:
    return "-" if math.isnan(p) else p_words(p).removeprefix("p ").removeprefix("= ")


def _number(value: float, form: str, end: str = "") -> str:
    return f"{value:{form}}{end}" if math.isfinite(value) else "-"


def _has_size(found: Paired, experiment: Experiment) -> bool:
    """Returns whether the loss is large enough for shares of it to mean something."""
    return found.reference >= experiment.setting.margin


def _relative(found: Paired, experiment: Experiment) -> str:
    return _number(100 * found.relative, "+z.2f") if _has_size(found, experiment) else "-"


def _count(units: float) -> str:
    return "-" if math.isnan(units) else f"{units:,.0f}" if math.isfinite(units) else "more than a million"


def _with_bounds(value: Interval, digits: int = 4) -> str:
    if math.isnan(value.mean):
        return "-"
    bounds = "" if math.isnan(value.low) else f" [{value.low:+z.{digits}f}, {value.high:+z.{digits}f}]"
    return f"{value.mean:+z.{digits}f}{bounds}"


def _percent(value: Interval) -> str:
    return _with_bounds(Interval(*(100 * number for number in value)), 1)


def _aligned(heads: Row, rows: Sequence[Row]) -> list[str]:
    """Returns columns for a terminal; words aligned left, numbers right."""
    wide = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    words = [any(cell[:1].isalpha() for cell in column) for column in zip(*rows, strict=True)] if rows else []
    return [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width) for cell, width, left in zip(row, wide, words, strict=True)
        ).rstrip()
        for row in [heads, *rows]
    ]


def _pipes(heads: Row, rows: Sequence[Row]) -> str:
    """Returns a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
