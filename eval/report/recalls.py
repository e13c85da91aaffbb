"""Section on spoken recall (`python -m eval recall`)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from eval.recall.results import KINDS, AtGap, CheckpointRecall, Curve
from eval.report.collect import RECALL, Source
from eval.report.parts import Cell, Figure, Note, Row, Section, Table, curve, estimate, number, of, p_value, seconds
from eval.report.runs import Run, Runs
from eval.results.figures import CHECKPOINTS, COLOURS
from eval.results.folder import OWN_DATA
from eval.stats.estimates import Estimate

DASHES = {"reset": "dash", "permuted": "dot"}


def sections(runs: Runs, sources: Sequence[Source]) -> list[Section]:
    """Returns the section, if any results belong to it."""
    blocks = list[Figure | Table | Note]()
    sources = [source for source in sources if source.command == RECALL]
    for kind in KINDS:
        blocks += _together(runs, sources, kind)
        for source in sources:
            for checkpoint in source.results.checkpoints:
                if kind in checkpoint.curves:
                    run = runs.of(source, checkpoint.info.name)
                    blocks += _recalled(run, source, checkpoint, kind, checkpoint.curves[kind])
    blocks += [_compared(runs, source) for source in sources if any(source.results.between.values())]
    for source in sources:
        keys = frozenset(runs.of(source, info.name).key for info in source.checkpoints)
        blocks += [
            Note(f"{entry.kind}, gap of {seconds(entry.gap):g} s: left out, {entry.reason}", runs=keys)
            for entry in source.results.dropped
        ]
    lead = (
        "What is left of an excerpt that was heard before a gap? Benefit: how many nats per token lower the loss of the"
        " second playing is than in a control in which something else was played first; above 0 it was recalled, 0 is"
        " no memory. Within attention's window and reach, attention alone can recall; beyond the reach only the fast"
        " weights can."
    )
    return [Section("recall", "Spoken recall", lead, blocks)] if blocks else []


def _together(runs: Runs, sources: Sequence[Source], kind: str) -> list[Figure]:
    """Returns a figure of the main arms of all checkpoints that were asked the same of the same recordings."""
    groups = defaultdict(list)
    for source in sources:
        setting, files = source.results.setting, source.results.files
        groups[frozenset(file.digest for file in files), setting.excerpt, setting.weighting].append(source)
    figures = []
    for (_, excerpt, weighting), members in groups.items():
        series, keys = [], set[str]()
        for source in members:
            for checkpoint in source.results.checkpoints:
                run = runs.of(source, checkpoint.info.name)
                if kind in checkpoint.curves and run.key not in keys:
                    colour, name = CHECKPOINTS[len(keys) % len(CHECKPOINTS)], f"{run.name} ({checkpoint.main})"
                    keys.add(run.key)
                    gaps = [gap for gap in checkpoint.curves[kind].gaps if checkpoint.main in gap.arms]
                    values = [gap.arms[checkpoint.main].benefit for gap in gaps]
                    series.append(curve(name, [gap.seconds for gap in gaps], values, colour=colour, run=run.key))
        if len(series) > 1:
            data = members[0].results.setting.about.get("data") or OWN_DATA
            how = f"excerpts of {seconds(excerpt):g} s of the same recordings ({data}), codebooks weighted {weighting}"
            caption = f"{kind}: {KINDS[kind]}; {how}."
            axes = ("gap, seconds", "benefit, nats per token")
            title = f"Recall, all runs: {kind}, {data}"
            figures.append(Figure(title, caption, *axes, series, frozenset(keys), zero=True, log=True))
    return figures


def _recalled(
    run: Run, source: Source, checkpoint: CheckpointRecall, kind: str, recalled: Curve
) -> list[Figure | Table | Note]:
    """Returns the curve of each arm, the verdict, and a table of the gaps."""
    info, setting, keys = checkpoint.info, source.results.setting, frozenset({run.key})
    marks = [(seconds(info.context), "attention window")]
    if math.isfinite(info.reach):
        marks.append((seconds(info.reach), "attention's reach"))
    series = []
    for arm in checkpoint.arms:
        gaps = [gap for gap in recalled.gaps if arm in gap.arms]
        values, style = [gap.arms[arm].benefit for gap in gaps], {"dash": DASHES.get(arm, "")}
        series.append(curve(arm, [gap.seconds for gap in gaps], values, colour=COLOURS.get(arm, "#000000"), **style))
    data = setting.about.get("data")
    how = f"{f' of {data}' if data else ''}, codebooks weighted {setting.weighting}"
    where = ", ".join(f"{words} {at:.4g} s" for at, words in marks)
    caption = f"Benefit by gap and arm with 95 % intervals, excerpts of {seconds(setting.excerpt):g} s{how}; {where}."
    axes = ("gap, seconds", "benefit, nats per token")
    title = f"{kind}: {run.name}{f', {data}' if data else ''}"
    figure = Figure(f"Recall, {title}", caption, *axes, series, keys, marks=marks, zero=True, log=True)
    heads = ("Gap, s", "Where", "Arm", "Benefit, nats", "Heard, nats", "Unheard, nats", "Persist minus it", "p (Holm)")
    rows = [_row(gap, arm) for gap in recalled.gaps for arm in checkpoint.arms if arm in gap.arms]
    about = f"{KINDS[kind][0].upper()}{KINDS[kind][1:]}."
    table = Table(f"Gaps, {title}", about, (*heads, "Items", "Units", "Failed"), rows, keys)
    return [figure, Note(of(run.name, recalled.verdict), runs=keys), table]


def _row(gap: AtGap, arm: str) -> Row:
    own, against = gap.arms[arm], gap.against.get(arm)
    return (
        number(gap.seconds, "g"),
        Cell(gap.where),
        Cell(arm),
        estimate(own.benefit, 5, signed=True),
        estimate(own.heard, 4),
        estimate(own.unheard, 4),
        number(against and against.test.mean, "+.5f"),
        p_value(against and against.p_holm),
        number(gap.items, "d"),
        Cell(f"{gap.units} {gap.unit}", gap.units),
        number(gap.failed, "d"),
    )


def _compared(runs: Runs, source: Source) -> Table:
    """Returns the benefit of every checkpoint minus that of the first."""
    first, *others = source.results.checkpoints
    main = {checkpoint.info.name: checkpoint.main for checkpoint in others}
    rows = [
        (
            Cell(runs.of(source, name).name),
            Cell(main[name]),
            Cell(kind),
            number(seconds(entry.gap), "g"),
            estimate(Estimate(entry.test.mean, entry.test.low, entry.test.high, entry.test.n), 5, signed=True),
            p_value(entry.p_holm),
            number(entry.test.n, "d"),
        )
        for name, by_kind in source.results.between.items()
        for kind, entries in by_kind.items()
        for entry in entries
    ]
    name = runs.of(source, first.info.name).name
    caption = f"Benefit minus that of {name} ({first.main}), on the same items: above 0 a checkpoint recalls more."
    heads = ("Run", "Arm", "Kind", "Gap, s", "Difference, nats", "p (Holm)", "Units")
    keys = frozenset(runs.of(source, checkpoint.info.name).key for checkpoint in others)
    return Table(f"Recall beside {name}", caption, heads, rows, keys)
